import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.writing import save_model
from moestro.cli.main import main
from moestro.config import RunConfig
from moestro.data.windows import prepare
from moestro.files import write_json
from moestro.models.decoder import Decoder
from moestro.probe import study
from moestro.probe.recording.tracefile import read_trace, write_parts
from moestro.text import ByteTokenizer

from ..probe.worlds import world

WORDS = {"animals": "cat dog hen cow", "numbers": "12 90 74 33", "shouts": "HEY WOW NO GO"}
FIGURES = {"load", "experts_by_domain", "specialisation", "repetition", "caching"}
TABLES = {
    "load",
    "layers",
    "experts_by_domain",
    "specialisation",
    "tokens",
    "repetition",
    "caching",
}


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
        ByteTokenizer().save(inside)
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


def test_a_person_gets_tables_a_summary_and_files(run, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["probe", str(run), "--out", str(out), "--tokens", "2000"]) == 0
    shown = capsys.readouterr().out
    for expected in ("Load", "Specialisation", "Layer 2", "Repetition", "animals", "shouts"):
        assert expected in shown
    assert "differs by domain beyond chance in 2 of 2 mixture layers" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100 or "written to" in shown
    names = {path.name for path in out.iterdir()}
    assert {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")} <= names
    assert {f"{name}.csv" for name in TABLES} | {"probe.json"} <= names


def test_json_is_all_that_is_printed_and_is_kept(run, tmp_path, capsys) -> None:
    found = probe_json(capsys, run, "--out", tmp_path, "--tokens", 2000)
    assert found == json.loads((tmp_path / "probe.json").read_text())
    assert found["domains"] == ["animals", "numbers", "shouts"]
    assert found["moe_layers"] == [1, 2]
    assert {f"{name}.png" for name in FIGURES} <= set(found["figures"])
    assert 0 < found["tokens_recorded"] <= 2000
    assert found["tokens_recorded"] == sum(found["tokens_M"])
    for row in found["table_LME"][0]:
        assert sum(row) == pytest.approx(1)
    # The three alphabets share nothing but the space: even random routers tell them apart.
    assert found["specialisation"][0]["supported_L"] == [True, True]
    assert found["ablations"] is None


def test_windows_of_one_document_count_once(run, tmp_path, capsys) -> None:
    # Documents are some 90 to 120 bytes: six windows or more each.
    found = probe_json(capsys, run, "--out", tmp_path)
    pieces, tokens = found["documents_M"], found["tokens_M"]
    assert all(3 * 16 * p < t for p, t in zip(pieces, tokens, strict=True))
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
    assert found["specialisation"] == []
    assert found["caching"] is None
    assert "the text has only" in shown
    assert "Repetition" not in shown


def test_many_domains_stay_readable(run, tmp_path, texts, capsys) -> None:
    # A folder of files alone: each file is a domain.
    words = ["probe", str(run), "--source", str(texts / "animals"), "--out", str(tmp_path)]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4,480 tokens of 40 domains" in shown
    assert "more are in the files" in shown
    assert "one document" in shown


def test_the_seed_decides_the_draws(run, tmp_path, capsys) -> None:
    options = ("--out", tmp_path, "--tokens", 1000)
    one, two, other = (probe_json(capsys, run, *options, "--seed", seed) for seed in (1, 1, 2))
    assert one == two
    assert one["specialisation"][0]["chance_LM"] != other["specialisation"][0]["chance_LM"]
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
        ([run, "--report", tmp_path / "no" / "a.html"], "choose a file with --report"),
        ([run, "--report", tmp_path, "--ablate", 2], "choose a file with --report"),
        ([run, "--source", tmp_path / "no.txt", "--out", tmp_path / "o"], "no such file"),
        ([run, "--tokens", 0], "--tokens"),
        ([run, "--by", "language", "--out", tmp_path / "o"], "give NAME=REGEX"),
        ([run, "--by", "language=(", "--out", tmp_path / "o"], "language"),
        ([run, "--compare", run, "--ablate", 1], "so leave out --ablate, or probe"),
        ([run, "--checkpoints", "--out", tmp_path / "o"], "not a run with several checkpoints"),
        ([tmp_path / "no.npz"], "no.npz"),
    ):
        assert main(["probe", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert err.startswith("moestro: error: ")
        assert out == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("a.npz --tokens 5 --source texts", "--source, --tokens, or give the model"),
        ("a.npz --transformers --generate 3", "--generate, --transformers, or give the model"),
        ("a.npz --accept-field name --checkpoints", "--accept-field, --checkpoints, or give"),
        ("a.npz --compare b.npz --tokens 5", "a.npz is a trace: nothing is run"),
        ("RUN --compare b.npz --by zz --layer 0", "only, so leave out --by, --layer, or"),
        ("RUN --compare RUN --generate 5", "only, so leave out --generate, or"),
        ("RUN --transformers --accept-field name", "leave out --accept-field or --transformers"),
    ],
)
def test_options_that_would_change_nothing_are_refused(run, words, named, capsys) -> None:
    assert main(["probe", *words.replace("RUN", str(run)).split()]) == 2
    out, err = capsys.readouterr()
    assert named in err
    assert out == ""


@pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")
def test_questions_without_an_answer_are_refused_before_the_model_reads(
    run, tmp_path, texts, capsys, monkeypatch
) -> None:
    kept, alone = tmp_path / "kept.npz", tmp_path / "alone"
    write_parts(kept, [world(0)])
    for name in ("one", "two"):
        (alone / name).mkdir(parents=True)
        (alone / name / "a.txt").write_text(f"{name} document " * 20)
    choosing = write_run(tmp_path / "choosing", texts, router={"kind": "expert_choice"})
    taken = write_run(tmp_path / "run", texts, num_experts=4) / "probe"
    taken.write_text("a file where the folder would be")
    monkeypatch.setattr(study, "record_study", None)  # nothing is recorded
    out = tmp_path / "out"
    for words, message in (
        ([run, "--layer", 0, "--out", out], "choose one of 1, 2"),
        ([run, "--checkpoints", "--out", out], "not a run with several checkpoints"),
        ([run, "--ablate", 2, "--source", alone, "--out", out], "two documents each"),
        ([choosing, "--ablate", 2, "--out", out], "ablation needs a model whose tokens choose"),
        ([taken.parent], f"cannot write to {taken}"),
        ([run, "--compare", run, "--out", taken / "inside"], "choose another folder with --out"),
        ([kept, "--layer", 99, "--out", out], "choose one of 0"),
    ):
        assert main(["probe", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_a_published_model_is_probed_where_one_stands(
    published, tmp_path, texts, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(published.iterdir())
    found = probe_json(capsys, published, "--source", texts, "--tokens", 600)
    assert found["domains"] == ["animals", "numbers", "shouts"]
    assert (tmp_path / "probe-tiny" / "probe.json").is_file()
    assert sorted(published.iterdir()) == before


def test_a_trace_stands_for_its_model(run, tmp_path, capsys) -> None:
    kept = tmp_path / "kept.npz"
    first = probe_json(capsys, run, "--out", tmp_path / "a", "--tokens", 1500, "--trace", kept)
    again = probe_json(capsys, kept, "--out", tmp_path / "b")
    assert again["table_LME"] == first["table_LME"]
    assert again["summary"] == first["summary"]
    assert main(["probe", str(kept), "--ablate", "1", "--out", str(tmp_path / "c")]) == 2
    assert "is a trace: nothing is run" in capsys.readouterr().err
    trace = read_trace(kept)
    lost = tmp_path / "lost.npz"
    elsewhere = trace.subject._replace(name=str(tmp_path / "gone"))
    write_parts(lost, [trace._replace(subject=elsewhere)])
    words = ["probe", str(lost), "--report", str(tmp_path / "a.html")]
    assert main([*words, "--out", str(tmp_path / "c")]) == 2
    assert "gone, is not there" in capsys.readouterr().err
    short = tmp_path / "short.npz"
    short.write_bytes(kept.read_bytes()[:-100])
    assert main(["probe", str(short), "--out", str(tmp_path / "c")]) == 2
    assert "short.npz" in capsys.readouterr().err
    assert not (tmp_path / "c").exists(), "nothing half-written"


def test_a_page_with_ablations_and_groups(run, tmp_path, capsys) -> None:
    page = tmp_path / "out.html"
    options = ("--out", tmp_path / "a", "--by", "loud=(shouts|animals)", "--ablate", 1)
    found = probe_json(capsys, run, *options, "--report", page)
    assert [each["grouping"] for each in found["specialisation"]] == ["domain", "loud"]
    rows = found["ablations"]["rows"]
    assert len(rows) == 2
    assert [row["control"] for row in rows] == [False, True]
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert (tmp_path / "a" / "ablation.csv").is_file()


def test_what_the_model_writes_is_measured_apart(run, tmp_path, capsys) -> None:
    options = ("--tokens", 600, "--out")
    read = probe_json(capsys, run, *options, tmp_path / "a")
    both = probe_json(
        capsys, run, *options, tmp_path / "b", "--generate", 20, "--trace", tmp_path / "kept"
    )
    assert read["written"] is None
    assert both["tokens_generated"] > 0
    assert both["tokens_M"] == read["tokens_M"]
    assert both["table_LME"] == read["table_LME"]
    assert sum(both["written"]["tokens"]) == both["tokens_recorded"]
    # A trace needs no suffix to be known as one, and keeps the two apart as well.
    again = probe_json(capsys, tmp_path / "kept", "--out", tmp_path / "c")
    assert again["table_LME"] == read["table_LME"]
    assert main(["probe", str(tmp_path / "kept"), "--out", str(tmp_path / "d")]) == 0
    assert "what the model read and the" in " ".join(capsys.readouterr().out.split())
    words = ["probe", str(tmp_path / "kept"), "--compare", str(run), "--tokens", "600", "--json"]
    assert main(words) == 0
    compared = json.loads(capsys.readouterr().out)
    loads = next(each for each in compared["quantities"] if each["name"] == "imbalance")
    assert loads["difference"] == 0, "only what was read is compared"


def test_labels_of_one_document_each_are_not_called_alike(run, tmp_path, capsys) -> None:
    for name in ("one", "two"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text(f"{name} document " * 20)
    assert main(["probe", str(run), "--source", str(tmp_path / "texts")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Whether the choice of experts differs by domain cannot be determined" in shown
    assert "nan" not in shown.replace("nanosecond", "")


def test_two_models_and_a_model_with_itself(run, tmp_path, texts, capsys) -> None:
    other = write_run(tmp_path / "other", texts, num_experts=4, top_k=1)
    words = ["probe", "--compare", str(run), str(run), "--tokens", "1500", "--json"]
    assert main(words) == 0
    same = json.loads(capsys.readouterr().out)
    assert all(each["difference"] == 0 for each in same["quantities"])
    assert main(["probe", str(run), "--compare", str(other), "--tokens", "1500"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "largest / mean load" in shown
    assert "beyond noise" in shown


def test_checkpoints_of_a_run(tmp_path, texts, capsys) -> None:
    run = write_run(tmp_path / "run", texts, num_experts=4)
    torch.manual_seed(1)
    cfg = open_checkpoint(run).model.cfg
    with atomic_folder(run / "checkpoints" / "step-000002") as inside:
        save_model(Decoder(cfg), inside)
        ByteTokenizer().save(inside)
        write_json(
            inside / "run.json",
            json.loads((run / "checkpoints" / "step-000001" / "run.json").read_text()),
        )
    found = probe_json(capsys, run, "--checkpoints", "--tokens", 1000)["saturation"]
    assert found["steps_J"] == [1, 2]
    assert found["mean_J"][1] == 1
    assert 0 < found["mean_J"][0] < 1


def test_by_transformers_own_code(published, tmp_path, texts, capsys) -> None:
    pytest.importorskip("transformers")
    options = ("--source", texts, "--tokens", 600, "--out")
    ours = probe_json(capsys, published, *options, tmp_path / "a")
    theirs = probe_json(capsys, published, *options, tmp_path / "b", "--transformers")
    # What is to be written needs room in the context.
    assert main(["probe", str(published), "--transformers", "--generate", "100000"]) == 2
    assert "leaves no room for text" in capsys.readouterr().err
    # The same choices, save where rounding decides between two experts.
    assert np.allclose(theirs["table_LME"], ours["table_LME"], atol=0.02)


def test_only_text_with_a_token_that_the_model_does_not_know_is_refused(larger, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    words = ["probe", str(larger), "--tokens", "600", "--out", str(tmp_path / "out"), "--source"]
    assert main([*words, str(texts), "--report", str(tmp_path / "page.html")]) == 0
    (texts / "calls").mkdir()
    (texts / "calls" / "call.txt").write_text("[PAD] and <tool>\n" * 200)
    capsys.readouterr()
    assert main([*words, str(texts)]) == 2
    err = capsys.readouterr().err
    assert "calls/call" in err
    assert "has token 261; the model's vocabulary is 0 to 259" in err
