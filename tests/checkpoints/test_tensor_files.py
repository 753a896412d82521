"""Safetensors files: every header checked, bytes straight into place, one tensor at a time."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moestro.checkpoints import tensor_files
from moestro.checkpoints.tensor_files import (
    Written,
    open_file,
    open_folder,
    write_folder,
)
from moestro.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.float8_e4m3fn]


def tensors_of_all_dtypes():
    shapes = [(3, 4), (7,), (), (2, 0, 3), (2, 3, 5)]
    return {
        f"{dtype}.{n}".removeprefix("torch."): torch.randint(0, 100, shape).to(dtype)
        for dtype in DTYPES
        for n, shape in enumerate(shapes)
    }


def written(tensors):
    return [
        Written(key, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for key, tensor in tensors.items()
    ]


def same(a, b):
    """Equal bytes; float8 has no torch.equal on every device."""
    flat = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards, and its tensors."""
    tensors = {f"layer.{n}": torch.randn(4, 8) for n in range(6)}
    write_folder(tmp_path, written(tensors), shard_bytes=2 * 4 * 8 * 4)
    return tmp_path, tensors


def change_index(folder, change):
    path = folder / tensor_files.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard_bytes", [1, 50, 10**9])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    tensors = tensors_of_all_dtypes()
    write_folder(tmp_path, written(tensors), shard_bytes)
    assert (tmp_path / tensor_files.SINGLE).is_file() is (shard_bytes == 10**9)
    stored = open_folder(tmp_path)
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert same(stored[key].load(), tensor), key


def test_the_library_reads_what_is_written(tmp_path):
    tensors = tensors_of_all_dtypes()
    write_folder(tmp_path, written(tensors), 10**9)
    theirs = load_file(tmp_path / tensor_files.SINGLE)
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[key], tensors[key]) for key in tensors)
    with safe_open(tmp_path / tensor_files.SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = tensors_of_all_dtypes()
    save_file(tensors, tmp_path / tensor_files.SINGLE)
    stored = open_folder(tmp_path)
    assert all(same(stored[key].load(), tensors[key]) for key in tensors)


def test_shards_are_filled_and_not_overfilled(sharded):
    folder, tensors = sharded
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((folder / tensor_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(len(load_file(folder / name)) == 2 for name in files)


def test_one_tensor_is_made_at_a_time(tmp_path):
    alive = []

    def make(n):
        alive.append(n)
        return torch.full((2,), float(n))

    lazy = [Written(str(n), torch.float32, (2,), lambda n=n: make(n)) for n in range(4)]
    assert not alive
    write_folder(tmp_path, lazy, 10**9)
    assert alive == [0, 1, 2, 3]


def test_into_a_slice_another_dtype_and_a_strided_place(sharded, monkeypatch):
    monkeypatch.setattr(tensor_files, "BUFFER_BYTES", 24)
    folder, tensors = sharded
    stored, expected = open_folder(folder)["layer.3"], tensors["layer.3"]
    slices = torch.zeros(3, 4, 8)
    stored.load_into(slices[1])
    assert torch.equal(slices[1], expected)
    assert not slices[0].any()
    assert not slices[2].any()
    narrow = torch.zeros(4, 8, dtype=torch.bfloat16)
    stored.load_into(narrow)
    assert torch.equal(narrow, expected.bfloat16())
    strided = torch.zeros(8, 4).T
    stored.load_into(strided)
    assert torch.equal(strided, expected)


def test_one_entry_of_the_first_axis(sharded):
    folder, tensors = sharded
    stored = open_folder(folder)["layer.4"]
    assert torch.equal(stored.entry(2).load(), tensors["layer.4"][2])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_truncated(sharded, share):
    folder, _ = sharded
    path = folder / "model-00002-of-00003.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors.*truncated"):
        open_folder(folder)


def test_truncated_after_the_headers_were_checked(sharded):
    folder, _ = sharded
    stored = open_folder(folder)["layer.3"]
    data = stored.file.read_bytes()
    stored.file.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match=r"00002.*ends inside layer\.3"):
        stored.load()


def test_missing_shard(sharded):
    folder, _ = sharded
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of.*missing.*layer\.2, layer\.3"):
        open_folder(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/a.safetensors", "a/b.safetensors", "a\\b", 7]
)
def test_an_index_that_leaves_the_folder(sharded, name):
    folder, _ = sharded
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "other.safetensors")
    change_index(folder, lambda index: index["weight_map"].update({"layer.0": name}))
    with pytest.raises(CheckpointError, match=r"layer\.0.*not in the folder"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.pop("weight_map"), "no weight_map"),
        (lambda i: i["weight_map"].clear(), "no weight_map"),
        (lambda i: i["weight_map"].update(a="x.bin"), "a into 'x.bin'; only safetensors"),
        (lambda i: i["weight_map"].update(a=".."), r"a into '\.\.'; only safetensors"),
        (lambda i: i["weight_map"].pop("layer.5"), r"00003.*holds layer\.5"),
        (
            lambda i: i["weight_map"].update({"new": "model-00001-of-00003.safetensors"}),
            "00001.*lacks new",
        ),
        (
            lambda i: i["weight_map"].update({"layer.5": "model-00001-of-00003.safetensors"}),
            r"00003.*holds layer\.5",
        ),
    ],
)
def test_an_index_that_lies(sharded, change, words):
    folder, _ = sharded
    change_index(folder, change)
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": {"a": "b", "a": "c"}}'])
def test_an_index_that_is_none(sharded, text):
    folder, _ = sharded
    (folder / tensor_files.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_folder(folder)


def test_a_key_in_two_files(sharded):
    folder, _ = sharded
    path = folder / "model-00003-of-00003.safetensors"
    save_file({**load_file(path), "layer.0": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"00003.*holds layer\.0"):
        open_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[3]),
        lambda header: header["a"].update(data_offsets=[0, 800]),
        lambda header: header["a"].update(data_offsets=[4, 12]),
        lambda header: header["a"].update(dtype="F64"),
        lambda header: header["a"].update(dtype="COMPLEX"),
        lambda header: header.update(b=header["a"]),
    ],
)
def test_a_header_that_lies(tmp_path, change):
    path = tmp_path / tensor_files.SINGLE
    save_file({"a": torch.zeros(2)}, path)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_folder(tmp_path)


def test_a_header_as_long_as_the_world(tmp_path):
    (tmp_path / tensor_files.SINGLE).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_folder(tmp_path)


def test_a_dtype_that_is_not_read(tmp_path):
    path = tmp_path / tensor_files.SINGLE
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, path)
    with pytest.raises(CheckpointError, match=r"a is C64"):
        open_file(path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model-1.bin"]
)
def test_pickle_is_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=rf"{name}.*pickle.*save_pretrained"):
        open_folder(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_folder(tmp_path)
