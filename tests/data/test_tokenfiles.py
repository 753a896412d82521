"""Token files: the split, the cap on a domain, cuts by position, and too little text."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moestro.config import DataConfig
from moestro.data import tokenfiles
from moestro.data.documents import Document
from moestro.data.windows import Corpus, prepare
from moestro.errors import DataError
from moestro.text import train_bpe

SEQ = 16


def documents(letter: str, count: int) -> list[str]:
    """Texts that name themselves throughout, so that a window tells where it is from."""
    return [
        " ".join(f"{letter}{number}.{word}" for word in range(10 + number % 7))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for letter, count in (("a", 60), ("b", 40)):
        (root / letter).mkdir()
        for number, text in enumerate(documents(letter, count)):
            (root / letter / f"{number}.txt").write_text(text)
    return root


def config(sources: Path, /, **changes) -> DataConfig:
    return DataConfig(**{"sources": (str(sources),), "seq_len": SEQ, "held_out": 0.2, **changes})


def tokens_of(folder: Path, name: str) -> np.ndarray:
    return np.fromfile(folder / name, dtype=json.loads((folder / "meta.json").read_text())["dtype"])


def texts_of(folder: Path, name: str) -> list[str]:
    corpus = Corpus(folder)
    *texts, rest = corpus.tokenizer.decode(tokens_of(folder, name).tolist()).split("\0")
    assert rest == ""
    return texts


def test_every_document_is_on_one_side(sources: Path, tmp_path: Path) -> None:
    prepare(config(sources), tmp_path / "data")
    train = texts_of(tmp_path / "data", "train.bin")
    held = texts_of(tmp_path / "data", "held_out.bin")
    assert Counter(train + held) == Counter(documents("a", 60) + documents("b", 40))
    assert 10 <= len(held) <= 45
    assert {text[0] for text in held} == {text[0] for text in train} == {"a", "b"}


def test_bpe(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    corpus = prepare(config(sources, tokenizer="bpe:300"), folder)
    assert corpus.tokenizer.name == "bpe:300"
    held = corpus.held_out(1000)["a"]
    assert held.bytes_per_token > 1.2
    ids, end = tokens_of(folder, "held_out.bin"), corpus.tokenizer.end_of_text
    texts = [
        corpus.tokenizer.decode(part.tolist()) for part in np.split(ids, np.where(ids == end)[0])
    ]
    own = [text for text in texts if text.startswith("a")]
    assert set(own) <= set(documents("a", 60))
    size = sum(len(text) + 1 for text in own)
    count = sum(len(corpus.tokenizer.encode(text)) + 1 for text in own)
    assert held.bytes_per_token == pytest.approx(size / count)


def test_large_vocabularies_take_32_bits() -> None:
    class Large:
        name, vocab_size, end_of_text = "large", 65_537, 0

    assert tokenfiles.token_dtype(Large()) == np.uint32
    Large.vocab_size = 65_536
    assert tokenfiles.token_dtype(Large()) == np.uint16


def test_long_documents_are_written_in_parts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenfiles, "_PIECE_BYTES", 50)
    texts = ["漢字🎻" * 100, "line\n" * 100, "é" * 333]
    (tmp_path / "t.txt").write_text("\0".join(texts), encoding="utf-8")
    prepare(config(tmp_path / "t.txt"), tmp_path / "data")
    both = texts_of(tmp_path / "data", "train.bin") + texts_of(tmp_path / "data", "held_out.bin")
    assert Counter(both) == Counter(texts)


def test_domain_bytes(sources: Path, tmp_path: Path) -> None:
    sizes = {}
    for most in (1500, 3000):
        folder = tmp_path / str(most)
        prepare(config(sources, domain_bytes=most), folder)
        texts = texts_of(folder, "train.bin") + texts_of(folder, "held_out.bin")
        for letter in "ab":
            kept = [text for text in texts if text.startswith(letter)]
            assert most - 3 <= sum(map(len, kept)) <= most
            sizes[most, letter] = set(kept)
        # A random sample, not the first files.
        numbers = sorted(int(text[1:].split(".")[0]) for text in sizes[most, "a"])
        assert numbers[-1] > 30
    # A larger cap adds documents, and completes the one that was cut.
    assert len(sizes[1500, "a"] - sizes[3000, "a"]) <= 1


def test_domain_bytes_never_cuts_a_character(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\0".join(["漢字" * 40] * 3), encoding="utf-8")
    for most in range(300, 306):
        prepare(config(tmp_path / "t.txt", domain_bytes=most), tmp_path / "data")
        texts = texts_of(tmp_path / "data", "train.bin") + texts_of(
            tmp_path / "data", "held_out.bin"
        )
        assert set("".join(texts)) == set("漢字")


def test_a_cap_does_not_keep_just_the_held_out(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\0".join(f"{number:040d}" for number in range(1000)))
    cfg = config(tmp_path / "t.txt", domain_bytes=200 * 40, held_out=0.1, seq_len=4)
    prepare(cfg, tmp_path / "data")
    assert 10 <= len(texts_of(tmp_path / "data", "held_out.bin")) < 50


def test_a_group_is_on_one_side_in_all_domains(tmp_path: Path, monkeypatch) -> None:
    made = [
        Document(f"{domain}{number}", domain, f"{domain}{number:030d}", f"group {number}")
        for number in range(60)
        for domain in "xy"
    ]
    monkeypatch.setattr(tokenfiles, "read_documents", lambda cfg: iter(made))
    (tmp_path / "t.txt").write_text("any")
    prepare(config(tmp_path / "t.txt"), tmp_path / "data")
    held = texts_of(tmp_path / "data", "held_out.bin")
    groups = {letter: {text[1:] for text in held if text[0] == letter} for letter in "xy"}
    assert groups["x"] == groups["y"]
    assert 0 < len(groups["x"]) < 60


def test_bpe_is_not_trained_on_the_held_out(sources: Path, tmp_path: Path) -> None:
    corpus = prepare(config(sources, tokenizer="bpe:320"), tmp_path / "bpe")
    prepare(config(sources), tmp_path / "bytes")
    expected = train_bpe(texts_of(tmp_path / "bytes", "train.bin"), 320)
    for text in texts_of(tmp_path / "bytes", "held_out.bin"):
        assert corpus.tokenizer.encode(text) == expected.encode(text)


def test_a_single_document_is_cut_in_two_and_says_so(sources: Path, tmp_path: Path) -> None:
    text = "\n".join(f"line {number}" for number in range(500))
    (tmp_path / "solo.txt").write_text(text)
    cfg = DataConfig(sources=(str(sources), str(tmp_path / "solo.txt")), seq_len=SEQ)
    corpus = prepare(cfg, tmp_path / "data")
    (note,) = corpus.notes
    assert "'solo' has too few documents" in note
    assert "the last 5% of it is held out" in note
    first, last = (
        [part for part in texts_of(tmp_path / "data", name) if "line" in part]
        for name in ("train.bin", "held_out.bin")
    )
    assert first[0] + last[0] == text
    assert last[0].startswith("line ")
    assert Corpus(tmp_path / "data").notes == corpus.notes


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (" \n", {}, r"there is no text in .*t\.txt"),
        ("", {}, r"there is no text in"),
        ("short", {}, r"4 tokens are left for training.*needs 17 .*lower data\.seq_len"),
        ("x" * 30, {}, r"16 tokens are left for training.*needs 17"),
        ("x" * 40, {"held_out": 0.9}, r"5 tokens are left for training.*lower data\.held_out"),
    ],
)
def test_too_little_text(tmp_path: Path, text: str, changes: dict, message: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path / "t.txt", **changes), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_one_domain_with_too_little_text(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("x" * 20)
    with pytest.raises(DataError, match=r"'tiny' has 11 held-out .*\(and 11 for.*raise data\.held"):
        prepare(
            config(sources, sources=(str(sources), str(tmp_path / "tiny.txt"))), tmp_path / "data"
        )


@pytest.mark.parametrize(("text", "changes"), [("x", {}), ("é" * 99, {"domain_bytes": 1})])
def test_a_domain_of_a_byte_or_none(tmp_path: Path, text: str, changes: dict) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("line\n" * 99)
    (texts / "b.txt").write_text(text)
    with pytest.raises(DataError, match=r"'b' has \d held-out .*|only 2 tokens are left"):
        prepare(config(texts, **changes), tmp_path / "data")
    assert list(tmp_path.iterdir()) == [texts]


@pytest.mark.parametrize(
    ("name", "domains", "message"),
    [
        (
            "caf\udce9.txt",
            "file",
            r"the domain 'caf\\udce9' of 'texts/caf\\udce9\.txt' is not text",
        ),
        ("r.jsonl", "field", r"the domain '\\ud800x' of 'texts/r\.jsonl#2' is not text"),
    ],
)
def test_domains_that_are_not_utf8(tmp_path: Path, name: str, domains: str, message: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [{"text": "line " * 99, "domain": domain} for domain in ("fine", "\ud800x")]
    (texts / name).write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=message):
        prepare(config(texts, domains=domains), tmp_path / "data")
    assert list(tmp_path.iterdir()) == [texts]
    prepare(config(texts, domains="none"), tmp_path / "data")


def test_a_domain_called_as_all_of_them(sources: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    for name in ("all.txt", "other.txt"):
        texts.mkdir(exist_ok=True)
        (texts / name).write_text((sources / "a" / "6.txt").read_text() * 9)
    with pytest.raises(DataError, match=r"one of 2 domains is called 'all'.*rename its folder"):
        prepare(config(texts), tmp_path / "data")
    assert list(tmp_path.iterdir()) == [texts]
    prepare(config(texts, domains="none"), tmp_path / "data")
    # One that was prepared when the name was allowed.
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    for counts in ("train_tokens", "held_tokens", "held_bytes"):
        meta[counts]["other"] = meta[counts].get("other", 0)
    total = meta["held_tokens"]["all"]
    meta["held_tokens"] = {"all": total - SEQ, "other": SEQ}
    meta["held_bytes"]["other"] = SEQ
    meta["domains"] = ["all", "other"]
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="one of 2 domains is called 'all'"):
        Corpus(tmp_path / "data")


def test_documents_of_unequal_size_are_cut_by_position(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 5000 + "\0tiny")
    corpus = prepare(config(tmp_path / "t.txt"), tmp_path / "data")
    assert len(corpus.notes) == 1
    assert "the last 20% of it" in corpus.notes[0]
    assert 3990 < corpus.num_train_tokens < 4020
