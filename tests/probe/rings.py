"""Models and text of which it is known what each expert is for: `make_model`, `make_text`."""

import numpy as np
import torch

from moestro import Decoder, ModelConfig
from moestro.probe.recording.passages import Passage

TOKENS = 4  # of each domain
DOMAINS = ("code", "prose", "sums")
WIDTH = TOKENS * len(DOMAINS)


def make_model(top_k=1, num_layers=1, mixtures=1, serve=lambda token: token // TOKENS, seed=0):
    """Expert `serve(v)` predicts of token v that v + 1 comes next, its domain's tokens in a ring.

    Attention adds nothing, and the other experts nothing about that token. Layers before the last
    are dense and do nothing, or are random mixtures.
    """
    cfg = ModelConfig(
        vocab_size=WIDTH,
        dim=WIDTH,
        num_layers=num_layers,
        attention={"num_heads": 2, "context": 16},
        moe={"hidden_dim": WIDTH, "num_experts": 4, "top_k": top_k},
        head={"tied": False},
        dense={"hidden_dim": 8},
        dense_first=num_layers - mixtures,
    )
    model = Decoder(cfg)
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(WIDTH)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
        for block in model.blocks[:-mixtures]:
            block.ffn.down.zero_()
        layer = model.blocks[-1].ffn
        model.embed.weight.copy_(eye)
        model.head.weight.copy_(2 * eye)
        layer.router.weight.copy_(0.3 * torch.rand(4, WIDTH, generator=generator))
        layer.experts.gate_up.copy_(torch.cat([eye, 0.3 * eye]))
        layer.experts.down.zero_()
        for token in range(WIDTH):
            expert, start = serve(token), token // TOKENS * TOKENS
            layer.router.weight[expert, token] += 2.0
            layer.experts.down[expert, start + (token + 1 - start) % TOKENS, token] = 1.0
    return model


def make_text(documents=6, length=40, seed=0, domains=DOMAINS, regular=0.8, mixed=0.0):
    """Documents that mostly step along the ring of their domain's tokens; `mixed` in any ring."""
    rng = np.random.default_rng(seed)
    passages = []
    for number, domain in enumerate(domains):
        for document in range(documents):
            token, tokens = number * TOKENS, []
            for _ in range(length):
                start = token // TOKENS * TOKENS
                step = 1 if rng.random() < regular else rng.integers(TOKENS)
                token = start + (token + 1 - start + step - 1) % TOKENS
                if rng.random() < mixed:
                    token = int(rng.integers(WIDTH))
                tokens.append(int(token))
            passages.append(Passage(tokens, domain, f"{domain}/{document}"))
    return passages
