"""The header is read from a file that nobody vouches for: every number in it is hostile here."""

import random
import resource
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from moestro.checkpoints.gguf import header as header_module
from moestro.checkpoints.gguf.header import KINDS, read, read_parts
from moestro.errors import CheckpointError


def write(path: Path, **fields: Any) -> Path:
    """A small good file of three tensors."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", "c"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 1])
    writer.add_bool("llama.on", True)
    for key, value in fields.items():
        writer.add_uint32(key, value)
    writer.add_tensor("one.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    blocks = np.zeros((4, 34), np.uint8)
    writer.add_tensor("two.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("three.bias", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_good_file(tmp_path: Path) -> None:
    header = read(write(tmp_path / "a.gguf"))
    assert header.architecture == "llama"
    assert header.get(".block_count") == 2
    assert header.get("tokenizer.ggml.tokens") == ["a", "bé", "c"]
    assert header.get("tokenizer.ggml.token_type").tolist() == [1, 3, 1]
    assert header.get(".on") is True
    assert header.get(".missing", 5) == 5
    one, two, three = header.tensors
    assert (one.name, one.shape, one.kind.name, one.bytes) == ("one.weight", (2, 32), "F32", 256)
    assert (two.name, two.shape, two.kind.name, two.bytes) == ("two.weight", (4, 32), "Q8_0", 136)
    assert (three.name, three.shape) == ("three.bias", (5,))
    raw = header.file.read_bytes()
    assert np.frombuffer(raw, "<f4", 64, one.offset).tolist() == list(range(64))
    assert np.frombuffer(raw, "<f4", 5, three.offset).tolist() == [1] * 5


def test_texts_are_skipped_where_nobody_wants_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    whole, short = read(path), read(path, texts=False)
    assert short.tensors == whole.tensors
    assert short.get("tokenizer.ggml.tokens") == []
    assert short.get(".block_count") == 2
    assert short.get("tokenizer.ggml.token_type").tolist() == [1, 3, 1]


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("size", [1, 7, 8, 30, 64])
def test_a_header_is_read_in_pieces(
    size: int, texts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is cut by their ends, and the same file cut off anywhere is refused."""
    path = write(tmp_path / "a.gguf")
    wanted = read(path, texts)
    monkeypatch.setattr(header_module, "_PIECE_BYTES", size)
    found = read(path, texts)
    numbers = "tokenizer.ggml.token_type"
    assert found.tensors == wanted.tensors
    assert found.fields.pop(numbers).tolist() == wanted.fields.pop(numbers).tolist()
    assert found.fields == wanted.fields
    short, raw = tmp_path / "short.gguf", path.read_bytes()
    for length in range(0, wanted.tensors[0].offset, 5):
        short.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read(short, texts)


def test_kinds_are_those_of_the_library() -> None:
    from gguf import GGML_QUANT_SIZES

    theirs = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    for kind in KINDS.values():
        assert theirs[kind.number] == (kind.length, kind.bytes), kind
        assert GGMLQuantizationType(kind.number).name == kind.name


@pytest.mark.parametrize(
    ("at", "raw", "why"),
    [
        (0, b"GGML", "not GGUF"),
        (4, struct.pack(">I", 3), "big-endian"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack("<I", 4), "version 4"),
        (8, struct.pack("<Q", 1 << 60), "tensors"),
        (16, struct.pack("<Q", 1 << 60), "fields"),
        (24, struct.pack("<Q", 1 << 63), "name of"),
    ],
)
def test_wrong_beginnings(at: int, raw: bytes, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    good = path.read_bytes()
    path.write_bytes(good[:at] + raw + good[at + len(raw) :])
    with pytest.raises(CheckpointError, match=why):
        read(path)


def changed(path: Path, old: bytes, new: bytes) -> Path:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    return path


def tensor_info(name: bytes, *shape: int, kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (tensor_info(b"two.weight", 32, 4, kind=8, offset=0), "overlap"),
        (tensor_info(b"two.weight", 32, 4, kind=8, offset=1 << 40), "bytes"),
        (tensor_info(b"two.weight", 32, 4, kind=8, offset=257), "bytes"),
        (tensor_info(b"two.weight", 31, 4, kind=8, offset=256), "in Q8_0"),
        (tensor_info(b"two.weight", 32, 1 << 62, kind=8, offset=256), "in Q8_0"),
        (tensor_info(b"two.weight", 32, 0, kind=8, offset=256), "in Q8_0"),
        (tensor_info(b"two.weight", 32, 4, kind=99, offset=256), "kind 99"),
        (tensor_info(b"one.weight", 32, 4, kind=8, offset=256), "one name"),
    ],
)
def test_wrong_tensors(new: bytes, why: str, tmp_path: Path) -> None:
    old = tensor_info(b"two.weight", 32, 4, kind=8, offset=256)
    with pytest.raises(CheckpointError, match=why):
        read(changed(write(tmp_path / "a.gguf"), old, new))


def test_alignment(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", **{"general.alignment": 3})
    with pytest.raises(CheckpointError, match="alignment is 3"):
        read(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    raw = path.read_bytes()
    end = read(path).tensors[-1]
    for size in range(end.offset + end.bytes):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            read(path)


def test_mutated_files_cost_no_more_memory_than_they_have_bytes(tmp_path: Path) -> None:
    """The slow test beside this one does the same 100,000 times."""
    mutate(tmp_path, 3_000)


@pytest.mark.slow
def test_many_mutated_files(tmp_path: Path) -> None:
    mutate(tmp_path, 100_000)


def mutate(folder: Path, times: int) -> None:
    path = write(folder / "a.gguf")
    good, rng = path.read_bytes(), random.Random(0)
    header_bytes = read(path).tensors[0].offset
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(times):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(header_bytes)
            if rng.random() < 0.5:
                raw[at] = rng.randrange(256)
            else:
                number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 1 << 40))
                raw[at : at + 8] = struct.pack("<Q", number)
        with path.open("r+b") as file:  # of the same length: sooner than a new file
            file.write(raw)
        try:
            read(path)
        except CheckpointError:
            continue
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 1024  # KiB


def parts(folder: Path, *names: str, said: Any = 2) -> Path:
    """A model in files of one tensor each; the first."""
    for number, name in enumerate(names, 1):
        path = folder / f"m-{number:05d}-of-{len(names):05d}.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.count", len(names))
        add = writer.add_array if isinstance(said, list) else writer.add_int32
        add("split.tensors.count", said)
        writer.add_tensor(name, np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / f"m-00001-of-{len(names):05d}.gguf"


def test_parts(tmp_path: Path) -> None:
    first = parts(tmp_path, "t1.weight", "t2.weight")
    found = read_parts(tmp_path / "m-00002-of-00002.gguf")
    assert [info.name for part in found for info in part.tensors] == ["t1.weight", "t2.weight"]
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"m-00001-of-00002\.gguf is missing"):
        read_parts(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match="one of 2 files"):
        read_parts(tmp_path / "other.gguf")


def test_tensors_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hold t\.weight twice"):
        read_parts(parts(tmp_path, "t.weight", "t.weight"))


def test_very_many_tensors_in_two_files_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are compared no more than a few times each."""
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    header, times = read(write(tmp_path / "a.gguf")), 1000
    infos = [header.tensors[0]._replace(name=Name(f"t{each}")) for each in range(times)]
    headers = [replace(header, tensors=tuple(infos)), replace(header, tensors=tuple(infos))]
    monkeypatch.setattr(header_module, "read", lambda path, texts: headers.pop())
    with pytest.raises(CheckpointError, match="hold t0 twice"):
        read_parts(parts(tmp_path, "a", "b"))
    assert compared < 10 * times


@pytest.mark.parametrize("said", [3, [2, 2], ["2"]])
def test_a_wrong_count_of_tensors(said: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hold 2 of .* tensors"):
        read_parts(parts(tmp_path, "t1.weight", "t2.weight", said=said))


def test_a_count_of_parts_that_is_no_number(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("split.count", "many")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [part.tensors for part in read_parts(tmp_path / "a.gguf")] == [()]
