import json
import warnings
from pathlib import Path

import pytest
import torch

from moestro.cli.main import main
from moestro.cli.probe import summary
from moestro.config import RunConfig
from moestro.models.checkpoint import atomic_folder, save_model, write_json
from moestro.models.decoder import Decoder
from moestro.train.data import prepare

WORDS = {"animals": "cat dog hen cow", "numbers": "12 90 74 33", "shouts": "HEY WOW NO GO"}
FIGURES = ["load.png", "experts_by_domain.png", "specialisation.png", "repetition.png"]


def write_texts(folder: Path, documents: int = 40) -> Path:
    generator = torch.Generator().manual_seed(0)
    for domain, words in WORDS.items():
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            order = torch.randint(4, (30,), generator=generator).tolist()
            text = " ".join(words.split()[index] for index in order)
            (folder / domain / f"{number:02d}.txt").write_text(text)
    return folder


def write_run(folder: Path, texts: Path, *, keep_data: bool = True, **moe: object) -> Path:
    """A run of an untrained model: its routing depends on the bytes, so domains differ."""
    cfg = RunConfig(
        model={
            "dim": 16,
            "num_layers": 3,
            "dense_first": 1,
            "attention": {"num_heads": 2, "context": 16},
            "moe": {"hidden_dim": 8, "num_experts": 4, "top_k": 2, **moe} if moe else None,
        }
        | ({} if moe else {"dense_first": 0}),
        data={"sources": [str(texts)], "seq_len": 16, "held_out": 0.3},
    )
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    if keep_data:
        prepare(cfg.data, folder / "data")
    with atomic_folder(folder / "checkpoints" / "step-000001") as inside:
        save_model(Decoder(cfg.model), inside)
        write_json(inside / "run.json", cfg.model_dump(mode="json"))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "all")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("moe") / "run", texts, num_experts=4)


def probe_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["probe", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_person_gets_tables_a_paragraph_and_files(run, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["probe", str(run), "--out", str(out), "--tokens", "2000"]) == 0
    shown = capsys.readouterr().out
    for expected in ("Load", "Specialisation", "Layer 2", "Repetition", "animals", "shouts"):
        assert expected in shown
    assert "mixture layers use experts differently by domain" in " ".join(shown.split())
    assert sorted(path.name for path in out.iterdir()) == sorted([*FIGURES, "probe.json"])


def test_json_is_all_that_is_printed_and_is_kept(run, tmp_path, capsys) -> None:
    found = probe_json(capsys, run, "--out", tmp_path, "--tokens", 2000)
    assert found == json.loads((tmp_path / "probe.json").read_text())
    assert found["domains"] == ["animals", "numbers", "shouts"]
    assert found["moe_layers"] == [1, 2]
    assert found["figures"] == FIGURES
    assert 0 < found["tokens"] <= 2000
    assert found["tokens"] == sum(found["windows_M"]) * 16
    for row in found["table_LME"][0]:
        assert sum(row) == pytest.approx(1)
    # The three alphabets share nothing but the space: even random routers tell them apart.
    assert found["specialisation"]["supported_L"] == [True, True]
    assert found["summary"].startswith("2 of 2 mixture layers")


def test_windows_of_one_document_count_once(run, tmp_path, capsys) -> None:
    # Documents are some 90 to 120 bytes: six windows or more each.
    found = probe_json(capsys, run, "--out", tmp_path)
    pieces, windows = found["specialisation"]["blocks_M"], found["windows_M"]
    assert all(3 * p < w for p, w in zip(pieces, windows, strict=True))
    assert all(5 <= p <= 20 for p in pieces)


def test_the_default_folder_is_in_the_run(tmp_path, texts, capsys) -> None:
    run = write_run(tmp_path / "run", texts, num_experts=4)
    probe_json(capsys, run / "checkpoints" / "step-000001", "--tokens", 500)
    assert (run / "probe" / "probe.json").is_file()


def test_a_run_without_its_data_reads_its_sources_again(run, tmp_path, texts, capsys) -> None:
    bare = write_run(tmp_path / "run", texts, keep_data=False, num_experts=4)
    again = probe_json(capsys, bare, "--out", tmp_path / "a")
    first = probe_json(capsys, run, "--out", tmp_path / "b")
    assert again["table_LME"] == first["table_LME"]
    assert not (bare / "data").exists()


def test_other_text_leaves_the_runs_data_alone(run, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    for domain in ("letters", "digits"):
        (other / domain).mkdir(parents=True)
        for number in range(8):
            text = "abc " * 30 if domain == "letters" else f"{number}23 " * 30
            (other / domain / f"{number}.txt").write_text(text)
    before = {path: path.read_bytes() for path in (run / "data").iterdir()}
    found = probe_json(capsys, run, "--out", tmp_path / "out", "--source", other)
    assert found["domains"] == ["digits", "letters"]
    assert found["sources"] == [str(other)]
    assert {path: path.read_bytes() for path in (run / "data").iterdir()} == before


def test_one_domain_and_expert_choice_leave_out_what_cannot_be_said(tmp_path, capsys) -> None:
    texts = write_texts(tmp_path / "texts")
    with pytest.warns(UserWarning, match="causal"):
        run = write_run(tmp_path / "run", texts, router={"kind": "expert_choice"})
    (tmp_path / "one").mkdir()
    (texts / "animals").rename(tmp_path / "one" / "animals")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["probe", str(run), "--source", str(tmp_path / "one")]) == 0
    captured = capsys.readouterr()
    shown = " ".join(captured.out.split())
    assert "moestro: warning: expert_choice routing is not causal" in captured.err
    found = json.loads((run / "probe" / "probe.json").read_text())
    assert found["repetition"] is None
    assert found["specialisation"] is None
    assert found["figures"] == FIGURES[:2]
    assert "All text has one label" in shown
    assert "Repetition" not in shown


def test_many_domains_stay_readable(run, tmp_path, texts, capsys) -> None:
    # A folder of files alone: each file is a domain.
    words = ["probe", str(run), "--source", str(texts / "animals"), "--out", str(tmp_path)]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1,920 tokens of 40 domains" in shown
    assert "32 more domains are in probe.json" in shown
    assert "03, 04, 05, 06, 07 and 32 more only one document" in shown


def test_the_seed_decides_the_draws(run, tmp_path, capsys) -> None:
    options = ("--out", tmp_path, "--tokens", 1000)
    one, two, other = (probe_json(capsys, run, *options, "--seed", seed) for seed in (1, 1, 2))
    assert one == two
    assert one["specialisation"]["chance_LM"] != other["specialisation"]["chance_LM"]
    assert one["table_LME"] == other["table_LME"]


def test_bad_input_is_one_sentence_and_exit_2(run, tmp_path, texts, capsys) -> None:
    dense = write_run(tmp_path / "dense", texts)
    taken = tmp_path / "file"
    taken.write_text("")
    for words, message in (
        ([tmp_path / "nothing"], "does not exist"),
        ([dense], "no mixture layer"),
        ([run, "--layer", 0, "--out", tmp_path / "o"], "layer 0 is not a mixture layer"),
        ([run, "--out", taken / "inside"], "choose another folder with --out"),
        ([run, "--source", tmp_path / "no.txt", "--out", tmp_path / "o"], "no such file"),
        ([run, "--tokens", 0], "--tokens"),
    ):
        assert main(["probe", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert err.startswith("moestro: error: ")
        assert out == ""


def test_the_summary_claims_no_more_than_the_noise_allows() -> None:
    import numpy as np

    from moestro.probe.measure import measure
    from moestro.probe.record import Recording

    rng = np.random.default_rng(0)
    experts = rng.random((2, 24, 40, 8)).argsort(-1)[..., :2].astype(np.uint8)
    counts = (experts[..., None] == np.arange(8)).sum(axis=(2, 3))
    recording = Recording(
        domains=("left", "right"),
        moe_layers=(0, 1),
        top_k=2,
        domain_N=np.repeat([0, 1], 12),
        block_N=np.arange(24),
        counts_LNE=counts,
        probs_LNE=counts / counts.sum(-1, keepdims=True),
        entropy_LN=np.ones((2, 24)),
        dropped_LN=np.zeros((2, 24), dtype=np.int64),
        experts_LNSK=experts,
    )
    text = summary(measure(recording, draws=99))
    assert text.startswith("0 of 2 mixture layers")
    assert "may be chance" in text
    assert "more than shuffled in 0 and less in 0 of 4" in text
    whole = recording._replace(block_N=np.repeat([0, 1], 12))
    assert "Of left, right only one document" in summary(measure(whole, draws=9))


def test_a_published_model_is_probed_where_one_stands(
    published, tmp_path, texts, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(published.iterdir())
    found = probe_json(capsys, published, "--source", texts, "--tokens", 600)
    assert found["domains"] == ["animals", "numbers", "shouts"]
    assert (tmp_path / "probe-tiny" / "probe.json").is_file()
    assert sorted(published.iterdir()) == before
