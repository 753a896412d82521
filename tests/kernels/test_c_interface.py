"""The ctypes declarations are those of native/moestro.h: every function, structure and number."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from moestro.kernels import (
    native_cpu,
    native_layers,
    native_library,
    native_step,
    packing,
    residency,
)
from moestro.kernels.addresses import ROWS

HEADER = (Path(__file__).parents[2] / "native" / "moestro.h").read_text()
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
STRUCTURES = {
    "moestro_matrix": native_library.CMatrix,
    "moestro_steps": native_library.CSteps,
    "moestro_experts": native_library.CExperts,
    "moestro_groups": native_library.CGroups,
    "moestro_slabs": residency._Slabs,
    "moestro_reads": residency._Reads,
    "moestro_latent": native_layers.CLatent,
    "moestro_delta": native_layers.CDelta,
    "moestro_layer": native_layers.CLayer,
    "moestro_decoder": native_step._Decoder,
    "moestro_past": native_step._Past,
}
NUMBERS = {
    "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}  # fmt: skip


def kind_of(declared: str, stars: int) -> type:
    """The ctypes kind of a C type without its name: `const float *` is a pointer."""
    if stars:
        return ctypes.c_void_p
    plain = declared.replace("const", "").strip()
    return NUMBERS[plain] if plain in NUMBERS else STRUCTURES[plain]


def structures() -> dict[str, list[tuple[str, type]]]:
    found = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", CODE, re.DOTALL):
        fields: list[tuple[str, type]] = []
        for line in body.split(";"):
            if not line.strip():
                continue
            declared = re.match(r"\s*((?:const )?\w+)\s*(.*)", line, re.DOTALL)
            for each in declared[2].split(","):
                field = re.search(r"(\w+)\s*$", each)[1]
                fields.append((field, kind_of(declared[1], each.count("*"))))
        found[name] = fields
    return found


def functions() -> dict[str, tuple[type, tuple[type, ...]]]:
    found = {}
    for result, name, inside in re.findall(r"MOESTRO_API (\w+) (\w+)\((.*?)\);", CODE, re.DOTALL):
        arguments = [] if inside.strip() == "void" else inside.split(",")
        kinds = (kind_of(re.match(r"\s*((?:const )?\w+)", a)[1], a.count("*")) for a in arguments)
        found[name] = (NUMBERS[result], tuple(kinds))
    return found


def test_every_function_is_declared_as_the_header_has_it():
    assert functions() == native_library._SIGNATURES


@pytest.mark.parametrize("name", structures())
def test_every_structure_has_the_headers_fields(name):
    assert list(STRUCTURES[name]._fields_) == structures()[name]


def test_no_structure_is_left_out():
    assert STRUCTURES.keys() == structures().keys()


def test_numbers():
    assert re.search(r"#define MOESTRO_ABI (\d+)", CODE)[1] == str(native_library.ABI)
    enums = dict(re.findall(r"(MOESTRO_\w+) = (-?\d+)", CODE))
    paths = [f"MOESTRO_{name.upper().replace('-', '_')}" for name in native_library.PATHS]
    assert [int(enums[path]) for path in paths] == list(range(len(paths)))
    names = {"bfloat16": "BF16", "float32": "F32", "plain": "PLAIN_BF16"}
    kinds = [f"MOESTRO_{names.get(kind, kind.upper())}" for kind in packing.KINDS]
    assert [int(enums[kind]) for kind in kinds] == list(range(len(kinds)))
    assert int(enums["MOESTRO_PLAIN_F32"]) == len(kinds)
    short = {f"{cut}_swiglu": cut.upper() for cut in ("clamped", "limited", "capped")}
    activations = [f"MOESTRO_{short.get(a, a.upper())}" for a in native_cpu.ACTIVATIONS]
    assert [int(enums[each]) for each in activations] == list(range(len(activations)))
    dtypes = [f"MOESTRO_ROWS_{'F32' if d is torch.float32 else 'BF16'}" for d in ROWS]
    assert [int(enums[dtype]) for dtype in dtypes] == list(ROWS.values())
