"""Projections equal torch's, whichever product they take."""

import pytest
import torch
from torch.nn import functional as F

from moestro import Decoder, ModelConfig
from moestro.config import EncDecConfig
from moestro.errors import ShapeError
from moestro.kernels.torch_grouped import SMALL
from moestro.models.encdec import EncDec
from moestro.models.linear import Embedding, Linear


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_embedding_is_torchs(dtype):
    module = Embedding(5, 3)
    tokens_BS = torch.tensor([[0, 4], [2, 2]], dtype=dtype)
    expected = F.embedding(tokens_BS, module.weight)
    assert torch.equal(module(tokens_BS), expected)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens_BS), expected)
    assert module.to("meta")(tokens_BS.to("meta")).shape == (2, 2, 3)


WRONG = [(torch.tensor([[3, 256, 7, 10**12]]), r"0 to 255.*given \[256, 1000000000000\]"),
         (torch.tensor([[-1, 2]]), r"given \[-1\]"),
         (torch.tensor([[True]]), "token ids are int64; given torch.bool"),
         (torch.tensor([[3]], dtype=torch.uint8), "given torch.uint8")]  # fmt: skip


@pytest.mark.parametrize(("tokens_BS", "words"), WRONG)
def test_ids_that_are_no_tokens(tokens_BS, words):
    """A decoder, with and without a cache, and both sides of an encoder-decoder."""
    model, both = Decoder(ModelConfig()), EncDec(EncDecConfig())
    good_BS = torch.tensor([[1, 2]])
    for use in (
        lambda: model(tokens_BS),
        lambda: model(tokens_BS, cache=model.new_cache()),
        lambda: both(tokens_BS, good_BS),
        lambda: both(good_BS, tokens_BS),
    ):
        with pytest.raises(ShapeError, match=words):
            use()
