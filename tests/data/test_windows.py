"""Token files and batches: purity, order, splits, reuse, and what is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.config import DataConfig
from moestro.data import tokenfiles, windows
from moestro.data.windows import Corpus, prepare
from moestro.errors import DataError

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


@pytest.fixture(scope="module")
def corpus(sources: Path, tmp_path_factory) -> Corpus:
    return prepare(config(sources), tmp_path_factory.mktemp("prepared") / "data")


def epoch_of(corpus: Corpus, epoch: int) -> torch.Tensor:
    size = corpus.windows_per_epoch
    return corpus.batch(epoch, size)


def test_what_a_corpus_tells(corpus: Corpus) -> None:
    assert corpus.domains == ("a", "b")
    assert corpus.seq_len == SEQ
    assert corpus.tokenizer.name == "bytes"
    assert set(corpus.domain_tokens) == {"a", "b"}
    assert corpus.num_train_tokens == sum(corpus.domain_tokens.values())
    assert corpus.notes == ()


def test_batch_is_windows_of_int64(corpus: Corpus) -> None:
    batch = corpus.batch(0, 4)
    assert batch.shape == (4, SEQ + 1)
    assert batch.dtype == torch.int64
    assert 0 <= int(batch.min()) <= int(batch.max()) < 256


def test_batch_is_pure(corpus: Corpus, sources: Path, tmp_path: Path) -> None:
    steps = [0, 3, 100, 1, 3, 57, 0]
    first = [corpus.batch(step, 6).clone() for step in steps]
    fresh = prepare(config(sources), tmp_path / "elsewhere")
    for step, batch in zip(reversed(steps), reversed(first), strict=True):
        batch_again = fresh.batch(step, 6)
        assert torch.equal(batch, batch_again)
        batch_again.zero_()  # what a caller does to it stays with the caller
    assert fresh.fingerprint == corpus.fingerprint
    assert torch.equal(Corpus(tmp_path / "elsewhere").batch(57, 6), first[5])


@settings(deadline=None)
@given(
    step=st.integers(0, 200),
    rows=st.integers(1, 5),
    world=st.integers(1, 4),
    parts=st.integers(1, 4),
)
def test_ranks_and_micro_batches_are_slices(
    corpus: Corpus, step: int, rows: int, world: int, parts: int
) -> None:
    size = rows * world * parts
    whole = corpus.batch(step, size)
    ranks = [corpus.batch(step, size, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(ranks), whole)
    micro = [corpus.batch(step * parts + part, size // parts) for part in range(parts)]
    assert torch.equal(torch.cat(micro), whole)


def test_an_epoch_predicts_each_token_once(corpus: Corpus) -> None:
    """All but the first token and a rest shorter than a window, in a new order each epoch."""
    seen = []
    for epoch in range(3):
        windows = epoch_of(corpus, epoch)
        text = corpus.tokenizer.decode(windows[:, 1:].flatten().tolist())
        assert len(text) > corpus.num_train_tokens - SEQ - 1
        seen.append(windows)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    counts = [np.bincount(windows[:, 1:].flatten().numpy(), minlength=256) for windows in seen]
    assert np.abs(counts[0] - counts[1]).sum() <= 2 * (SEQ + 1)


def test_every_length_of_stream(tmp_path: Path) -> None:
    """One document has one order, but its windows are dealt anew each epoch."""
    for length in range(200, 200 + 2 * SEQ):  # half of it is held out
        (tmp_path / "t.txt").write_text("".join(chr(33 + n % 90) for n in range(length)))
        corpus = prepare(config(tmp_path / "t.txt"), tmp_path / "data")
        assert 0 <= corpus.num_train_tokens - 1 - corpus.windows_per_epoch * SEQ < SEQ
        first, second = epoch_of(corpus, 0).tolist(), epoch_of(corpus, 1).tolist()
        assert sorted(first) == sorted(second)
        assert len({tuple(row) for row in first}) == corpus.windows_per_epoch
    assert first != second


def test_windows_are_cut_from_whole_documents(corpus: Corpus) -> None:
    """Text between two ends of documents inside windows is a document, and never a held-out one."""
    known = set(documents("a", 60) + documents("b", 40))
    neighbours = []
    for epoch in range(2):
        following = {}
        for window in epoch_of(corpus, epoch).tolist():
            following[tuple(window[:3])] = window
            pieces = corpus.tokenizer.decode(window).split("\0")
            for piece in pieces:
                assert any(piece in text for text in known)
            if len(pieces) == 2:
                neighbours.append((epoch, pieces[0][-4:], pieces[1][:4]))
    first = {pair[1:] for pair in neighbours if pair[0] == 0}
    second = {pair[1:] for pair in neighbours if pair[0] == 1}
    assert len(first & second) < len(first) / 2  # documents meet other neighbours


def test_another_seed_is_another_order_and_split(sources: Path, corpus, tmp_path: Path) -> None:
    other = prepare(config(sources, seed=1), tmp_path / "data")
    assert other.fingerprint != corpus.fingerprint
    assert not torch.equal(other.batch(0, 8), corpus.batch(0, 8))


def test_order_does_not_come_from_the_file_system(tmp_path: Path) -> None:
    made = []
    for order in (1, -1):
        root = tmp_path / str(order) / "texts"
        root.mkdir(parents=True)
        for number, text in list(enumerate(documents("x", 20)))[::order]:
            (root / f"{number}.txt").write_text(text)
        made.append(prepare(config(root, domains="none"), tmp_path / str(order) / "data"))
    assert made[0].fingerprint == made[1].fingerprint
    assert torch.equal(made[0].batch(5, 8), made[1].batch(5, 8))


def test_held_out_windows(corpus: Corpus) -> None:
    found = corpus.held_out(10 * SEQ)
    assert list(found) == ["a", "b"]
    train = " ".join(corpus.tokenizer.decode(row) for row in epoch_of(corpus, 0).tolist())
    for domain, held in found.items():
        assert held.tokens_NS.shape == (5, SEQ + 1)
        assert held.tokens_NS.dtype == torch.int64
        assert held.bytes_per_token == 1.0
        assert corpus.tokenizer.decode(held.tokens_NS[0].tolist()).startswith(domain)
        other = {"a": "b", "b": "a"}[domain]
        for row in held.tokens_NS.tolist():
            text = corpus.tokenizer.decode(row)
            assert other not in text
            assert text not in train
    again = corpus.held_out(10 * SEQ)
    assert all(torch.equal(again[name].tokens_NS, found[name].tokens_NS) for name in found)


@pytest.mark.parametrize("most", [1, 10_000_000])
def test_held_out_has_one_window_at_least_and_all_at_most(corpus: Corpus, most: int) -> None:
    for held in corpus.held_out(most).values():
        rows = {tuple(row) for row in held.tokens_NS.tolist()}
        assert len(rows) == len(held.tokens_NS)
        assert (len(rows) == 1) == (most == 1)


def test_a_file_of_tokenizer(sources: Path, tmp_path: Path) -> None:
    first = prepare(config(sources, tokenizer="bpe:300"), tmp_path / "one")
    path = tmp_path / "one" / "tokenizer.json"
    second = prepare(config(sources, tokenizer=str(path)), tmp_path / "two")
    assert second.tokenizer.name == "file"
    assert torch.equal(first.batch(3, 4), second.batch(3, 4))


def test_builtin(tmp_path: Path) -> None:
    cfg = DataConfig(domain_bytes=200_000)
    corpus = prepare(cfg, tmp_path / "data")
    assert corpus.domains == ("arithmetic", "code", "english")
    assert all(100_000 < count < 200_000 for count in corpus.domain_tokens.values())
    assert all(len(held.tokens_NS) >= 8 for held in corpus.held_out(65_536).values())


def test_reuse_and_rebuild(tmp_path: Path) -> None:
    source, folder = tmp_path / "t.txt", tmp_path / "run" / "data"
    source.write_text("\0".join(documents("t", 30)))
    first = prepare(config(source), folder)

    def stamp() -> int:
        return (folder / "train.bin").stat().st_ino

    made = stamp()
    assert prepare(config(source), folder).fingerprint == first.fingerprint
    assert stamp() == made
    os.utime(source, ns=(1, 1))  # touched: written again, and the same
    assert prepare(config(source), folder).fingerprint == first.fingerprint
    assert stamp() != made
    assert prepare(config(source, seq_len=8), folder).seq_len == 8
    changed = prepare(config(source, seed=4), folder)
    assert changed.fingerprint != first.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "train_ends.bin", "meta.json"])
@pytest.mark.parametrize("missing", [True, False])
def test_damaged_folders_are_not_used(
    sources: Path, tmp_path: Path, name: str, missing: bool
) -> None:
    folder = tmp_path / "data"
    batch = prepare(config(sources), folder).batch(2, 4)
    path = folder / name
    if missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"not a complete data folder.*again"):
        Corpus(folder)
    if name == "meta.json" and missing:
        with pytest.raises(DataError, match="something other than prepared text"):
            prepare(config(sources), folder)
    else:
        assert torch.equal(prepare(config(sources), folder).batch(2, 4), batch)


KILLED = """
import os, signal, sys
from pathlib import Path
from moestro.config import DataConfig
from moestro.data import tokenfiles, windows
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
setattr({module}, {name!r}, die)
windows.prepare(DataConfig(sources=(sys.argv[1],), seq_len=16, held_out=0.2), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("module", "name"), [("tokenfiles", "_check_length"), ("windows", "_publish")]
)
def test_a_killed_prepare_leaves_nothing_that_counts(
    sources: Path, corpus: Corpus, tmp_path: Path, module: str, name: str
) -> None:
    folder = tmp_path / "data"
    code = KILLED.format(module=module, name=name)
    command = [sys.executable, "-c", code, str(sources), str(folder)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert prepare(config(sources), folder).fingerprint == corpus.fingerprint
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_rebuild_keeps_the_old_folder(tmp_path: Path) -> None:
    source, folder = tmp_path / "t.txt", tmp_path / "data"
    source.write_text("\0".join(documents("t", 30)))
    prepare(config(source), folder)
    source.write_text("short")
    with pytest.raises(DataError, match="one context needs 17"):
        prepare(config(source), folder)
    assert Corpus(folder).windows_per_epoch > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "t.txt"]


def test_another_process_that_was_faster_wins(sources: Path, tmp_path: Path, monkeypatch) -> None:
    folder, build = tmp_path / "data", windows.write_token_files

    def slow(cfg: DataConfig, temporary: Path) -> tokenfiles.TokenFiles:
        monkeypatch.undo()
        elsewhere = prepare(cfg, tmp_path / "fast")
        assert elsewhere.notes == ()
        (tmp_path / "fast").rename(folder)
        return build(cfg, temporary)

    monkeypatch.setattr(windows, "write_token_files", slow)
    assert prepare(config(sources), folder).batch(0, 2).shape == (2, SEQ + 1)
    assert list(tmp_path.iterdir()) == [folder]


def test_bad_tokenizer_is_told_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a whole number"):
        prepare(DataConfig(sources=("missing",), tokenizer="bpe:abc"), tmp_path / "data")


def test_unwritable_folders(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*Not a directory.*can be written"):
        prepare(config(sources), tmp_path / "file" / "data")
    with pytest.raises(DataError, match="something other than prepared text"):
        prepare(config(sources), tmp_path / "file")


def test_a_full_disk(sources: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(windows, "write_token_files", full)
    with pytest.raises(DataError, match=r"No space left on device.*has room"):
        prepare(config(sources), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_a_foreign_one_left(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    prepare(config(sources), tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="left alone"):
        prepare(config(sources), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0, 2), r"batch of 5 does not split over 2"),
        ((-1, 4), "step counts from 0"),
        ((0, 0), "batch_size from 1"),
        ((0, 4, 2, 2), "rank from 0"),
    ],
)
def test_bad_batches(corpus: Corpus, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        corpus.batch(*arguments)
