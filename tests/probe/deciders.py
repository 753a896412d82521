"""Tiny own decoders with mixtures, and passages for them."""

import warnings

import torch

from moestro.config import ModelConfig
from moestro.models.decoder import Decoder
from moestro.probe.recording.passages import Passage

VOCABULARY = 61


def decoder(seed: int = 0, **moe) -> Decoder:
    """3 layers, of which 1 and 2 are mixtures of 6 experts, 2 a token, unless `moe` differs."""
    torch.manual_seed(seed)
    cfg = ModelConfig(
        vocab_size=VOCABULARY,
        dim=32,
        num_layers=3,
        dense_first=1,
        attention={"num_heads": 4, "num_kv_heads": 2, "context": 64},
        moe={"dim": 32, "hidden_dim": 16, "num_experts": 6, "top_k": 2, **moe},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # expert choice is not causal
        return Decoder(cfg).eval()


def passages(*lengths: int, domains: tuple[str, ...] = ("code", "prose")) -> list[Passage]:
    """One random passage of each length for each domain."""
    return [
        Passage(torch.randint(3, VOCABULARY, (length,)), domain)
        for length in lengths
        for domain in domains
    ]
