"""The decoder in a plain PyTorch loop, balanced without a loss: the router's bias does it.

Run it: python examples/custom_loop.py (a few seconds on one core; nothing is downloaded).
"""

import textwrap
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from moestro import Decoder, ModelConfig
from moestro.moe.balance import sequence_loss, update_bias, z_loss

LENGTH, BATCH, STEPS = 128, 8, 60
# The paper's u is 1e-3 (Wang et al. 2024), for many thousands of steps; 60 need larger ones.
BIAS_RATE, SEQUENCE, Z = 2e-2, 1e-4, 1e-3
CFG = ModelConfig(
    dim=64,
    num_layers=2,
    moe={
        "hidden_dim": 32,
        "num_experts": 8,
        "top_k": 2,
        "router": {"kind": "sigmoid", "selection_bias": True},
        "shared": {"hidden_dim": 64},
    },
)


def imbalance(routing):
    """Busiest expert's load over the mean: 1 is even, 8 is one expert for everything."""
    counts_E = routing.counts_E().float()
    return (counts_E.max() / counts_E.mean()).item()


def train(bias_rate):
    """Train from the same start on the same text; returns the mean imbalance of the last steps."""
    torch.manual_seed(1)
    text = torch.tensor(list(Path(textwrap.__file__).read_bytes()))
    model = Decoder(CFG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1))
        window = text[starts + torch.arange(LENGTH + 1)]
        output = model(window[:, :-1])
        loss = total = cross_entropy(output.logits.flatten(0, 1), window[:, 1:].flatten())
        for routing in output.routings:
            total = total + SEQUENCE * sequence_loss(routing, BATCH) + Z * z_loss(routing)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        # After the weights, once a step, from the counts of the whole step.
        for layer, routing in zip(model.mixtures(), output.routings, strict=True):
            update_bias(layer.router.bias, routing.counts_E(), bias_rate)
        history.append(sum(map(imbalance, output.routings)) / len(output.routings))
        if step % 20 == 0:
            print(f"  step {step}: loss {loss:.2f}, busiest expert over the mean {history[-1]:.2f}")
    return sum(history[-10:]) / 10


def main():
    print("bias left at zero:")
    without = train(0.0)
    print(f"bias moved by {BIAS_RATE} a step:")
    moved = train(BIAS_RATE)
    print(f"mean of the last 10 steps: {without:.2f} without, {moved:.2f} with the bias")


if __name__ == "__main__":
    main()
