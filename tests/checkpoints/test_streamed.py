"""A packed file within a budget: the same bits, bounded reads, and errors that name the file."""

import errno
import fcntl
import gc
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.checkpoints import packed_files, streamed
from moestro.checkpoints.fingerprints import fingerprint
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.checkpoints.streamed import Within
from moestro.checkpoints.writing import save_model
from moestro.config import ModelConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.infer import decoding
from moestro.infer.engine import generate_batch
from moestro.infer.native_decoder import NativeDecoder
from moestro.infer.sampling import SamplingConfig
from moestro.kernels import native_cpu
from moestro.models import budget
from moestro.models.budget import Use
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

INT8, EXPERTS, LAYERS = WEIGHTS["int8"], 8, 3
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "dim": 64,
    "num_layers": LAYERS,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "context": 128},
    "moe": {
        "hidden_dim": 96,
        "num_experts": EXPERTS,
        "top_k": 3,
        "experts": {"bias": True},
        "shared": {"hidden_dim": 32},
    },
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model's file."""
    torch.manual_seed(0)
    model, path = Decoder(ModelConfig(**SIZES)).eval(), tmp_path_factory.mktemp("model") / "packed"
    pack(model, INT8)
    packed_files.save(model, path, INT8, {})
    return path


@pytest.fixture
def own(file: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    path = tmp_path / "packed"
    path.write_bytes(file.read_bytes())
    return path


def reads(model: Any) -> Any:
    residency = streamed.residency_of(model)
    assert residency is not None
    return residency.reads()


@pytest.mark.parametrize(
    ("kept", "threads"), [(1, 1), (2, 1), (4, 1), (6, 1), (EXPERTS, 1), (2, 2), (6, 2)]
)
def test_the_same_bits_at_every_budget(file: Path, kept: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mapped, model = packed_files.load(file), streamed.load(file, [kept] * LAYERS)
        tokens_BS = torch.randint(0, 256, (2, 40))
        assert torch.equal(model(tokens_BS).logits, mapped(tokens_BS).logits)
        decoders = [NativeDecoder(model), NativeDecoder(mapped)]
        pasts = [[each.model.new_cache(1) for _ in range(4)] for each in decoders]
        for tokens in (
            [[*range(50)], [1], [2, 3], [4]],
            [[1], [2], [3], [4]],
            [[9], [8], [7], [6]],
        ):
            ours, theirs = (d.step(tokens, past) for d, past in zip(decoders, pasts, strict=True))
            assert torch.equal(ours.logits_NV, theirs.logits_NV)
            assert torch.equal(ours.experts_LTK, theirs.experts_LTK)
        settings = [SamplingConfig(seed=3, max_tokens=12)]
        prompts = ["def f(x):", "a", "", "0123456789"]
        texts = [
            [piece.token for _, piece in generate_batch(each, ByteTokenizer(), prompts, settings)]
            for each in (model, mapped)
        ]
        assert texts[0] == texts[1]
    finally:
        torch.set_num_threads(before)


def test_a_prompt_reads_each_routed_expert_once_a_layer(file: Path) -> None:
    model = streamed.load(file, [2] * LAYERS)
    decoder = NativeDecoder(model)
    tokens = torch.randint(0, 256, (100,)).tolist()
    routed = decoder.step([tokens], [model.new_cache(1)]).experts_LTK
    wanted = sum(len(experts_TK.unique()) for experts_TK in routed)
    found = reads(model)
    assert (found.hits, found.misses) == (0, wanted)
    slab = streamed.sizes(file)[3][0].slab_bytes
    assert found.bytes == wanted * slab


def test_a_prompt_of_several_chunks_passes_in_one_where_the_budget_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, and each routed expert read once a layer."""
    monkeypatch.setattr(decoding, "CHUNK", 16)
    prompt, found = torch.randint(0, 256, (80,)).tolist(), []
    for more in (0, 64):

        def fit(needs: budget.Needs, memory: int, more: int = more) -> budget.Budget:
            return budget.Budget(
                memory, needs._replace(more=more - budget.CHUNK + 16), (2,) * LAYERS
            )

        monkeypatch.setattr(streamed, "fit", fit)
        model = streamed.load_within(file, Within(1 << 40, Use(128, prompt=80)))
        _, passed = decoding.decoding_of(model).begin(prompt)
        routed = layered(passed.routed().experts_TLK)  # of the last pass
        found.append((passed.logits_NV, reads(model).misses, len(routed)))
    (first, read, _), (second, once, routed) = found
    assert torch.equal(first, second)
    assert once == routed
    assert read > 2 * once


def layered(experts_TLK: torch.Tensor) -> list[tuple[int, int]]:
    """(layer, expert) of each choice."""
    return [
        (n, e) for n, layer in enumerate(experts_TLK.unbind(1)) for e in layer.unique().tolist()
    ]


def test_hits_are_those_of_the_simulated_cache(file: Path) -> None:
    """Decoding finds what `probe` says of a cache of each layer's last used experts."""
    model = streamed.load(file, [5] * LAYERS)
    decoder, past = NativeDecoder(model), model.new_cache(1)
    chosen = [decoder.step([[n % 256]], [past]).experts_LTK[:, 0] for n in range(0, 600, 7)]
    hits, kept = 0, [[] for _ in range(LAYERS)]
    for experts_LK in chosen:
        for held, experts_K in zip(kept, experts_LK.tolist(), strict=True):
            hits += len(set(held) & set(experts_K))
            held[:] = ([e for e in held if e not in experts_K] + experts_K[::-1])[-5:]
    assert reads(model).hits == hits
    assert reads(model).misses == len(chosen) * LAYERS * 3 - hits


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="there are no huge pages"
)
def test_experts_lie_on_huge_pages_where_the_system_has_them(file: Path) -> None:
    def asked_for() -> int:
        areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
        sizes = (
            int(re.findall(r"^Size: +(\d+) kB", each, re.MULTILINE)[-1]) for each in areas[:-1]
        )
        flags = (each.partition("\n")[0].split() for each in areas[1:])
        return sum(size << 10 for size, own in zip(sizes, flags, strict=True) if "hg" in own)

    gc.collect()
    _, _, dense, (first, *_) = streamed.sizes(file)
    before = asked_for()
    model = streamed.load(file, [3, 3, 2])
    assert asked_for() - before == dense + 8 * first.slab_bytes
    del model


@pytest.mark.parametrize("how", ["cut", "written", "failing"])
def test_a_file_that_breaks_is_an_error_and_nothing_else(own: Path, how: str) -> None:
    model, good = streamed.load(own, [1] * LAYERS), own.read_bytes()
    decoder, past = NativeDecoder(model), model.new_cache(1)
    decoder.step([[1, 2, 3]], [past])
    spare = None
    if how == "cut":
        os.truncate(own, len(good) // 2)
    elif how == "written":
        time.sleep(0.02)
        with own.open("r+b") as file:
            file.seek(len(good) - 9)
            file.write(b"x")
    else:
        fd = next(int(p.name) for p in Path("/proc/self/fd").iterdir() if same(p, own))
        spare, broken = os.dup(fd), os.open(own, os.O_WRONLY)
        os.dup2(broken, fd)
        os.close(broken)

    def write() -> None:
        for token in range(40):
            decoder.step([[token]], [past])

    with pytest.raises(CheckpointError, match=f"cannot read {own} at byte"):
        write()
    before = past.position
    with pytest.raises(CheckpointError, match=str(own)):
        model(torch.randint(0, 256, (2, 40)))
    assert past.position == before
    if spare is not None:  # the disk is well again
        os.dup2(spare, fd)
        os.close(spare)
        mapped = packed_files.load(own)
        tokens_BS = torch.randint(0, 256, (2, 40))
        assert torch.equal(model(tokens_BS).logits, mapped(tokens_BS).logits)


def same(link: Path, path: Path) -> bool:
    try:
        return os.path.samestat(link.stat(), path.stat())
    except OSError:
        return False


def test_a_file_that_is_removed_is_read_on(own: Path, file: Path) -> None:
    model = streamed.load(own, [1] * LAYERS)
    own.unlink()
    own.write_bytes(b"another file")
    tokens_BS = torch.randint(0, 256, (1, 30))
    assert torch.equal(model(tokens_BS).logits, packed_files.load(file)(tokens_BS).logits)


@pytest.mark.parametrize("moment", ["header", "weights"])
def test_a_file_that_is_replaced_while_it_opens_is_refused(
    own: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    place, name = (streamed, "checked") if moment == "header" else (streamed, "fill")
    real = getattr(place, name)

    def replaced(*given: Any) -> Any:
        other = own.with_name("other")
        other.write_bytes(own.read_bytes())
        other.replace(own)
        return real(*given)

    monkeypatch.setattr(place, name, replaced)
    with pytest.raises(CheckpointError, match=f"{own} was replaced or written to while"):
        streamed.load(own, [1] * LAYERS)


def test_a_reader_goes_on_where_another_has_just_given_up_direct_reads(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, real, refusals = streamed.open_direct(own), os.preadv, [errno.EINVAL]

    def refused(fd: int, pieces: Any, place: int) -> int:
        if not refusals:
            return real(fd, pieces, place)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        raise OSError(refusals.pop(), "refused")

    if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        os.close(fd)
        pytest.skip("the file system reads through its cache only")
    monkeypatch.setattr(os, "preadv", refused)
    try:
        with memoryview(bytearray(10)) as piece:
            assert streamed._read_once(fd, own, piece, 0) == 10
            assert bytes(piece) == own.read_bytes()[:10]
    finally:
        os.close(fd)


def test_a_child_made_by_fork_reads_by_itself(file: Path) -> None:
    model = streamed.load(file, [1] * LAYERS)
    tokens_BS = torch.randint(0, 256, (1, 9))
    logits = model(tokens_BS).logits
    child = os.fork()
    if not child:
        os._exit(not torch.equal(model(tokens_BS).logits, logits))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_checkpoint_is_packed_a_module_at_a_time(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        save_model(Decoder(ModelConfig(**SIZES)).eval(), folder)
    told: list[Any] = []
    within = Within(1 << 40, Use(), lambda *what: told.append(what))
    streamed_one = open_checkpoint(tmp_path / "run", weights="int8", within=within).model
    ((budget, path),) = told
    assert budget.kept == (EXPERTS,) * LAYERS
    assert packed_files.is_of(path, path.parent)
    packed, source = tmp_path / "whole", fingerprint(path.parent)
    whole = open_checkpoint(tmp_path / "run", weights="int8", packed=packed).model
    assert packed_files.load(packed, source).cfg == whole.cfg
    tokens_BS = torch.randint(0, 256, (2, 9))
    assert torch.equal(streamed_one(tokens_BS).logits, whole(tokens_BS).logits)
    assert np.array_equal(*(np.fromfile(each, np.uint8, 64) for each in (path, packed)))


def test_what_a_budget_cannot_do(tmp_path: Path, file: Path) -> None:
    with atomic_folder(tmp_path / "run/checkpoints/step-000001") as folder:
        save_model(Decoder(ModelConfig(**SIZES)).eval(), folder)
    with pytest.raises(ConfigError, match="needs packed weights"):
        open_checkpoint(tmp_path / "run", within=Within(1 << 40, Use()))
    with pytest.raises(ConfigError, match=r"too small.*give at least \d+MiB"):
        streamed.load_within(file, Within(1 << 20, Use()))
    with pytest.raises(CheckpointError, match="different checkpoint"):
        streamed.load_within(file, Within(1 << 40, Use()), {"a": "b"})
