import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.checkpoints import packed_files
from moestro.checkpoints.fingerprints import fingerprint
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.packed_header import MAGIC
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.config import EncDecConfig, ModelConfig
from moestro.errors import CheckpointError
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

INT4 = WEIGHTS["int4"]
SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "dim": 32,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 16, "bias": "all", "sinks": True},
    "moe": {
        "hidden_dim": 24,
        "num_experts": 4,
        "experts": {"bias": True},
        "shared": {"hidden_dim": 8, "gate": True},
        "router": {"kind": "sigmoid", "selection_bias": True},
    },
}
SOURCE = {"model.safetensors": "sum"}


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    model = Decoder(ModelConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.any():
                tensor.uniform_(-0.3, 0.3)
    model.to(dtype)
    pack(model, INT4)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A packed model's file."""
    path = tmp_path / "model.moestro"
    packed_files.save(model_of(), path, INT4, SOURCE)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_mapped_is_what_was_saved(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = model_of(dtype, head={"tied": tied, "bias": True}), tmp_path / "new" / "file"
    packed_files.save(model, path, INT4, SOURCE)
    mapped = packed_files.load(path, SOURCE)
    tokens_BS = torch.randint(0, 70, (2, 9))
    assert torch.equal(mapped(tokens_BS).logits, model(tokens_BS).logits)
    assert mapped.cfg == model.cfg
    assert not mapped.training
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_encoder_decoder(tmp_path: Path) -> None:
    cfg = EncDecConfig(vocab_size=70, dim=32, encoder_layers=1, decoder_layers=1)
    model = EncDec(cfg).eval()
    pack(model, INT4)
    packed_files.save(model, tmp_path / "file", INT4, SOURCE)
    mapped = packed_files.load(tmp_path / "file")
    source, target = torch.randint(0, 70, (1, 6)), torch.randint(0, 70, (1, 5))
    assert torch.equal(mapped(source, target).logits, model(source, target).logits)


def test_every_tensor_is_on_a_page_of_its_own(saved: Path) -> None:
    raw = saved.read_bytes()
    start = len(MAGIC) + 8
    length = int.from_bytes(raw[start - 8 : start], "little")
    header = json.loads(raw[start : start + length])
    assert len(raw) % 4096 == 0
    assert {place["offset"] % 4096 for place in header["tensors"].values()} == {0}
    mapped = packed_files.load(saved)
    assert mapped.blocks[0].ffn.experts.weights.data.data_ptr() % 4096 == 0
    assert header["weights"] == {"kind": "int4", "group": 32}


def test_a_write_stays_in_the_process(saved: Path) -> None:
    before = saved.read_bytes()
    mapped = packed_files.load(saved)
    with torch.no_grad():
        mapped.norm.weight.zero_()
    assert saved.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 10, 25, 200, 5000, -4096, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    whole = keep == -1  # the padding of the last page is not missed
    if whole:
        packed_files.load(saved, SOURCE)
        return
    with pytest.raises(CheckpointError, match=r"truncated|not a packed model"):
        packed_files.load(saved, SOURCE)


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    start = len(MAGIC) + 8
    length = int.from_bytes(raw[start - 8 : start], "little")
    header: dict[str, Any] = json.loads(raw[start : start + length])
    return header


def rewrite(path: Path, **changes: Any) -> None:
    """Change the header, and nothing else."""
    raw = path.read_bytes()
    start = len(MAGIC) + 8
    length = int.from_bytes(raw[start - 8 : start], "little")
    header = json.loads(raw[start : start + length]) | changes
    text = json.dumps(header).encode()
    begin, new = (-(-(start + size) // 4096) * 4096 for size in (length, len(text)))
    path.write_bytes(
        (MAGIC + len(text).to_bytes(8, "little") + text).ljust(new, b"\0") + raw[begin:]
    )


@pytest.mark.parametrize("field", ["version", "layout"])
def test_another_version_is_refused(saved: Path, field: str) -> None:
    rewrite(saved, **{field: 99})
    with pytest.raises(CheckpointError, match=r"another version of moestro.*99"):
        packed_files.load(saved)


def test_another_checkpoint_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a different checkpoint.*remove the file"):
        packed_files.load(saved, {"model.safetensors": "other"})


def test_a_header_that_does_not_fit_its_settings_is_refused(saved: Path) -> None:
    """What the kernels would read beyond the end of."""
    cfg = packed_files.load(saved).cfg.model_dump(mode="json")
    for changes in ({"vocab_size": 7000}, {"num_layers": 3}, {"dim": "x"}):
        rewrite(saved, model=cfg | changes)
        with pytest.raises(CheckpointError, match="does not fit together"):
            packed_files.load(saved)
    for nothing in ({"tensors": {}}, {"packed": {}}, {"model": None}, {"tensors": 3}):
        path = saved.with_name("again")
        packed_files.save(model_of(), path, INT4, SOURCE)
        rewrite(path, **nothing)
        with pytest.raises(CheckpointError, match="does not fit together"):
            packed_files.load(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("head", {"rows": 71}),
        ("head", {"kind": "int8"}),
        ("head", {"group": 0}),
        ("head", {"kind": "plain"}),
        ("blocks.0.ffn.experts", {"experts": 5}),
        ("blocks.0.ffn.experts", {"hidden_dim": 40}),
        ("blocks.1.ffn.experts", {"activation": "relu"}),
        ("blocks.1.ffn.shared", {"rows": 32, "columns": 32}),
    ],
)
def test_packed_bytes_that_the_kernels_would_overrun_are_refused(
    saved: Path, name: str, changes: dict[str, Any]
) -> None:
    packed = header_of(saved)["packed"]
    rewrite(saved, packed=packed | {name: packed[name] | changes})
    with pytest.raises(CheckpointError, match="does not fit together"):
        packed_files.load(saved)


@pytest.mark.parametrize(
    "name", ["head.packed", "head.bias_O", "blocks.0.ffn.experts.packed", "norm.weight"]
)
def test_fewer_bytes_than_a_tensor_has_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    packed_files.save(model_of(head={"bias": True}), path, INT4, SOURCE)
    tensors = header_of(path)["tensors"]
    shape = [tensors[name]["shape"][0] // 2]
    rewrite(path, tensors=tensors | {name: tensors[name] | {"shape": shape}})
    with pytest.raises(CheckpointError, match="does not fit together"):
        packed_files.load(path)


def test_other_files_are_no_packed_models(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a packed model"):
        packed_files.load(tmp_path / "text")
    with pytest.raises(CheckpointError, match="cannot read"):
        packed_files.load(tmp_path / "missing")


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_files, "_write", full)
    with pytest.raises(OSError, match="No space"):
        packed_files.save(model_of(), saved, INT4, SOURCE)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("ours", [True, False])
def test_the_fingerprint_sees_other_weights(ours: bool, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> Path:
        torch.manual_seed(seed)
        moe = {"hidden_dim": 24, "num_experts": 4}
        model = Decoder(ModelConfig(vocab_size=70, dim=32, num_layers=2, moe=moe))
        folder = tmp_path / name
        if not ours:
            write_pretrained(model, folder, family="mixtral")
            return folder
        with atomic_folder(folder) as inner:
            save_model(model, inner)
        return folder

    first, same, other = written("a", 0), written("b", 0), written("c", 1)
    assert fingerprint(first) == fingerprint(same)
    assert fingerprint(first) != fingerprint(other)
    if not ours:  # weights put into a folder whose manifest nobody compares
        (first / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
        assert fingerprint(first) != fingerprint(same)
    assert packed_files.default_path(first, INT4).parent == first


@pytest.mark.parametrize("room", [True, False])
def test_a_file_is_read_ahead_only_if_it_fits(
    room: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Map(mmap.mmap):
        def madvise(self, *what: int) -> None:
            asked.append(what)
            super().madvise(*what)

    monkeypatch.setattr(mmap, "mmap", Map)
    size = saved.stat().st_size
    monkeypatch.setattr(packed_files, "free_bytes", lambda: size if room else size - 1)
    packed_files.load(saved)
    assert asked == ([(mmap.MADV_WILLNEED,)] if room else [])
