"""Native linear maps and mixtures: every path the same bits, and close to the definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.errors import ShapeError
from moestro.kernels import native_cpu, reference
from moestro.kernels.packing import ACTIVATIONS, Format

PACKED = ["float32", "bfloat16", "int8/32", "int8/64", "int4/32", "int4/64", "uint4/32", "uint4/64"]
KINDS = [*PACKED, "plain/float32", "plain/bfloat16"]
OF_EXPERTS = [*KINDS, "uint4/32/int8"]
# Of the largest result: what rounding rows to 16 bits, or to 8 bits by groups, may change.
ROUNDED = {"float32": 3e-6, "bfloat16": 2e-2, "int8": 4e-2, "int4": 4e-2, "uint4": 4e-2}


@pytest.fixture(autouse=True)
def _needs_the_library(native):
    pass


def precision(kind: str) -> str:
    return kind.removeprefix("plain/").partition("/")[0]


def as_multiplied(x_TI: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows after the rounding that a kind of weights asks for, in fp64."""
    if precision(kind) == "float32":
        return x_TI.double()
    if precision(kind) == "bfloat16":
        return x_TI.bfloat16().double()
    group, columns = int(kind[-2:]), x_TI.shape[1]
    x_TGQ = torch.nn.functional.pad(x_TI.float(), (0, -columns % group)).unflatten(1, (-1, group))
    most_TG1 = x_TGQ.abs().amax(-1, keepdim=True)
    inverse_TG1 = torch.where(most_TG1 > 0, 127 / most_TG1, torch.zeros_like(most_TG1))
    whole_TGQ = (x_TGQ * inverse_TG1).round().double()
    return (whole_TGQ * (most_TG1 / 127).double()).flatten(1)[:, :columns]


def close(y: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    size = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(y.double(), expected.double(), rtol=0, atol=share * size + 1e-30)


def assignments(tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    """Each token's best experts, some dropped; the last expert gets none."""
    tokens_A = torch.arange(tokens).repeat_interleave(top_k)
    choices = [torch.randperm(max(num_experts - 1, 1))[:top_k] for _ in range(tokens)]
    experts_A = torch.cat(choices) if choices else torch.empty(0, dtype=torch.int64)
    kept_A = torch.rand(len(tokens_A)) < 0.9
    return tokens_A[kept_A], experts_A[kept_A], torch.rand(len(tokens_A))[kept_A]


def new_experts(num_experts: int, dim: int, hidden: int, activation: str) -> tuple:
    up_width = 2 * hidden if activation in reference.GATED else hidden
    up_EHD = torch.randn(num_experts, up_width, dim) * dim**-0.5
    return up_EHD, torch.randn(num_experts, dim, hidden) * hidden**-0.5, activation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 63, 300])
@pytest.mark.parametrize("sizes", [(1, 1), (33, 200), (200, 33), (96, 64)])
def test_linear_is_the_product_of_rounded_rows(kind, rows, sizes, matrix_of, on_every_path):
    outputs, inputs = sizes
    if kind == "plain/bfloat16":
        inputs += inputs % 2
    packed, w_OI = matrix_of(torch.randn(outputs, inputs), kind)
    x_TI, bias_O = torch.randn(rows, inputs), torch.randn(outputs)
    y_TO = on_every_path(lambda: native_cpu.linear(packed, x_TI, bias_O))
    close(y_TO, as_multiplied(x_TI, kind) @ w_OI.double().T + bias_O, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_of_16_bit_rows_is_rounded_once(kind, matrix_of, on_every_path):
    packed, _ = matrix_of(torch.randn(45, 70), kind)
    x_TI = torch.randn(19, 70).bfloat16()
    y_TO = on_every_path(lambda: native_cpu.linear(packed, x_TI))
    assert torch.equal(y_TO, native_cpu.linear(packed, x_TI.float()).bfloat16())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 50),
    outputs=st.integers(1, 80),
    inputs=st.integers(1, 140),
    scale=st.floats(-8, 4),
    seed=st.integers(0, 2**31),
)
def test_linear_of_any_shape(kind, rows, outputs, inputs, scale, seed, matrix_of, on_every_path):
    generator = torch.Generator().manual_seed(seed)
    inputs += inputs % 2 if kind == "plain/bfloat16" else 0
    w_OI = torch.randn(outputs, inputs, generator=generator)
    x_TI = torch.randn(rows, inputs, generator=generator) * 10.0**scale
    x_TI[torch.rand(rows, inputs, generator=generator) < 0.3] = 0
    packed, w_OI = matrix_of(w_OI, kind)
    y_TO = on_every_path(lambda: native_cpu.linear(packed, x_TI))
    exact_TO = as_multiplied(x_TI, kind) @ w_OI.double().T
    size_TO = as_multiplied(x_TI, kind).abs() @ w_OI.double().abs().T
    assert ((y_TO - exact_TO).abs() <= 1e-5 * size_TO + 1e-30).all()


@pytest.mark.parametrize("kind", OF_EXPERTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_mixture_is_the_definition(kind, activation, biases, experts_of, on_every_path):
    experts = new_experts(5, 34, 70, activation)
    packed, up_EHD, down_EDF = experts_of(*experts, kind, biases)
    given_biases = reference.Biases(packed.up_bias, packed.down_bias) if biases else None
    x_TD, chosen = 6 * torch.randn(40, 34), assignments(40, 5, 2)  # beyond the cuts at 7 and 10
    y_TD = on_every_path(lambda: native_cpu.mixture(packed, x_TD, *chosen))
    expected_TD = reference.mixture(x_TD, *chosen, up_EHD, down_EDF, activation, given_biases)
    close(y_TD, expected_TD, ROUNDED[precision(kind)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("sizes", [(1, 33), (33, 1), (200, 33)])
def test_mixture_of_odd_shapes(kind, tokens, sizes, experts_of, on_every_path):
    dim, hidden = (size + size % 2 if kind == "plain/bfloat16" else size for size in sizes)
    packed, up_EHD, down_EDF = experts_of(*new_experts(4, dim, hidden, "swiglu"), kind)
    x_TD, chosen = torch.randn(tokens, dim), assignments(tokens, 4, 2)
    y_TD = on_every_path(lambda: native_cpu.mixture(packed, x_TD, *chosen))
    expected_TD = reference.mixture(x_TD, *chosen, up_EHD, down_EDF, "swiglu")
    close(y_TD, expected_TD, ROUNDED[precision(kind)])


@pytest.mark.parametrize("kind", OF_EXPERTS)
def test_mixture_by_its_own_linear_maps(kind, experts_of, on_every_path):
    """Sharper than a tolerance: the same matrices as linear maps give the same bits."""
    dim, hidden = 70, 46
    up_EHD, down_EDF, activation = new_experts(3, dim, hidden, "relu")
    packed, _, _ = experts_of(up_EHD, down_EDF, activation, kind)
    x_TD, chosen = torch.randn(21, dim), torch.tensor([2, 0] * 10 + [2])
    y_TD = on_every_path(
        lambda: native_cpu.mixture(packed, x_TD, torch.arange(21), chosen, torch.ones(21))
    )
    for expert in (0, 2):
        if kind.startswith("plain/"):
            matrices = [
                native_cpu.plain_matrix(each[expert]) for each in (packed.data, packed.down)
            ]
        else:
            pairs = ((up_EHD, packed.format), (down_EDF, packed.format.of_down))
            matrices = [native_cpu.pack_matrix(each[expert], own) for each, own in pairs]
        up, down = matrices
        hidden_RF = native_cpu.linear(up, x_TD[chosen == expert]).relu()
        assert torch.equal(y_TD[chosen == expert], native_cpu.linear(down, hidden_RF))


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_to_one_expert_and_none(kind, experts_of, on_every_path):
    packed, up_EHD, down_EDF = experts_of(*new_experts(3, 40, 64, "swiglu"), kind)
    x_TD, tokens_A = torch.randn(70, 40), torch.arange(70)
    chosen = (tokens_A, torch.full((70,), 1), torch.rand(70))
    y_TD = on_every_path(lambda: native_cpu.mixture(packed, x_TD, *chosen))
    expected_TD = reference.mixture(x_TD, *chosen, up_EHD, down_EDF, "swiglu")
    close(y_TD, expected_TD, ROUNDED[precision(kind)])
    nothing = tuple(each[:0] for each in chosen)
    y_TD = on_every_path(lambda: native_cpu.mixture(packed, x_TD, *nothing))
    assert torch.equal(y_TD, torch.zeros(70, 40))
    assert native_cpu.mixture(packed, x_TD[:0], *nothing).shape == (0, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_run_in_the_order_of_the_assignments(kind, experts_of):
    packed, _, _ = experts_of(*new_experts(4, 34, 34, "swiglu"), kind)
    x_TD, tokens_A = torch.randn(1, 34), torch.zeros(3, dtype=torch.int64)
    order, weights_A = torch.tensor([3, 0, 2]), torch.tensor([0.5, -2.0, 0.25])
    ones = [
        native_cpu.mixture(packed, x_TD, tokens_A[:1], order[a : a + 1], torch.ones(1))
        for a in range(3)
    ]
    expected_TD = torch.zeros(1, 34)
    for weight, one_TD in zip(weights_A, ones, strict=True):
        expected_TD = expected_TD + weight * one_TD
    assert torch.equal(native_cpu.mixture(packed, x_TD, tokens_A, order, weights_A), expected_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind, dtype, matrix_of, experts_of, on_every_path):
    """Few rows go through vectors, many through tiles and slices: no bit may tell."""
    matrix, _ = matrix_of(torch.randn(70, 96), kind)
    packed, _, _ = experts_of(*new_experts(3, 96, 70, "swiglu"), kind)
    x_TD, (tokens_A, experts_A, weights_A) = torch.randn(290, 96), assignments(290, 3, 2)
    x_TD = x_TD.to(dtype)
    y_TO = on_every_path(lambda: native_cpu.linear(matrix, x_TD))
    y_TD = on_every_path(lambda: native_cpu.mixture(packed, x_TD, tokens_A, experts_A, weights_A))
    for start, end in ((0, 1), (5, 12), (12, 29), (30, 63), (280, 290)):
        mine = (tokens_A >= start) & (tokens_A < end)
        chosen = (tokens_A[mine] - start, experts_A[mine], weights_A[mine])
        part_TD = x_TD[start:end]
        assert torch.equal(native_cpu.linear(matrix, part_TD), y_TO[start:end])
        assert torch.equal(native_cpu.mixture(packed, part_TD, *chosen), y_TD[start:end])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_only_itself(kind, matrix_of, on_every_path):
    matrix, _ = matrix_of(torch.randn(40, 96), kind)
    x_TD = torch.randn(40, 96)
    expected_TO = native_cpu.linear(matrix, x_TD)
    x_TD[3, 50], x_TD[20, 0] = float("nan"), float("inf")
    bad_T = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 20]), True)
    good_TO = on_every_path(lambda: native_cpu.linear(matrix, x_TD)[~bad_T])
    assert torch.equal(good_TO, expected_TO[~bad_T])
    assert not native_cpu.linear(matrix, x_TD)[bad_T].isfinite().any()


def test_refusals_say_what_is_wrong(matrix_of, experts_of):
    matrix, _ = matrix_of(torch.randn(8, 32), "int8/32")
    packed, _, _ = experts_of(*new_experts(3, 32, 16, "swiglu"), "int8/32")
    x_TD, one_A = torch.randn(2, 32), torch.zeros(1, dtype=torch.int64)
    for wrong in (torch.randn(2, 31), torch.randn(32), x_TD.double(), x_TD.to("meta")):
        with pytest.raises(ShapeError, match=r"rows|CPU"):
            native_cpu.linear(matrix, wrong)
    with pytest.raises(ShapeError, match="bias"):
        native_cpu.linear(matrix, x_TD, torch.zeros(7))
    for tokens_A, experts_A, says in (
        (one_A + 2, one_A, "tokens from 0 to 1, given 2 to 2"),
        (one_A - 1, one_A, "tokens from 0 to 1, given -1 to -1"),
        (one_A, one_A + 3, "experts from 0 to 2, given 3 to 3"),
        (one_A, one_A - 1, "experts from 0 to 2, given -1 to -1"),
        (torch.tensor([1, 0]), one_A.repeat(2), "never falling"),
        (one_A.int(), one_A, "tokens"),
        (one_A, one_A.repeat(2), "experts"),
    ):
        with pytest.raises(ShapeError, match=says):
            native_cpu.mixture(packed, x_TD, tokens_A, experts_A, torch.ones(len(tokens_A)))
    with pytest.raises(ShapeError, match="weights"):
        native_cpu.mixture(packed, x_TD, one_A, one_A, torch.ones(2))


def test_plain_weights_that_cannot_be_used():
    with pytest.raises(ShapeError, match="even width"):
        native_cpu.plain_matrix(torch.randn(4, 33).bfloat16())
    with pytest.raises(ShapeError, match="float64"):
        native_cpu.plain_matrix(torch.randn(4, 32).double())
    up_EHD, down_EDF, _ = new_experts(2, 8, 6, "swiglu")
    with pytest.raises(ShapeError, match="have up"):
        native_cpu.plain_experts(up_EHD, down_EDF, "relu")
    with pytest.raises(ShapeError, match=r"down must be float32.*given bfloat16"):
        native_cpu.plain_experts(up_EHD, down_EDF.bfloat16(), "swiglu")


def test_plain_weights_are_not_copied():
    w_OI = torch.randn(40, 32)
    matrix, x_TI = native_cpu.plain_matrix(w_OI), torch.randn(3, 32)
    assert matrix.data.data_ptr() == w_OI.data_ptr()
    w_OI.zero_()
    assert torch.equal(native_cpu.linear(matrix, x_TI), torch.zeros(3, 40))


def test_memory_is_read_once():
    """What bandwidth is measured by: a sum of 64-bit words over whole pieces of 256 KiB."""
    words = torch.randint(0, 2**31, (3 * 2**15 + 5,))
    assert native_cpu.read(words) == words[: 3 * 2**15].sum().item()


def test_a_matrix_knows_its_bytes():
    assert native_cpu.matrix_bytes(33, 65, Format("bfloat16")) == 64 * 96 * 2
    assert native_cpu.matrix_bytes(33, 65, Format("int8", 64)) == 2 * 2 * (64 + 64 * 32)
