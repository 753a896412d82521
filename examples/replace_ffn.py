"""Somebody's own PyTorch transformer, its feed-forward layer replaced by a mixture of experts.

Run it: python examples/replace_ffn.py (a few seconds on one core; nothing is downloaded).
"""

import textwrap
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moestro import MoE, MoEConfig
from moestro.moe.balance import switch_loss

DIM, HEADS, LENGTH, BATCH, STEPS = 64, 4, 64, 16, 60


class Block(nn.Module):
    """A transformer block as anybody may have written it."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        # Here stood a feed-forward network: linear to 256, GELU, linear back.
        self.ffn = MoE(MoEConfig(dim=DIM, hidden_dim=64, num_experts=8, top_k=2))

    def forward(self, x, mask):
        """[B, S, D] to ([B, S, D], the mixture's Routing)."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        y, routing = self.ffn(self.norm2(x))  # it was: y = ...
        return x + y, routing


class Model(nn.Module):
    """Bytes in, logits of the next byte out, and what each mixture decided."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(DIM, 256)

    def forward(self, tokens):
        """[B, LENGTH] ids to ([B, LENGTH, 256] logits, one Routing per block)."""
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        x = self.embed(tokens) + self.position(torch.arange(LENGTH))
        routings = []
        for block in self.blocks:
            x, routing = block(x, mask)
            routings.append(routing)
        return self.head(x), routings


def main():
    torch.manual_seed(0)
    text = torch.tensor(list(Path(textwrap.__file__).read_bytes()))  # text that Python comes with
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1))
        window = text[starts + torch.arange(LENGTH + 1)]
        logits, routings = model(window[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        balance = sum(switch_loss(routing) for routing in routings) / len(routings)
        (loss + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, STEPS // 2, STEPS):
            print(f"step {step}: loss {loss:.2f} nats per byte, balance loss {balance:.3f}")
    print("assignments per expert in the last batch (even would be 256 each):")
    for layer, routing in enumerate(routings):
        print(f"  layer {layer}: {routing.counts_E().tolist()}")


if __name__ == "__main__":
    main()
