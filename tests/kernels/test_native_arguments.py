"""Arguments that lie about their size: every public function over the native library refuses them.

All run in one child process, this file as a script, so that a crash is a failed test.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moestro.errors import ShapeError
from moestro.kernels import native_cpu, native_training, packing
from moestro.kernels.native_layers import StepDelta, StepLatent, StepLayer, StepShape
from moestro.kernels.native_step import StepDecoder, StepPast
from moestro.kernels.packing import ExpertSlabs, Format, PackedMatrix
from moestro.kernels.torch_grouped import Groups

INT8, BF16 = Format("int8"), torch.bfloat16
Case = tuple[str, Callable[[], Any]]
# What is no lie where native code is given a copy, or where a size is free.
COPIED = ("strided", "expanded")
# What torch itself refuses before it comes to a check, and what no caller with types gives.
TORCHS = ("RuntimeError", "AttributeError")
HUGE = (0, -1, 10**7, 2**62, 2**64 + 1)


def test_every_lie_is_refused(native: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} at {lines[-1:]}: {done.stderr[-3000:]}"
    assert len(lines) > 300
    assert [line for line in lines if not line.startswith(("refused", *TORCHS))] == []


def test_what_is_true_is_taken_whatever_the_defaults(native: Any) -> None:
    """Else refusing everything would pass; memory of 16 bits or on meta would be too small."""
    expected = {name: call() for name, call in true_calls()}
    calls, before = true_calls(), torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device("meta"):
            found = {name: call() for name, call in calls}
    finally:
        torch.set_default_dtype(before)
    for name, result in found.items():
        if isinstance(result, Tensor):
            torch.testing.assert_close(result, expected[name], rtol=0, atol=0, msg=name)


def tensors(good: Tensor, but: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Tensors, or things like one, that are not what `good` is."""
    freed = good.clone()
    freed.untyped_storage().resize_(0)
    wide = torch.zeros(*good.shape, 2, dtype=good.dtype)
    lies = {
        "shorter": good[..., :-1].contiguous(),
        "fewer": good[:-1],
        "one dimension more": good[None].clone(),
        "flat": good.reshape(-1)[:1],
        "a single number": good.reshape(-1)[0],
        "nothing": good[:0],
        "expanded": good.reshape(-1)[:1].clone().view([1] * good.dim()).expand(good.shape),
        "strided": wide[..., 0],
        "meta": good.to("meta"),
        "freed": freed,
        "complex": good.to(torch.complex64),
        "int16": good.to(torch.int16),
        "quantised": torch._empty_affine_quantized(
            good.shape, scale=1.0, zero_point=0, dtype=torch.quint8
        ),
        "sparse": good.to_sparse(),
        "a list": [1.0],
    }
    but = (*but, "flat") if good.shape == (1,) else but
    yield from ((name, lie) for name, lie in lies.items() if name not in but)


def matrices(good: PackedMatrix) -> Iterator[tuple[str, PackedMatrix]]:
    for field in ("rows", "columns"):
        yield from ((f"{field} {lie}", good._replace(**{field: lie})) for lie in HUGE)
    yield from ((f"data {name}", good._replace(data=lie)) for name, lie in tensors(good.data))
    yield "data at an odd byte", good._replace(data=native_cpu.aligned(good.data.numel() + 1)[1:])
    yield from ((str(format), good._replace(format=format)) for format in formats())


def formats() -> Iterator[Format]:
    yield from (Format(kind) for kind in ("int4", "float32", "bfloat16", "plain", "int3"))
    yield from (Format("int8", group) for group in (64, 0, -32, 2**40))


def experts(good: ExpertSlabs) -> Iterator[tuple[str, ExpertSlabs]]:
    for field in ("num_experts", "dim", "hidden_dim"):
        yield from ((f"{field} {lie}", good._replace(**{field: lie})) for lie in HUGE)
    free = (("down",) if good.up is not None else ("down", "data")) * (good.format.kind == "plain")
    for field in ("data", "up", "up_bias", "down_bias", "down"):
        if getattr(good, field) is not None:
            lies = tensors(getattr(good, field), ("expanded", "strided") if field in free else ())
            yield from ((f"{field} {name}", good._replace(**{field: lie})) for name, lie in lies)
    yield from ((lie, good._replace(activation=lie)) for lie in ("relu", "silu"))
    if good.format.kind == "plain":
        yield "no down", good._replace(down=None)
    else:
        yield from ((str(format), good._replace(format=format)) for format in formats())


def new_experts(count: int = 3, dim: int = 64, hidden: int = 160, **more: Any) -> ExpertSlabs:
    size = packing.slab_bytes(dim, hidden, "swiglu", INT8)
    data = native_cpu.aligned(count * size)
    for slab in data.view(count, size):
        up_HD, down_DF = torch.randn(2 * hidden, dim), torch.randn(dim, hidden)
        native_cpu.pack_expert(up_HD, down_DF, "swiglu", INT8, slab)
    return ExpertSlabs(data, count, dim, hidden, "swiglu", INT8, **more)


def each(function: Callable[..., Any], name: str, lies: Any, *others: Any, at: int = 0) -> Any:
    """One case for each lie in the place of argument `at`."""
    for what, lie in lies:
        arguments = [*others[:at], lie, *others[at:]]
        yield f"{name}: {what}", lambda arguments=arguments: function(*arguments)


def cpu_calls() -> Iterator[Case]:
    matrix = native_cpu.pack_matrix(torch.randn(96, 64), INT8)
    x_TI, bias_O = torch.randn(2, 64), torch.randn(96)
    biased = new_experts(up_bias=torch.randn(3, 320), down_bias=torch.randn(3, 64))
    plain = native_cpu.plain_experts(
        torch.randn(3, 320, 64), torch.randn(3, 64, 160), "swiglu", biased.up_bias, biased.down_bias
    )
    apart = plain._replace(data=plain.data[:, :160].clone(), up=plain.data[:, 160:].clone())
    free = (*COPIED, "fewer", "nothing")
    yield from each(native_cpu.linear, "linear", matrices(matrix), x_TI)
    yield from each(native_cpu.linear, "linear x", tensors(x_TI, free), matrix, at=1)
    yield from each(native_cpu.linear, "linear bias", tensors(bias_O), matrix, x_TI, at=2)
    yield from each(native_cpu.unpack_matrix, "unpack_matrix", matrices(matrix))
    yield from each(native_cpu.unpack_expert, "unpack_expert", experts(new_experts()), 1)
    wrong = ((str(n), n) for n in (-1, 3, 10**9, -(10**9)))
    yield from each(native_cpu.unpack_expert, "unpack_expert", wrong, biased, at=1)
    chosen = (torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), torch.ones(3))
    for name, packed in (("packed", biased), ("plain", plain), ("apart", apart)):
        yield from each(native_cpu.mixture, f"mixture, {name}", experts(packed), x_TI, *chosen)
    yield from each(native_cpu.mixture, "mixture x", tensors(x_TI, COPIED), biased, *chosen, at=1)
    for at in (2, 3, 4):
        rest = [biased, x_TI, *chosen]
        lies = tensors(rest.pop(at), (*COPIED, *(("int16",) if at == 4 else ())))
        yield from each(native_cpu.mixture, f"mixture argument {at}", lies, *rest, at=at)
    for name, lie in (("5", 5), ("-1", -1), ("2**62", 2**62)):
        for at in (2, 3):
            rest = [biased, x_TI, *chosen]
            lie_A = rest.pop(at).index_fill(0, torch.tensor([2]), lie)
            lies = [(f"an index of {name}", lie_A)]
            yield from each(native_cpu.mixture, f"mixture argument {at}", lies, *rest, at=at)
    lies = tensors(torch.randn(64, 64), ("shorter", "fewer", *COPIED))
    yield from each(native_cpu.pack_matrix, "pack_matrix", lies, INT8)
    yield from each(
        native_cpu.plain_matrix,
        "plain_matrix",
        tensors(torch.randn(64, 64), ("shorter", "fewer", *COPIED)),
    )
    lies = ((str(format), format) for format in formats() if format.kind in ("plain", "int3"))
    yield from each(native_cpu.pack_matrix, "pack_matrix", lies, torch.randn(64, 64), at=1)
    expert = [torch.randn(64, 64), torch.randn(64, 32), "swiglu", INT8]
    slab = native_cpu.aligned(packing.slab_bytes(64, 32, "swiglu", INT8))
    for at in (0, 1):
        rest = [*expert, slab]
        lies = tensors(rest.pop(at), COPIED)
        yield from each(native_cpu.pack_expert, f"pack_expert {at}", lies, *rest, at=at)
    yield from each(native_cpu.pack_expert, "pack_expert", tensors(slab), *expert, at=4)
    lies = [("at an odd byte", native_cpu.aligned(len(slab) + 1)[1:])]
    yield from each(native_cpu.pack_expert, "pack_expert", lies, *expert, at=4)
    some = (
        "shorter",
        "fewer",
        "one dimension more",
        "flat",
        "a single number",
        "nothing",
        "complex",
        "int16",
        "quantised",
    )
    yield from each(native_cpu.read, "read", tensors(torch.randn(64, 64), some))
    lies = [(f"{rows} × {columns}", (rows, columns)) for rows, columns in ((0, 1), (1, 0), (-1, 5))]
    yield from each(lambda size: packing.matrix_bytes(*size, INT8), "matrix_bytes", lies)
    yield from each(lambda size: packing.slab_bytes(*size, "relu", INT8), "slab_bytes", lies)


def new_layer(**changes: Any) -> StepLayer:
    """D 64, H 4, G 2, A 16."""
    layer = StepLayer(
        torch.ones(64), torch.ones(64), native_cpu.pack_matrix(torch.randn(64, 64), INT8),
        new_experts(), qkv=native_cpu.pack_matrix(torch.randn(128, 64), INT8),
        router=torch.randn(3, 64), qkv_bias=torch.randn(128), out_bias=torch.randn(64),
        q_norm=torch.ones(16), k_norm=torch.ones(16), sinks=torch.randn(4),
        logit_bias=torch.randn(3), selection_bias=torch.randn(3), shared=new_experts(1),
        shared_gate=torch.randn(64),
    )  # fmt: skip
    return layer._replace(**changes)


SHAPE = StepShape(dim=64, heads=4, groups=2, head_dim=16, vocab=96, top_k=2)


def new_decoder(layers: Any = None, shape: StepShape = SHAPE, **changes: Any) -> StepDecoder:
    head = native_cpu.pack_matrix(torch.randn(96, 64), INT8)
    given = {"norm": torch.ones(64), "head": head, "head_bias": torch.randn(96)} | changes
    return StepDecoder([new_layer()] if layers is None else layers, shape, **given)


def new_latent() -> StepLatent:
    """R 24, A' 16 (what turns of LATENT_SHAPE's 40), N 8, O 16, q_rank 32."""
    packed = [native_cpu.pack_matrix(torch.randn(*n), INT8) for n in ((96, 32), (40, 64), (32, 64))]
    plain = torch.ones(24), torch.randn(96, 24), 1e-6
    return StepLatent(8, 16, *packed[:2], *plain, packed[2], torch.ones(32))


def new_delta() -> StepDelta:
    """G 1, H 4, A 8, O 16, W 4: 80 channels."""
    packed, plain = native_cpu.pack_matrix(torch.randn(144, 64), INT8), (torch.ones(4),) * 2
    ba, conv = torch.randn(8, 64), torch.randn(4, 80)
    return StepDelta(1, 4, 8, 16, packed, ba, conv, *plain, torch.ones(16), 1e-6, 1e-6)


LATENT_SHAPE = SHAPE._replace(groups=1, head_dim=40, turning=16)
BARE = {"qkv": None, "qkv_bias": None, "q_norm": None, "k_norm": None, "sinks": None}


def other_lies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Layers that look back in other ways."""
    for field, new, shape in (("latent", new_latent, LATENT_SHAPE), ("delta", new_delta, SHAPE)):
        for name, value in new()._asdict().items():
            if isinstance(value, Tensor):
                lies: Any = tensors(value, ("fewer",) if name == "conv" else ())  # of any width
            elif isinstance(value, PackedMatrix):
                lies = [*matrices(value), ("none", None)] if name != "q_down" else matrices(value)
            elif isinstance(value, int):
                lies = [(str(lie), lie) for lie in (*HUGE, value * 2)]
            else:
                continue
            for what, lie in lies:
                layers = [new_layer(**BARE, **{field: new()._replace(**{name: lie})})]
                yield f"{field}, {name}: {what}", {"layers": layers, "shape": shape}
        both = [new_layer(**{field: new()})]
        yield f"qkv and {field}", {"layers": both, "shape": shape}


def decoder_lies() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from other_lies()
    good = new_layer()
    for field, value in good._asdict().items():
        if isinstance(value, Tensor):
            lies: Any = tensors(value)
        elif isinstance(value, PackedMatrix):
            lies = [
                *matrices(value),
                ("another", native_cpu.pack_matrix(torch.randn(32, 64), INT8)),
            ]
        elif value is None:
            continue
        elif isinstance(value, ExpertSlabs):
            lies = [*experts(value), ("narrower", new_experts(value.num_experts, 32))]
        else:
            lies = [("-1", -1)]
        yield from (
            (f"{field}: {name}", {"layers": [good._replace(**{field: lie})]}) for name, lie in lies
        )
    for field in ("attention_norm", "ffn_norm", "qkv", "out", "experts"):
        yield f"no {field}", {"layers": [good._replace(**{field: None})]}
    yield "three experts without a router", {"layers": [good._replace(router=None)]}
    yield "two shared experts", {"layers": [good._replace(shared=new_experts(2))]}
    yield "no layers", {"layers": []}
    for field in ("dim", "heads", "groups", "head_dim", "vocab", "top_k"):
        for lie in (*HUGE, getattr(SHAPE, field) * 2, 3 if field != "top_k" else 4):
            yield f"{field} {lie}", {"shape": SHAPE._replace(**{field: lie})}
    for name, lie in tensors(torch.ones(64)):
        yield f"norm {name}", {"norm": lie}
    for name, lie in tensors(torch.ones(96)):
        yield f"head_bias {name}", {"head_bias": lie}
    for name, lie in matrices(native_cpu.pack_matrix(torch.randn(96, 64), INT8)):
        yield f"head {name}", {"head": lie}
    for dtype in (torch.float16, torch.int64):
        yield f"a cache of {dtype}", {"cache_dtype": dtype}


def new_past(decoder: StepDecoder) -> StepPast:
    """Three positions of keys and values in room for eight."""
    past, layers = StepPast(decoder), decoder.past_kind.layers
    for layer, kinds in enumerate(layers):
        buffers = [torch.ones([n or 8 for n in size], dtype=dtype) for size, dtype in kinds]
        past.put(layer, tuple(buffers), 3, 3)
    return past


def step_calls() -> Iterator[Case]:
    yield from each(lambda changes: new_decoder(**changes), "StepDecoder", decoder_lies())
    decoder, turn = new_decoder(), torch.ones(1, 8)
    inputs = [torch.randn(1, 64), turn, turn]
    for at in range(3):
        rest = [*inputs, [new_past(decoder)]]
        lies = tensors(rest.pop(at), COPIED)
        yield from each(decoder.step, f"step {at}", lies, *rest, at=at)
    others = {
        "of more layers": new_decoder([new_layer()] * 2),
        "of bytes": new_decoder(cache_dtype=torch.int8),
        "of fewer groups": new_decoder(
            [new_layer(qkv=native_cpu.pack_matrix(torch.randn(96, 64), INT8), qkv_bias=None)],
            SHAPE._replace(groups=1),
        ),
    }
    pasts = [(name, [new_past(other)]) for name, other in others.items()]
    past = new_past(decoder)
    pasts += [("none", []), ("two for one token", [past, new_past(decoder)])]
    pasts += [("of no layer yet", [StepPast(decoder)])]
    yield from each(decoder.step, "step, pasts", pasts, *inputs, at=3)
    twice = [torch.cat([each_, each_]) for each_ in inputs]
    yield from each(decoder.step, "step, pasts", [("the same twice", [past, past])], *twice, at=3)
    keys = torch.randn(1, 2, 8, 16)
    for at in (0, 1):
        pairs = [
            (name, (lie, keys) if at == 0 else (keys, lie))
            for name, lie in tensors(keys, ("freed",))
        ]
        yield from each(past.put, f"put {at}", pairs, 0, 3, 3, at=1)
    for layer in (-1, 1):
        yield f"put layer {layer}", lambda n=layer: past.put(n, (keys, keys.clone()), 3, 3)
    for place, kept in ((8, 3), (-1, 0), (3, 4), (3, -1), (2**62, 1), (3, 2**62)):

        def step_there(place=place, kept=kept):
            there = new_past(decoder)
            there.put(0, there.buffers[0], place, kept)
            return decoder.step(*inputs, [there])

        yield f"step at {place} after {kept}", step_there


def training_calls() -> Iterator[Case]:
    x_RD, up_EHD = torch.randn(7, 64).to(BF16), torch.randn(2, 128, 64)
    down_EDF, offsets_E = torch.randn(2, 64, 64), torch.tensor([4, 7])
    groups = Groups(offsets_E, None)
    ffn = [x_RD, up_EHD, down_EDF, offsets_E, "swiglu", torch.tensor([1, 0])]
    for at in (0, 1, 2, 3, 5):
        rest = list(ffn)
        free = COPIED + (("fewer", "nothing", "freed") if at == 0 else ("freed",))
        if at in (3, 5):
            free = (*COPIED, "freed", "int16")
        lies = tensors(rest.pop(at), free)
        yield from each(native_training.expert_ffn, f"expert_ffn {at}", lies, *rest, at=at)
    lies = tensors(x_RD, (*COPIED, "fewer", "nothing", "shorter"))
    yield from each(native_training.weight_grad, "weight_grad", lies, x_RD, groups, BF16)
    lies = tensors(up_EHD, COPIED)
    yield from each(native_training.mm, "mm", lies, x_RD, groups, False, at=1)
    lies = [(f"{given}", Groups(torch.tensor(given), None)) for given in ([7], [1, 2, 3], [[4, 7]])]
    yield from each(native_training.mm, "mm", lies, x_RD, up_EHD, False, at=2)


def true_calls() -> list[Case]:
    """One call of each function that is refused nothing; the same numbers every time."""
    torch.manual_seed(0)
    matrix, packed = native_cpu.pack_matrix(torch.randn(96, 64), INT8), new_experts()
    x_TI, one, bias_O = torch.randn(2, 64), torch.zeros(1, dtype=torch.int64), torch.randn(96)
    slab = native_cpu.aligned(packing.slab_bytes(64, 32, "swiglu", INT8))
    expert = (torch.randn(64, 64), torch.randn(64, 32), "swiglu", INT8, slab)
    w_OI, ones, few_TI = torch.randn(5, 4), torch.ones(1), x_TI[:1].expand(5, 64)
    odd = native_cpu.plain_matrix(torch.randn(129).bfloat16()[1:].view(2, 64))
    decoder, turn = new_decoder(), torch.ones(1, 8)
    past = new_past(decoder)
    return [
        ("linear", lambda: native_cpu.linear(matrix, x_TI, bias_O)),
        ("linear, expanded rows", lambda: native_cpu.linear(matrix, few_TI)),
        ("linear, plain weights at half a word", lambda: native_cpu.linear(odd, x_TI)),
        ("unpack_matrix", lambda: native_cpu.unpack_matrix(matrix)),
        ("pack_matrix", lambda: native_cpu.pack_matrix(w_OI, INT8).data),
        ("unpack_expert", lambda: native_cpu.unpack_expert(packed, 2)[1]),
        ("mixture", lambda: native_cpu.mixture(packed, x_TI, one, one, ones)),
        ("plain_matrix", lambda: native_cpu.plain_matrix(w_OI).data),
        ("read", lambda: native_cpu.read(w_OI)),
        ("pack_expert", lambda: native_cpu.pack_expert(*expert)),
        ("step", lambda: decoder.step(x_TI[:1], turn, turn, [past])[0]),
    ]


def main() -> None:
    for calls in (cpu_calls, step_calls, training_calls):
        for name, call in calls():
            print(name, end=": ", file=sys.stderr, flush=True)
            try:
                call()
                print("TAKEN", name, flush=True)
            except ShapeError as error:
                print(f"refused {name}: {error}", flush=True)
            except Exception as error:
                print(f"{type(error).__name__} {name}: {error}", flush=True)


if __name__ == "__main__":
    main()
