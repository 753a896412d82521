"""Projections equal torch's, whichever product they take."""

import pytest
import torch
from torch.nn import functional as F

from moestro.models.linear import SMALL, Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12), (2, 1, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [7, SMALL // 12 + 1])
def test_equals_torchs(dtype, shape, bias, out):
    module = Linear(12, out, bias=bias).to(dtype)
    x_TI = torch.randn(shape).to(dtype)
    bias_O = module.bias.double() if bias else None
    expected = F.linear(x_TI.double(), module.weight.double(), bias_O)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            y_TO = module(x_TI)
        assert y_TO.dtype == dtype
        assert y_TO.shape == expected.shape
        torch.testing.assert_close(y_TO.double(), expected, rtol=tolerance, atol=tolerance)


def test_one_row_trains_and_takes_autocasts_dtype():
    module = Linear(12, 5)
    x_TI = torch.randn(1, 12, requires_grad=True)
    module(x_TI).sum().backward()
    assert module.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert module(x_TI).dtype == module(x_TI.bfloat16()).dtype == torch.bfloat16
