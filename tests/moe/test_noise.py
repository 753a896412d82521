"""Noise that is a function of keys: the published hash, its distributions, any cut of a batch."""

import pytest
import torch

from moestro import MoE
from moestro.moe import noise
from moestro.moe.noise import mixed, of_rows, of_tokens


def test_the_hash_is_splitmix64():
    first = [mixed(torch.tensor([0]), n).item() % 2**64 for n in range(3)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    several = mixed(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert [x % 2**64 for x in several.tolist()] == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions(dtype):
    keys_N = of_tokens(of_rows(7, torch.arange(40)), 50).flatten()
    u_NW, z_NW = noise.uniform(keys_N, 60, dtype), noise.normal(keys_N, 60, dtype)
    assert u_NW.dtype == z_NW.dtype == dtype
    assert 0 <= u_NW.min() < 1e-3
    assert 0.999 < u_NW.max() < 1
    for x_NW, mean, std in ((u_NW, 0.5, 12**-0.5), (z_NW, 0.0, 1.0)):
        assert x_NW.mean().item() == pytest.approx(mean, abs=0.01)
        assert x_NW.std().item() == pytest.approx(std, abs=0.01)
        for other in (x_NW.roll(1, 0), x_NW.roll(1, 1)):  # of the next token, of the next unit
            both = torch.stack([x_NW.flatten(), other.flatten()])
            assert abs(torch.corrcoef(both)[0, 1].item()) < 0.02


@pytest.mark.parametrize(
    "changes",
    [
        {"router": {"jitter": 0.3}, "experts": {"dropout": 0.4}},
        {"router": {"kind": "noisy_top_k"}, "experts": {"dropout": 0.4, "bias": True}},
    ],
    ids=["jitter", "noisy_top_k"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_batch_in_two_is_the_batch(tiny, changes, backend):
    layer = MoE(tiny(**changes), backend).double()
    x_BSD = torch.randn(4, 5, 8, dtype=torch.float64)
    keys_BS = of_tokens(of_rows(0, torch.arange(4)), 5)

    def gradients(*cuts):
        layer.zero_grad()
        for cut in cuts:
            y_BSD, _ = layer(x_BSD[cut], noise=keys_BS[cut])
            y_BSD.sin().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters()]

    whole = gradients(slice(4))
    for one, other in zip(whole, gradients(slice(3, 4), slice(3)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    keys_BS = mixed(keys_BS, 1)  # as in the next layer
    assert not torch.allclose(whole[-1], gradients(slice(4))[-1])


def test_dropout_zeroes_its_share_and_keeps_the_mean(tiny):
    layer = MoE(tiny(experts={"dropout": 0.25}, activation="relu"))
    with torch.no_grad():
        layer.experts.gate_up.fill_(0.5)
        layer.experts.down.zero_()
        layer.experts.down[:, :, 0] = 1.0  # y shows the first hidden unit
    x_TD, keys_T = torch.ones(4000, 8), of_rows(3, torch.arange(4000))
    y_TD, _ = layer(x_TD, noise=keys_T)
    kept = (y_TD[:, 0] / 4).sort().values  # of both experts: 0, one of two, both
    assert (kept == 0).float().mean().item() == pytest.approx(0.25**2, abs=0.015)
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    layer.eval()
    torch.testing.assert_close(layer(x_TD, noise=keys_T)[0][:, 0], torch.full((4000,), 4.0))
