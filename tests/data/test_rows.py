import json

import numpy as np
import pytest
import torch

from moestro.config import ChatConfig, DataConfig
from moestro.data.rows import prepare_chats
from moestro.errors import DataError


def write(tmp_path, texts):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "?", "completion": text}) for text in texts))
    return path


def settings(path, **changes):
    values = {"sources": (str(path),), "seq_len": 16, "held_out": 0.25, "chat": ChatConfig()}
    return DataConfig(**{**values, **changes})


TEXTS = ["a", "bc", "def", "ghijk", "lmnopqrstu", "vw", "xyz" * 9, "A", "BCD", "EFGHIJ", "K"]


def documents(rows_B3S):
    """(tokens, targets) of each document of rows."""
    found = []
    for tokens, targets, numbers in rows_B3S.tolist():
        for number in range(max(numbers) + 1):
            inside = [place for place, each in enumerate(numbers) if each == number]
            assert inside == list(range(inside[0], inside[-1] + 1))
            found.append(([tokens[p] for p in inside], [targets[p] for p in inside]))
    return found


def test_an_epoch_holds_each_document_once_with_its_labels(tmp_path):
    corpus = prepare_chats(settings(write(tmp_path, TEXTS)), tmp_path / "data")
    rows = corpus.windows_per_epoch
    first, second = (corpus.batch(epoch, rows) for epoch in range(2))
    held = corpus.held_out(10_000)["chats"].tokens_NS
    seen = documents(first)
    assert sorted(seen) == sorted(documents(second))
    assert not torch.equal(first, second)
    spelled = sorted(bytes(tokens) for tokens, _ in [*seen, *documents(held)])
    assert spelled == sorted((b"?" + text.encode() + b"\0")[:16] for text in TEXTS)
    for tokens, targets in seen:
        assert targets == [*tokens[1:], -100]
    assert corpus.num_labels == sum(len(tokens) - 1 for tokens, _ in seen)
    assert corpus.num_labels == (first[:, 1] >= 0).sum()
    (note,) = corpus.notes
    assert "1 of 11 documents" in note
    assert "13 tokens with 13 labels" in note
    # Packed without waste: no two rows would fit into one.
    room = sorted((first[:, 2] < 0).sum(1).tolist())
    filled = 16 - np.array(room)
    assert len(room) == 1 or filled[-1] + filled[-2] > 16


def test_the_bytes_of_a_label_are_those_of_its_text(tmp_path):
    """The end of a text is a byte of it here, and counted once."""
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", "def")))
    corpus = prepare_chats(settings(path), tmp_path / "data")
    assert corpus.held_out(100)["chats"].bytes_per_token == 1


def test_parts_of_ranks_are_the_batch_and_the_same_file_the_same_rows(tmp_path):
    cfg = settings(write(tmp_path, TEXTS), chat=ChatConfig(pack=False))
    corpus = prepare_chats(cfg, tmp_path / "data")
    assert corpus.windows_per_epoch == corpus.batch(0, 1).shape[0] * 8
    parts = [corpus.batch(3, 4, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), corpus.batch(3, 4))
    stamp = (tmp_path / "data" / "chats.safetensors").stat().st_mtime_ns
    again = prepare_chats(cfg, tmp_path / "data")
    assert (tmp_path / "data" / "chats.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(again.batch(5, 4), corpus.batch(5, 4))
    other = prepare_chats(settings(cfg.sources[0], seed=1), tmp_path / "other")
    assert other.fingerprint != corpus.fingerprint
    # A run that goes on keeps its text whatever became of the file.
    (tmp_path / "texts.jsonl").unlink()
    kept = prepare_chats(cfg, tmp_path / "data", corpus.fingerprint)
    assert kept.fingerprint == corpus.fingerprint


def test_equal_conversations_lie_on_one_side(tmp_path):
    corpus = prepare_chats(settings(write(tmp_path, ["a", "b", "c", "d"] * 5)), tmp_path / "data")
    train = {tuple(tokens) for tokens, _ in documents(corpus.batch(0, corpus.windows_per_epoch))}
    held = {tuple(tokens) for tokens, _ in documents(corpus.held_out(999)["chats"].tokens_NS)}
    assert len(train) == 3
    assert len(held) == 1
    assert not train & held


def test_where_a_label_is_beyond_the_row_the_row_is_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [("abcdef", "gh"), ("ijklmn", "op"), ("a", "b"), ("c", "d")]
    lines = [json.dumps({"prompt": prompt, "completion": end}) for prompt, end in texts]
    path.write_text("\n".join(lines[:2]))
    with pytest.raises(DataError) as raised:
        prepare_chats(settings(path, seq_len=4), tmp_path / "data")
    assert str(raised.value).startswith("0 different conversations")
    assert "2 of 2 documents have their first label after 4 tokens" in str(raised.value)
    assert "raise data.seq_len" in str(raised.value)
    path.write_text("\n".join(lines))
    corpus = prepare_chats(settings(path, seq_len=4), tmp_path / "data")
    assert "2 of 4 documents have their first label after 4 tokens" in corpus.notes[1]
    assert not any("have no label" in note for note in corpus.notes)


def test_texts_that_differ_beyond_the_row_are_equal(tmp_path):
    with pytest.raises(DataError, match=r"1 different .*2 of 2 documents are longer .*seq_len"):
        prepare_chats(settings(write(tmp_path, ["abcx", "abcy"]), seq_len=4), tmp_path / "data")


def test_too_little_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match="1 different conversations"):
        prepare_chats(settings(write(tmp_path, ["a", "a"])), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read"):
        prepare_chats(settings(write(tmp_path, ["a", "b"])), tmp_path / "data")
