"""Packed files with altered headers: refused in one sentence, or used without harm.

All run in one child process, this file as a script, so that a crash is a failed test.
"""

import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.checkpoints import packed_files
from moestro.checkpoints.packed_header import MAGIC
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.config import ModelConfig
from moestro.errors import CheckpointError, MoestroError
from moestro.infer.engine import stream
from moestro.infer.sampling import SamplingConfig
from moestro.kernels import native_cpu
from moestro.models.decoder import Decoder
from moestro.text import ByteTokenizer

pytestmark = pytest.mark.skipif(
    native_cpu.available() is not None, reason=str(native_cpu.available())
)

START = len(MAGIC) + 8
HEADS = {"num_heads": 4, "num_kv_heads": 2, "context": 16}
LATENT = {"kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "mixture": {
        "attention": {**HEADS, "bias": "all", "sinks": True, "qk_norm": "head"},
        "moe": {
            "hidden_dim": 24,
            "num_experts": 8,
            "experts": {"bias": True},
            "shared": {"hidden_dim": 8, "gate": True},
            "router": {"kind": "sigmoid", "selection_bias": True, "bias": True},
        },
        "head": {"tied": False, "bias": True},
    },
    "latent": {"attention": {"num_heads": 2, "context": 16, "latent": LATENT}},
}
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**62, 2**64 + 1, 10**400, -0.5, 1e308, "", "x", "float64",
    "quint8", "int4", [], [1], [[-1]], {}, {"x": 1}, "relu", 4096, -4096,
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_altered_headers_are_refused_or_harmless(name: str, tmp_path: Path) -> None:
    """A sample of each field's alterations, of several at once, and of the bytes themselves."""
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(tmp_path), name, "150", "100"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} after {lines[-1:]}: {done.stderr[-3000:]}"
    kinds = [line.split(":")[0] for line in lines]
    assert len(lines) > 300
    assert kinds.count("refused") > 200
    assert [line for line in lines if not line.startswith(("refused:", "used:"))] == []


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a header."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from fields(inner, (*path, key))


def altered(header: dict[str, Any], path: tuple[Any, ...], change: Any) -> dict[str, Any]:
    header = copy.deepcopy(header)
    parent = header
    for key in path[:-1]:
        parent = parent[key]
    if change == "delete":
        del parent[path[-1]]
    elif isinstance(change, float) and type(parent[path[-1]]) is int and change in (0.5, 2.0):
        number = parent[path[-1]]  # which another change may have made longer than a float
        parent[path[-1]] = number // 2 if change == 0.5 else number * 2
    else:
        parent[path[-1]] = change
    return header


def headers(good: dict[str, Any], single: int, several: int) -> Iterator[tuple[str, bytes]]:
    """Altered headers: `single` fields, sampled from each part alike; `several` by pairs."""
    draw = random.Random(0)
    places = list(fields(good))
    changes = (*ODD, "delete", 0.5, 2.0)

    def one() -> tuple[Any, ...]:
        part = draw.choice(list(good))
        return draw.choice([path for path in places if path[0] == part])

    for _ in range(single):
        path, change = one(), draw.choice(changes)
        yield f"{path} {str(change)[:30]}", json.dumps(altered(good, path, change)).encode()
    for _ in range(several):
        header, what = good, ""
        for _ in range(draw.randint(2, 4)):
            path, change = one(), draw.choice(changes)
            try:
                header = altered(header, path, change)
                what += f"{path} {str(change)[:30]} "
            except (KeyError, IndexError, TypeError):
                continue
        yield what, json.dumps(header).encode()
    text = bytearray(json.dumps(good).encode())
    for _ in range(several):
        at = draw.randrange(len(text))
        yield f"byte {at}", bytes(text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :])
    yield "nested", b'{"version":' + b"[" * 100_000
    yield "digits", b'{"version":' + b"9" * 5000 + b"}"


def risky(good: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """What once made native code read or write elsewhere: for each tensor, its place and form."""
    for name, place in good["tensors"].items():
        size = place["shape"]
        for field, lies in (
            ("offset", (place["offset"] + 4096, place["offset"] + 64, 2**40, -4096)),
            ("shape", ([1], [], [*size, 1], [size[0] * 2, *size[1:]], [-size[0], *size[1:]])),
            ("dtype", ("quint8", "float64", "uint8", "complex64", "bits8", "Tensor")),
        ):
            for lie in lies:
                if lie != place[field]:
                    text = json.dumps(altered(good, ("tensors", name, field), lie)).encode()
                    yield f"{name} {field} {lie}", text


def made(folder: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """A packed model's header and body."""
    torch.manual_seed(0)
    moe = {"hidden_dim": 24, "num_experts": 4}
    settings = {"vocab_size": 256, "dim": 32, "num_layers": 2, "moe": moe, **MODELS[name]}
    model = Decoder(ModelConfig(**settings)).eval()
    pack(model, WEIGHTS["int8"])
    packed_files.save(model, folder / "good", WEIGHTS["int8"], {})
    raw = (folder / "good").read_bytes()
    size = int.from_bytes(raw[len(MAGIC) : START], "little")
    return json.loads(raw[START : START + size]), raw[-(-(START + size) // 4096) * 4096 :]


def main(folder: Path, name: str, single: int, several: int) -> None:
    good, body = made(folder, name)
    path, sampling = folder / "altered", SamplingConfig(max_tokens=3, temperature=0.0)
    for what, text in (*risky(good), *headers(good, single, several)):
        start = MAGIC + len(text).to_bytes(8, "little") + text
        path.write_bytes(start.ljust(-(-len(start) // 4096) * 4096, b"\0") + body)
        print(what, end=": ", file=sys.stderr, flush=True)
        try:
            model = packed_files.load(path)
            try:
                list(stream(model, ByteTokenizer(), "Hello", sampling))
                outcome = "used:"
            except MoestroError as error:
                outcome = f"used: {error}"
        except CheckpointError as error:
            outcome = f"refused: {error}"
            if "\n" in outcome or len(outcome) > 700:
                outcome = f"not one sentence: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        print(f"{outcome} ({what})".replace("\n", " "), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
