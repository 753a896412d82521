"""`moestro upcycle`, `prune` and `merge`: what they write and say, and what they refuse."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.reading import read_model
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.cli.calibrating import read_texts
from moestro.cli.main import main
from moestro.cli.tables import that_fit
from moestro.config import ModelConfig, RunConfig
from moestro.data.windows import HeldOut, prepare
from moestro.errors import DataError
from moestro.files import write_json
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.surgery.cost import WHOLE, Cost
from moestro.surgery.layers import Layers
from moestro.text import ByteTokenizer


@pytest.fixture
def text(tmp_path: Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("first", "second"):
        lines = (f"{name} says that line {number} is here\n\n" for number in range(400))
        (folder / f"{name}.txt").write_text("".join(lines))
    return str(folder)


def facts_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prune_reports_its_cost_beside_random(
    published: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(published), str(tmp_path / "less"), "--text", text, "--tokens", "1000"]
    facts = facts_of([*words, "--keep", "0.75"], capsys)
    assert (facts["experts"], facts["of"]) == (3, 4)
    rows = {row["model"]: row for row in facts["rows"]}
    assert list(rows) == ["whole", "reap", "random 1", "random 2", "random 3"]
    assert set(rows["reap"]["bits_per_byte"]) == {"all", "first", "second"}
    assert rows["reap"]["standard_error"] > 0
    assert facts["measured_on"] == [text]
    less, whole = read_model(tmp_path / "less"), read_model(published)
    for layer, kept in facts["kept"].items():
        old, new = (model.blocks[int(layer)].ffn.experts.down for model in (whole, less))
        assert torch.equal(old[kept], new)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "less" / name).read_bytes() == (published / name).read_bytes()
    words[2] = str(tmp_path / "again")
    assert main([*words, "--keep", "0.75"]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 experts in each mixture" in out
    assert f"{facts['held_out_tokens']:,} tokens of {text}, held out from calibration\n" in out
    assert f"{rows['reap']['change']:+.4f}" in out


@pytest.mark.parametrize(("limit", "left"), [("+0.5%", None), ("+2%", 3), ("+4%", 2)])
def test_prune_until_a_loss(
    limit: str, left: int | None, published: Path, text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Experts that cost 1 % and 3 %: chosen on every second window, reported on the others."""
    asked: list[Mapping[str, HeldOut]] = []

    def known(_: Layers, held_out: Mapping[str, HeldOut], changes: Mapping, *__: object) -> dict:
        asked.append(held_out)
        share = {name: {3: 0.01, 2: 0.03}[one.cfg.moe.num_experts] for name, one in changes.items()}
        return {
            name: Cost({"all": 1 + each}, each, 0.0) for name, each in {WHOLE: 0.0, **share}.items()
        }

    monkeypatch.setattr("moestro.surgery.cost.costs", known)
    target = tmp_path / "less"
    words = ["prune", str(published), str(target), "--text", text, "--tokens", "1200"]
    words += ["--calibration", "2000", "--until", limit]
    full = read_texts(Layers(published), [text], None, 2000, 1200).held_out
    if left is None:
        assert main(words) == 2
        message = "removing even the fewest experts, to 3 a layer, costs more than 0.50%; allow"
        assert message in capsys.readouterr().err
        assert not target.exists()
    else:
        facts = facts_of(words, capsys)
        assert facts["experts"] == read_model(target).cfg.moe.num_experts == left
        assert list(reported := asked.pop()) == list(full)
        for name, domain in full.items():
            assert torch.equal(reported[name].tokens_NS, domain.tokens_NS[1::2])
    assert asked
    for each in asked:
        for name, domain in full.items():
            assert len(domain.tokens_NS) > 3
            assert torch.equal(each[name].tokens_NS, domain.tokens_NS[::2])


def test_a_single_window_has_no_standard_error(
    published: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(published), str(tmp_path / "less"), "--text", text, "--tokens", "64"]
    assert main([*words, "--calibration", "256", "--experts", "3"]) == 0
    out, err = capsys.readouterr()
    assert "random 3" in out
    assert "nan" not in out
    assert "to know more, raise --calibration; the text has " in err
    words[2] = str(tmp_path / "again")
    assert main([*words, "--experts", "3", "--json"]) == 0
    assert {row["standard_error"] for row in json.loads(capsys.readouterr().out)["rows"]} == {None}


def test_a_run_is_pruned_on_its_own_text_and_measured_on_what_it_held_out(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = {"hidden_dim": 8, "num_experts": 4, "top_k": 2}
    attention = {"num_heads": 2, "context": 16}
    model = {"dim": 16, "num_layers": 1, "attention": attention, "moe": moe, "vocab_size": 257}
    cfg = RunConfig(model=model, data={"sources": [text], "seq_len": 16, "held_out": 0.2})
    corpus = prepare(cfg.data, tmp_path / "run" / "data")
    with atomic_folder(tmp_path / "run" / "checkpoints" / "step-000001") as inside:
        save_model(Decoder(cfg.model), inside)
        ByteTokenizer().save(inside)
        write_json(inside / "run.json", cfg.model_dump(mode="json"))
    words = ["prune", str(tmp_path / "run"), str(tmp_path / "less"), "--family", "mixtral"]
    words += ["--experts", "3", "--tokens", "500", "--calibration", "4000"]
    facts = facts_of(words, capsys)
    assert facts["measured_on"] is None
    held_out = corpus.held_out(500).values()
    assert facts["held_out_tokens"] == sum(part.tokens_NS[:, 1:].numel() for part in held_out)
    words[2] = str(tmp_path / "again")
    assert main(words) == 0
    assert f"{facts['held_out_tokens']} tokens that the run held out\n" in capsys.readouterr().out
    words[2:3] = [str(tmp_path / "third"), "--source", str(Path(text) / "first.txt")]
    assert main(words) == 0
    assert "first.txt\n" in capsys.readouterr().out.partition("tokens of ")[2]


@pytest.mark.parametrize(
    "words", [["prune", "--keep", "0.75"], ["merge", "--groups", "3"], ["round"]]
)
def test_text_is_asked_for_where_no_run_left_any(
    words: list[str], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    assert main([words[0], str(published), str(target), *words[1:]]) == 2
    assert "does not say what text it was trained on" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("method", [[], ["--method", "m-smoe", "--align"]])
def test_merge_reports_its_cost_beside_pruning(
    method: list[str], published: Path, text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = tmp_path / "less"
    words = ["merge", str(published), str(target), "--text", text, "--tokens", "1000"]
    facts = facts_of([*words, "--groups", "2", *method], capsys)
    names = [row["model"] for row in facts["rows"]]
    assert names == ["whole", facts["method"], "reap", "random 1", "random 2", "random 3"]
    assert all(sum(map(len, groups)) == 4 for groups in facts["groups"].values())
    assert read_model(target).blocks[0].ffn.experts.down.shape[0] == 2


def test_upcycle_says_what_it_made(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = {"num_heads": 2, "context": 64}
    cfg = ModelConfig(vocab_size=260, dim=16, num_layers=2, attention=attention)
    dense = Decoder(cfg).eval()
    write_pretrained(dense, tmp_path / "dense", family="llama", sidecar_files=published)
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "mixture")]
    facts = facts_of([*words, "--experts", "8", "--top-k", "4", "--granularity", "2"], capsys)
    assert facts["model_type"] == "mixtral"
    mixture = read_model(tmp_path / "mixture")
    assert facts["parameters"] == sum(one.numel() for one in mixture.parameters())
    tokens = torch.arange(24)[None]
    assert (mixture(tokens).logits - dense(tokens).logits).abs().max() < 1e-5
    assert (tmp_path / "mixture" / "tokenizer.json").is_file()
    words[2] = str(tmp_path / "other")
    assert main([*words, "--method", "drop", "--share", "0.005"]) == 0
    assert "drop on 0.5%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slices", "exact", "said"),
    [
        (2, True, "per token, the dense model's outputs; "),
        (3, False, "per token, the dense model's outputs up to rounding to bfloat16; "),
    ],
)
def test_upcycle_says_exact_only_where_it_is(
    slices: int, exact: bool, said: str, published: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    attention, network = {"num_heads": 2, "context": 64}, {"hidden_dim": 24}
    cfg = ModelConfig(vocab_size=260, dim=16, num_layers=1, attention=attention, dense=network)
    dense = Decoder(cfg).bfloat16()
    write_pretrained(dense, tmp_path / "dense", family="llama", sidecar_files=published)
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "mixture"), "--experts", "6"]
    words += ["--granularity", str(slices), "--top-k", str(slices)]
    assert facts_of(words, capsys)["exact"] is exact
    words[2] = str(tmp_path / "again")
    assert main(words) == 0
    assert said in capsys.readouterr().out


@pytest.mark.skipif(native_cpu.available() is not None, reason=str(native_cpu.available()))
def test_round_is_measured_as_int4(
    published: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / ".unfinished-new-layers"  # what a kill leaves
    killed.mkdir()
    (killed / "9.safetensors").write_bytes(b"part")
    words = ["round", str(published), str(tmp_path / "new"), "--text", text, "--tokens", "1000"]
    facts = facts_of(words, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "text"}
    assert [row["weights"] for row in facts["rows"]] == ["bf16", "int4", "int4, rounded"]
    assert facts["matrices"] == 2 * (2 + 2 * 4) + 1
    assert facts["measured_on"] == [text]
    words = ["eval", str(tmp_path / "new"), "--source", text, "--tokens", "1000"]
    again = facts_of([*words, "--weights", "int4"], capsys)
    assert again["rows"][0]["bits_per_byte"] == facts["rows"][2]["bits_per_byte"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "--keep", "0.2"], "1 experts would be left; a model with 4 experts, 2 per"),
        (["prune"], "give one of --keep, --experts and --until"),
        (["prune", "--keep", "0.5", "--experts", "2"], "give one of --keep, --experts and"),
        (["prune", "--until", "1"], "--until is '1'; write it as '+1%'"),
        (
            ["prune", "--keep", "0.75", "--calibration", "64"],
            "2 per token need 128 to see 64 each on average; raise --calibration; the text has ",
        ),
        (
            ["prune", "--keep", "0.75", "--calibration", "9"],
            "one window of 64; raise --calibration",
        ),
        (["prune", "--keep", "0.75", "--text", "nowhere"], "nowhere"),
        (
            ["prune", "--keep", "0.75", "--family", "olmoe"],
            "the layout of olmoe cannot express attention.qk_norm",
        ),
        (["prune", "--keep", "0.75", "--memory", "much"], "much"),
        (["merge", "--groups", "4"], "4 experts would be left"),
        (["merge", "--groups", "1"], "1 experts would be left"),
        (["upcycle"], "a mixture of 4 experts already"),
        (["upcycle", "--share", "0.9"], "--share is what --method noise and drop change"),
        (
            ["upcycle", "--seed", "1000000000000000"],
            "--seed': Input should be less than or equal to 42949",
        ),
        (
            ["prune", "--keep", "0.75", "--seed", "99999999999999999999"],
            "less than or equal to 4294967295",
        ),
        (
            ["merge", "--groups", "3", "--seed", "-1"],
            "--seed': Input should be greater than or equal to 0",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    words: list[str], message: str, published: Path, text: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    verb, *options = words
    given = [] if verb == "upcycle" or "--text" in words else ["--text", text]
    before = set(tmp_path.iterdir())
    assert main([verb, str(published), str(tmp_path / "new"), *given, *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("texts", "sources", "least", "message"),
    [
        (["short"], None, 0, "short.txt has 6 tokens; give at least 260: half of it is held out, "),
        (["short"], None, 1000, "at least 2,000: .* of the other half 1,000 are needed$"),
        (["text", "short"], None, 0, "domain 'short' of the text .* 6 tokens; .* 260 of each dom"),
        (["text"], ["short"], 1000, "short.txt has 6 tokens; give at least 260: "),
        (["empty"], None, 0, "every file is empty or blank"),
    ],
)
def test_text_too_short_says_how_much_is_needed(
    texts: list[str], sources: list[str] | None, least: int, message: str, published: Path,
    text: str, tmp_path: Path,
) -> None:  # fmt: skip
    paths = {"text": text, "short": str(tmp_path / "short.txt"), "empty": str(tmp_path / "e.txt")}
    Path(paths["short"]).write_text("short")
    Path(paths["empty"]).write_text("")
    given, other = ([paths[name] for name in names or ()] for names in (texts, sources))
    with pytest.raises(DataError, match=message) as raised:
        read_texts(Layers(published), given, other, 2000, 1000, least=least)
    assert "data." not in str(raised.value)


@pytest.mark.parametrize("words", [["prune", "--keep", "0.75"], ["merge", "--groups", "3"]])
def test_text_too_short_for_the_experts_is_refused_before_it_is_read(
    words: list[str], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("moestro.surgery.calibration.tokens_needed", lambda moe: 1000)
    (tmp_path / "short.txt").write_text("short")
    given = [str(published), str(tmp_path / "new"), "--text", str(tmp_path / "short.txt")]
    assert main([words[0], *given, *words[1:]]) == 2
    assert "of the other half 1,000 are needed" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_existing_target_is_left_alone(
    published: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(published), str(published), "--text", text, "--keep", "0.75"]
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_domains_that_do_not_fit_are_left_to_json() -> None:
    assert that_fit(["first", "second", "a longer one"], 20) == ["first", "second"]
    assert that_fit(["first"], 8) == []
