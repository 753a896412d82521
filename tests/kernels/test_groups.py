"""Groups may lie in any order and share sizes: the batched products must not mix them up."""

import pytest
import torch

from moestro.kernels import reference, torch_grouped
from moestro.kernels.torch_grouped import EqualGroups, Groups

# bf16 keeps 8 bits of mantissa and is rounded twice on the way.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
SIZES = [(4, 4, 4), (16, 16, 16, 16, 16), (5, 5, 0, 3, 3, 3), (0, 0, 1), (8,) * 11]


def results(ffn, rows, sizes, order, dtype, weight_dtype, activation):
    """Output and all gradients."""
    torch.manual_seed(0)
    num_experts, dim, hidden = len(sizes), 8, 16
    width = 2 * hidden if activation in reference.GATED else hidden
    x = torch.randn(rows, dim).to(dtype).requires_grad_()
    up = torch.randn(num_experts, width, dim).to(weight_dtype).requires_grad_()
    down = torch.randn(num_experts, dim, hidden).to(weight_dtype).requires_grad_()
    offsets = torch.tensor(sizes).cumsum(0)
    y = ffn(x, up, down, offsets, activation, order)
    y.backward(torch.randn(y.shape).to(dtype))
    return [y.detach(), x.grad, up.grad, down.grad]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kernel", ["segments", "torch"])
def test_groups_in_any_order_equal_the_definition(sizes, dtype, kernel):
    if kernel == "torch" and dtype == torch.float64:
        pytest.skip("torch's grouped_mm has no float64")
    fast = {
        "segments": torch_grouped.SEGMENTS.expert_ffn,
        "torch": torch_grouped.TORCH.expert_ffn,
    }[kernel]
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(len(sizes)))
    for weight_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        for experts in (None, order):
            common = (sum(sizes), sizes, experts, dtype, weight_dtype, "swiglu")
            pairs = zip(results(fast, *common), results(reference.expert_ffn, *common), strict=True)
            for a, b in pairs:
                assert a.dtype == b.dtype
                scale = b.abs().max().clamp(min=1)
                torch.testing.assert_close(
                    a / scale, b / scale, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
                )


def test_short_runs_are_cut_into_single_groups():
    order = torch.tensor([5, 3, 0, 1, 2, 4, 6])
    groups = Groups(torch.tensor([4, 8, 12, 14, 14, 16, 18]), order)
    assert groups.runs == [
        EqualGroups([5], slice(0, 4)),
        EqualGroups([3], slice(4, 8)),
        EqualGroups([0], slice(8, 12)),
        EqualGroups([1], slice(12, 14)),
        EqualGroups([4], slice(14, 16)),
        EqualGroups([6], slice(16, 18)),
    ]


def test_runs_without_an_order_name_the_experts_in_turn():
    groups = Groups(torch.tensor([2, 4, 6, 8, 10, 12, 14, 16, 18]), None)
    assert [run.experts for run in groups.runs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [run.rows for run in groups.runs] == [slice(0, 8), slice(8, 16), slice(16, 18)]
