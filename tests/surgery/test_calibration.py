"""The statistics of a calibration text against a loop over its tokens."""

import pytest
import torch
from torch.nn import functional as F

from moestro.checkpoints.reading import read_model
from moestro.errors import DataError
from moestro.surgery.calibration import collect
from moestro.surgery.layers import Layers

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (11, 9), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_against_a_loop_over_tokens(tmp_path):
    tiny.save(tiny.build("mixtral").double(), tmp_path)
    layers = Layers(tmp_path)
    seen = collect(layers, TOKENS, every=True, least=1)
    model = read_model(tmp_path)
    inputs = {}
    for number, block in enumerate(model.blocks):
        block.ffn.register_forward_pre_hook(lambda _, x, n=number: inputs.update({n: x[0]}))
    model(TOKENS[:, :-1])
    assert list(seen) == [0, 1, 2]
    for number, found in seen.items():
        experts, x_TD = model.blocks[number].ffn.experts, inputs[number].flatten(0, 1)
        routing = model.blocks[number].ffn.router(x_TD)
        counts, norms, weighted = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
        outputs_ETD = torch.stack(
            [
                (F.silu(gate) * up) @ down.T
                for gate_up, down in zip(experts.gate_up, experts.down, strict=True)
                for gate, up in [(x_TD @ gate_up.T).chunk(2, dim=1)]
            ]
        )
        for token, expert, weight in zip(*routing[:3], strict=True):
            size = outputs_ETD[expert, token].norm()
            counts[expert] += 1
            norms[expert] += size
            weighted[expert] += weight * size
        assert torch.equal(found.counts_E, counts)
        assert torch.allclose(found.norms_E, norms, rtol=1e-12)
        assert torch.allclose(found.weighted_E, weighted, rtol=1e-12)
        assert torch.allclose(found.means_ED, outputs_ETD.mean(1), rtol=1e-11)
        assert torch.allclose(found.alike_EE, routing.logits_TE.T @ routing.logits_TE, rtol=1e-11)
    # Several passes add up to one.
    again = collect(layers, TOKENS, every=True, least=1, memory_bytes=8 * 5 * 48 * 8)
    for number, found in seen.items():
        for one, other in zip(found, again[number], strict=True):
            assert torch.allclose(one, other, rtol=1e-12)


def test_a_text_too_short_for_the_experts_is_refused(tmp_path):
    tiny.save(tiny.build("mixtral"), tmp_path)
    with pytest.raises(
        DataError,
        match=r"^88 tokens .* few: 6 experts with 2 per token need 192 .*; give more text$",
    ):
        collect(Layers(tmp_path), TOKENS)
