"""Training by native bf16 products: close to the definition, and the same bits whatever is beside.

Odd shapes, other activations and biases: see BACKENDS in test_torch_grouped.py.
"""

import copy
import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moestro.config import MoEConfig
from moestro.errors import BackendError, ShapeError
from moestro.kernels import backends, native_library, native_training, reference, torch_grouped
from moestro.kernels.backends import Work
from moestro.kernels.native_library import PATH_VARIABLE, PATHS, CGroups
from moestro.moe.layer import MoE

BF16, FP32 = torch.bfloat16, torch.float32
WIDTHS = (64, 192, 96)  # D, 2F, F


@pytest.fixture(autouse=True, params=["avx512", "amx"])
def path(request, native, monkeypatch):
    """Each path that trains and that this machine has."""
    monkeypatch.setenv(PATH_VARIABLE, request.param)
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    reason = native_training.reason_against("cpu", BF16, ())
    if reason is not None:
        pytest.skip(reason)
    return request.param


def make_case(counts, tail=0, weight_dtype=FP32, dim=64, hidden=96):
    """(x, up, down), gradient of y, offsets; the tail must not be read."""
    rows, num_experts = sum(counts) + tail, len(counts)
    x_RD, grad_RD = (torch.randn(rows, dim).to(BF16) for _ in range(2))
    for rows_RD in (x_RD, grad_RD):
        rows_RD[rows - tail :] = float("nan")
    up_EHD = (torch.randn(num_experts, 2 * hidden, dim) / dim**0.5).to(weight_dtype)
    down_EDF = (torch.randn(num_experts, dim, hidden) / hidden**0.5).to(weight_dtype)
    return [x_RD, up_EHD, down_EDF], grad_RD, torch.tensor(counts).cumsum(0)


def run(ffn, inputs, grad_RD, offsets_E, experts_E=None):
    """Output and gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y_RD = ffn(*leaves, offsets_E, "swiglu", experts_E)
    y_RD.backward(grad_RD)
    return [y_RD.detach(), *(leaf.grad for leaf in leaves)]


def native(*args):
    return run(native_training.expert_ffn, *args)


def by_definition(inputs, grad_RD, offsets_E, experts_E=None):
    """In float64, from the weights rounded to bf16."""
    end = int(offsets_E[-1])
    exact = [tensor.to(BF16).double() for tensor in inputs]
    y_RD, *grads = run(
        reference.expert_ffn, [exact[0][:end], *exact[1:]], grad_RD[:end].double(), offsets_E,
        experts_E,
    )  # fmt: skip
    grown = [torch.cat([z, z.new_zeros(len(grad_RD) - end, z.shape[1])]) for z in (y_RD, grads[0])]
    return [grown[0], grown[1], *grads[1:]]


def assert_close(actual, expected, dtypes):
    """Hidden rows, their gradient and activation are rounded to bf16 (4e-3) between the ends."""
    for tensor, exact, dtype in zip(actual, expected, dtypes, strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == exact.shape
        assert tensor.isfinite().all()
        if exact.numel():
            error = (tensor.double() - exact).abs().max().item()
            assert error <= 2e-2 * max(exact.abs().max().item(), 1e-3)
            assert (tensor.double() - exact).norm() <= 6e-3 * exact.norm() + 1e-6


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("weight_dtype", [FP32, BF16])
@pytest.mark.parametrize("counts", [(0, 0), (1,), (0, 7, 0), (63, 0, 64, 65), (300, 17, 1, 32)])
@pytest.mark.parametrize("tail", [0, 3])
def test_equals_the_definition(counts, tail, weight_dtype):
    case = make_case(counts, tail, weight_dtype)
    dtypes = (BF16, BF16, weight_dtype, weight_dtype)
    for order in (None, torch.randperm(len(counts))):
        actual = native(*case, order)
        assert_close(actual, by_definition(*case, order), dtypes)
        end = sum(counts)
        assert not actual[0][end:].any()
        assert not actual[1][end:].any()
        owners = range(len(counts)) if order is None else order.tolist()
        for expert, count in zip(owners, counts, strict=True):
            assert bool(count) == bool(actual[2][expert].any()) == bool(actual[3][expert].any())


@given(
    counts=st.lists(st.sampled_from([0, 1, 7, 16, 33, 70]), min_size=1, max_size=4),
    dim=st.integers(1, 10),
    hidden=st.integers(1, 10),
    tail=st.integers(0, 2),
    weight_dtype=st.sampled_from([FP32, BF16]),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(counts, dim, hidden, tail, weight_dtype):
    """Widths on both sides of the 256 columns of a piece, and of each other."""
    case = make_case(counts, tail, weight_dtype, 32 * dim, 32 * hidden)
    assert_close(native(*case), by_definition(*case), (BF16, BF16, weight_dtype, weight_dtype))


def test_more_experts_than_are_packed_at_once():
    """16 MiB hold 42 of these."""
    case = make_case([2] * 90, dim=256, hidden=256)
    together = native(*case)
    for expert in (0, 41, 42, 89):
        rows = slice(2 * expert, 2 * expert + 2)
        (x_RD, up_EHD, down_EDF), grad_RD, _ = case
        alone = native(
            [x_RD[rows], up_EHD[expert : expert + 1], down_EDF[expert : expert + 1]],
            grad_RD[rows],
            torch.tensor([2]),
        )
        assert_same_bits(alone[:2], [tensor[rows] for tensor in together[:2]])
        assert_same_bits(alone[2:], [tensor[expert : expert + 1] for tensor in together[2:]])


def test_a_row_does_not_depend_on_its_company():
    (x_RD, *weights), grad_RD, _ = make_case([300])
    y_RD, grad_x_RD, *_ = native([x_RD, *weights], grad_RD, torch.tensor([300]))
    for first, last in ((0, 1), (3, 10), (290, 300), (17, 100)):
        some = slice(first, last)
        alone = native([x_RD[some], *weights], grad_RD[some], torch.tensor([last - first]))
        assert_same_bits(alone[:2], (y_RD[some], grad_x_RD[some]))


@pytest.mark.parametrize("own", [True, False], ids=["own", "torch's"])
def test_any_number_of_threads_gives_the_same_bits(native_threads, own):
    case = make_case([300, 0, 70, 5, 1], 2)
    expected = native(*case)
    for threads in (1, 2, 3):
        native_threads(threads, own)
        for _ in range(3):
            assert_same_bits(native(*case), expected)


@pytest.fixture
def native_threads(native):
    before = native.moestro_threads()

    def use(threads, own):
        team = None if own else native_library._team()
        assert native.moestro_use_threads(threads, team) == 0

    yield use
    native.moestro_use_threads(before, native_library._team())


def test_without_gradients_the_same_output():
    inputs, grad_RD, offsets_E = make_case([40, 0, 7], 1)
    expected = native(inputs, grad_RD, offsets_E)[0]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_same_bits([native_training.expert_ffn(*inputs, offsets_E, "swiglu")], [expected])


def test_extreme_gates():
    """Where e^-x leaves fp32, and NaN: nothing is hidden."""
    gates_R = torch.tensor([-1e30, -200.0, -88.0, -10.0, 0.0, 10.0, 88.0, 200.0, 1e30])
    x_RD = torch.zeros(len(gates_R), 32)
    x_RD[:, 0], x_RD[:, 1] = gates_R, 1
    up_EHD, down_EDF = torch.zeros(1, 64, 32), torch.zeros(1, 32, 32)
    up_EHD[0, 0, 0] = up_EHD[0, 32, 1] = down_EDF[0, 0, 0] = 1
    inputs = [x_RD.to(BF16), up_EHD, down_EDF]
    case = (inputs, torch.ones(len(gates_R), 32).to(BF16), torch.tensor([len(gates_R)]))
    for actual, exact in zip(native(*case)[:2], by_definition(*case)[:2], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-2, atol=1e-30)
    inputs[0][3, 0] = float("nan")
    y_RD, grad_x_RD, *_ = native(*case)
    assert y_RD.isnan().any(1).tolist() == [row == 3 for row in range(len(gates_R))]
    assert grad_x_RD[3].isnan().any()


def test_what_is_kept_for_the_backward():
    (x_RD, up_EHD, down_EDF), _, offsets_E = make_case([100, 28])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        weights = (up_EHD.requires_grad_(), down_EDF.requires_grad_())
        native_training.expert_ffn(x_RD, *weights, offsets_E, "swiglu")
    rows = [tensor.shape for tensor in kept if tensor.dtype == BF16]
    assert rows == [(128, 64), (128, 192)]


def test_checkpointing_gives_the_same_gradients():
    inputs, grad_RD, offsets_E = make_case([40, 0, 7])
    expected = native(inputs, grad_RD, offsets_E)
    for reentrant in (True, False):
        again = run(
            lambda *args, reentrant=reentrant: checkpoint(
                native_training.expert_ffn, *args, use_reentrant=reentrant
            ),
            inputs, grad_RD, offsets_E,
        )  # fmt: skip
        assert_same_bits(again, expected)


def test_double_backward_is_refused_rather_than_wrong():
    (x_RD, up_EHD, down_EDF), grad_RD, offsets_E = make_case([5, 3])
    leaf_RD = x_RD.clone().requires_grad_()
    y_RD = native_training.expert_ffn(leaf_RD, up_EHD, down_EDF, offsets_E, "swiglu")
    (grad,) = torch.autograd.grad(y_RD, leaf_RD, grad_RD.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()


def test_a_layer_under_autocast_with_fp32_weights():
    """As the trainer runs it: chosen by itself, and close to the layer in fp32."""
    cfg = MoEConfig(dim=32, hidden_dim=64, num_experts=4, top_k=2)
    layer, slow = MoE(cfg), MoE(cfg, "reference")
    slow.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert backends.choose("auto", Work("cpu", BF16, (32, 128, 64))).name == "native"
    assert backends.choose("auto", Work("cpu", FP32, (32, 128, 64))).name == "segments"
    x_BSD = torch.randn(3, 50, 32)
    results = []
    for each in (layer, slow):
        leaf = x_BSD.clone().requires_grad_()
        with torch.autocast("cpu", dtype=BF16, enabled=each is layer):
            y, _ = each(leaf)
        y.float().square().sum().backward()
        weights = (each.experts.gate_up, each.experts.down)
        assert all(weight.grad.dtype == FP32 for weight in weights)
        results.append([y.float(), leaf.grad, *(weight.grad for weight in weights)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 2e-2 * expected.norm()


def test_weights_of_other_dtypes_are_rounded_and_get_their_gradients():
    inputs, grad_RD, offsets_E = make_case([40, 0, 7])
    for up_dtype, down_dtype in ((torch.float64, torch.float64), (BF16, FP32)):
        mixed = [inputs[0], inputs[1].to(up_dtype), inputs[2].to(down_dtype)]
        actual = native(mixed, grad_RD, offsets_E)
        expected = by_definition(mixed, grad_RD, offsets_E)
        assert_close(actual, expected, (BF16, BF16, up_dtype, down_dtype))


def test_who_gets_it():
    assert backends.choose("auto", Work("cpu", BF16, WIDTHS)).name == "native"
    for dtype in (torch.float16, FP32, torch.float64):
        assert backends.choose("auto", Work("cpu", dtype, WIDTHS)).name == "segments"
        with pytest.raises(BackendError, match=f"'native'.*bfloat16 only, not {dtype}"):
            backends.choose("native", Work("cpu", dtype, WIDTHS))
    assert backends.choose("auto", Work("cpu", BF16, (64, 80, 40))).name == "segments"
    with pytest.raises(BackendError, match=r"multiples of 32; given \[80, 40\]"):
        backends.choose("native", Work("cpu", BF16, (64, 80, 40)))
    with pytest.raises(BackendError, match="for the CPU, not cuda"):
        backends.choose("native", Work("cuda", BF16, WIDTHS))


def test_a_lower_path_leaves_training_to_torch(native, path, monkeypatch):
    case = make_case([5])
    for lower in PATHS[: PATHS.index("avx512")]:
        monkeypatch.setenv(PATH_VARIABLE, lower)
        if native.moestro_use_path(PATHS.index(lower)):
            continue  # AVX2 with VNNI, which not every processor with AVX-512 has
        assert backends.choose("auto", Work("cpu", BF16, WIDTHS)).name == "segments"
        with pytest.raises(BackendError, match=f"needs bf16 products.*{lower}"):
            backends.choose("native", Work("cpu", BF16, WIDTHS))
        with pytest.raises(BackendError, match="without bf16 products"):
            native_training.expert_ffn(*case[0], case[2], "swiglu")
    monkeypatch.setenv(PATH_VARIABLE, "sse9")
    assert backends.choose("auto", Work("cpu", BF16, WIDTHS)).name == "segments"
    monkeypatch.setenv(PATH_VARIABLE, path)
    assert backends.choose("auto", Work("cpu", BF16, WIDTHS)).name == "native"


def test_without_the_library_training_goes_to_torch(monkeypatch):
    monkeypatch.setattr(native_library, "_load", lambda: "it was not built")
    assert backends.choose("auto", Work("cpu", BF16, WIDTHS)).name == "segments"
    with pytest.raises(BackendError, match="it was not built"):
        backends.choose("native", Work("cpu", BF16, WIDTHS))


def test_what_does_not_fit_is_refused():
    (x_RD, up_EHD, down_EDF), _, offsets_E = make_case([4, 3])
    ffn, mm = native_training.expert_ffn, native_training.NATIVE.grouped_mm
    with pytest.raises(ShapeError, match=r"rows must be bfloat16.*given float32"):
        ffn(x_RD.float(), up_EHD, down_EDF, offsets_E, "swiglu")
    with pytest.raises(ShapeError, match=r"\[any, 64\].*\[7, 32\]"):
        ffn(x_RD[:, :32], up_EHD, down_EDF, offsets_E, "swiglu")
    with pytest.raises(ShapeError, match=r"up must be .*\[2, 192, 64\].*\[2, 128, 64\]"):
        ffn(x_RD, up_EHD[:, :128], down_EDF, offsets_E, "swiglu")
    with pytest.raises(ShapeError, match=r"offsets must be .*\[2\].*\[1\]"):
        ffn(x_RD, up_EHD, down_EDF, offsets_E[:1], "swiglu")
    with pytest.raises(ShapeError, match="multiples of 32"):
        mm(x_RD[:, :40], up_EHD[:, :, :40], offsets_E)
    for wrong in ([4, 3], [-1, 7], [4, 8]):
        with pytest.raises(ShapeError, match="neither fall nor pass"):
            ffn(x_RD, up_EHD, down_EDF, torch.tensor(wrong), "swiglu")
    for order in ([0, 0], [0, 2], [-1, 0]):
        with pytest.raises(ShapeError, match="exactly one group"):
            ffn(x_RD, up_EHD, down_EDF, offsets_E, "swiglu", torch.tensor(order))


def test_the_c_functions_refuse_null_and_unknown_dtypes(native):
    ends, place = (ctypes.c_int64 * 1)(4), torch.zeros(64, 64).data_ptr()
    given = ctypes.byref(CGroups(ctypes.addressof(ends), None, 1, 4))
    assert native.moestro_grouped(given, 0, place, 32, 32, 0, None, place) == -1
    assert native.moestro_grouped(None, 0, place, 32, 32, 0, place, place) == -1
    assert native.moestro_grouped(given, 2, place, 32, 32, 0, place, place) == -1
    assert native.moestro_grouped_grad(given, 0, 32, 32, place, place, None) == -1
    assert native.moestro_ffn(given, 0, None, place, 32, 32, place, place, place) == -1
    assert native.moestro_ffn(given, 0, place, place, 32, 0, place, place, place) == -1
    assert native.moestro_ffn_back(given, 0, place, place, 32, 32, place, None, *[place] * 3) == -1


def test_the_products_alone_equal_the_definition():
    (x_RD, up_EHD, _), _, offsets_E = make_case([40, 0, 23], 2)
    grad_RH = torch.randn(len(x_RD), up_EHD.shape[1]).to(BF16)
    groups = torch_grouped.Groups(offsets_E, None)
    end = int(offsets_E[-1])
    up = up_EHD.to(BF16).double()
    y_RH = native_training.mm(x_RD, up_EHD, groups, False)[:end].double()
    expected = reference.grouped_mm(x_RD[:end].double(), up, offsets_E)
    torch.testing.assert_close(y_RH, expected, rtol=4e-3, atol=1e-5)
    grad_RD = native_training.mm(grad_RH, up_EHD, groups, True)[:end].double()
    expected = reference.grouped_mm(grad_RH[:end].double(), up.transpose(1, 2), offsets_E)
    torch.testing.assert_close(grad_RD, expected, rtol=4e-3, atol=1e-4)
    # fp32 gradients keep all digits of the sum.
    grad_EHD = native_training.weight_grad(grad_RH, x_RD, groups, FP32)
    parts = [(0, 40), (40, 40), (40, 63)]
    expected = torch.stack([grad_RH[a:b].double().T @ x_RD[a:b].double() for a, b in parts])
    torch.testing.assert_close(grad_EHD.double(), expected, rtol=1e-5, atol=1e-4)


CHANGES = """
import threading, time, torch
from moestro.errors import BackendError
from moestro.kernels import native_library, native_training

torch.set_num_threads(1)
x_RD = torch.randn(512, 256, dtype=torch.bfloat16)
up_EHD, down_EDF = (torch.randn(4, h, 256, dtype=torch.bfloat16) for h in (512, 256))
offsets_E, until = torch.tensor([128, 256, 384, 512]), time.monotonic() + 2
native, done = native_library.library(), 0
best = native.moestro_path()

def change():
    while time.monotonic() < until:
        for path in (0, best):
            native.moestro_use_path(path)
            time.sleep(0.001)

thread = threading.Thread(target=change)
thread.start()
while time.monotonic() < until:
    try:
        native_training.expert_ffn(x_RD, up_EHD, down_EDF, offsets_E, "swiglu")
        done += 1
    except BackendError as error:
        assert "path changed to one without bf16 products" in str(error)
thread.join()
print(done > 0)
"""


def test_a_path_that_changes_while_another_thread_trains_is_refused(path):
    """In a process of its own, which a fault would end."""
    environment = {**os.environ, PATH_VARIABLE: path}
    done = subprocess.run(
        [sys.executable, "-c", CHANGES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
