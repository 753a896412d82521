"""Short convolutions in place of attention: against a loop, their cache, and what they refuse."""

import math

import pytest
import torch

from moestro import Decoder, ModelConfig
from moestro.errors import ConfigError, ShapeError
from moestro.models.cache import StateCache
from moestro.models.conv import ShortConv

from .plain_decoder import plain_conv

WIDTHS = [1, 3, 6]


def module_of(width=3):
    attention = {"window": {"kind": "conv", "width": width}}
    module = ShortConv(ModelConfig(dim=8, attention=attention)).double()
    torch.nn.init.normal_(module.conv_weight)
    return module


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_loop(width):
    """Outputs, and the gradients of the input and of every parameter."""
    module = module_of(width)
    x_BSD = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    y_BSD, expected_BSD = module(x_BSD), torch.stack([plain_conv(module, x_SD) for x_SD in x_BSD])
    torch.testing.assert_close(y_BSD, expected_BSD)
    leaves, grad = [x_BSD, *module.parameters()], torch.randn_like(y_BSD)
    exact = torch.autograd.grad(expected_BSD, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(y_BSD, leaves, grad), exact)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("chunks", [[1] * 12, [6, 1, 5], [2, 10], [12]], ids=str)
def test_in_pieces_as_in_the_whole(width, chunks):
    module, cache = module_of(width), StateCache()
    x_BSD = torch.randn(2, 12, 8, dtype=torch.float64)
    parts = [module(part, cache=cache) for part in x_BSD.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x_BSD))
    (last_BWD,) = cache.held(2)
    assert last_BWD.untyped_storage().nbytes() == 2 * (width - 1) * 8 * 8


def test_padding_counts_as_zero():
    """Before and after a text, whatever stands there."""
    module = module_of()
    x_BSD = torch.randn(2, 8, 8, dtype=torch.float64)
    before, after = (torch.full((2, n, 8), math.nan).double() for n in (3, 4))
    valid_BS = torch.tensor([[False] * 3 + [True] * 8 + [False] * 4] * 2)
    padded_BSD = module(torch.cat([before, x_BSD, after], 1), valid_BS)
    torch.testing.assert_close(padded_BSD[:, 3:11], module(x_BSD))
    assert padded_BSD.isfinite().all()


def decoder(layers=3, attending=(1,)):
    window = {"kind": "conv", "attention_layers": attending}
    return Decoder(ModelConfig(dim=16, num_layers=layers, attention={"window": window})).eval()


def test_which_layers_attend():
    model = decoder(4, (0, 2))
    assert [block.attention is not None for block in model.blocks] == [True, False, True, False]
    assert [block.conv is None for block in model.blocks] == [True, False, True, False]
    kept = [isinstance(each, StateCache) for each in model.new_cache().layers]
    assert kept == [False, True, False, True]


def test_a_fork_goes_its_own_way():
    model = decoder()
    first, second = torch.randint(0, 256, (2, 1, 9))
    with torch.inference_mode():
        cache = model.new_cache()
        model(first[:, :5], cache=cache)
        twin = cache.fork()
        for tokens, own in ((second[:, 5:], twin), (first[:, 5:], cache)):
            expected = model(torch.cat([first[:, :5], tokens], 1)).logits[:, 5:]
            torch.testing.assert_close(model(tokens, cache=own).logits, expected)
    assert not cache.can_cut(8)
    assert cache.can_cut(9)


def test_what_is_refused():
    cache = StateCache()
    module_of()(torch.randn(2, 3, 8).double(), cache=cache)
    with pytest.raises(ShapeError, match="batch of 2, and 1"):
        module_of()(torch.randn(1, 1, 8).double(), cache=cache)
    with pytest.raises(ShapeError, match="short convolutions run on"):
        decoder()(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 0, 1, 1]]))
    attention = {"window": {"kind": "conv"}, "positions": {"kind": "relative"}}
    with pytest.raises(ConfigError, match="conv layers has rotary positions"):
        ModelConfig(dim=16, attention=attention)
