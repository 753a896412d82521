"""Phi-3.5-MoE beyond its original context, where transformers forgets the length of the text."""

import functools

import pytest
import torch

from moestro.checkpoints.opening import open_checkpoint

from . import tiny


@torch.no_grad()
@pytest.mark.parametrize("length", [40, 41, 55])
def test_long_factors_beyond_the_original_context(tmp_path, length):
    """transformers 5 asks for its frequencies without saying how long the text is: say it."""
    theirs = tiny.build("phimoe")
    tiny.save(theirs, tmp_path)
    ours = open_checkpoint(tmp_path).model
    tokens_BS = torch.randint(0, tiny.VOCABULARY, (2, length))
    frequencies = theirs.model.rotary_emb
    frequencies.rope_init_fn = functools.partial(frequencies.rope_init_fn, seq_len=length)
    expected = theirs(tokens_BS).logits
    scale = expected.abs().max()
    torch.testing.assert_close(ours(tokens_BS).logits / scale, expected / scale, rtol=0, atol=1e-5)
