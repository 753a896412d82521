"""Look into a Routing: how many tokens each expert got, how sure the router was, who went where.

Run it: python examples/inspect_routing.py (a few seconds on one core; nothing is downloaded).
"""

import math
import textwrap
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from moestro import Decoder, ModelConfig
from moestro.moe.balance import switch_loss

SENTENCE = "def wrap(self, text):  # The text is split into 3 lines, at most 70 wide."
CFG = ModelConfig(dim=64, num_layers=2, moe={"hidden_dim": 64, "num_experts": 4, "top_k": 2})


def train_a_little(model, text, steps=60, length=128, batch=8):
    """Enough steps for the router to prefer something."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch, 1))
        window = text[starts + torch.arange(length + 1)]
        output = model(window[:, :-1])
        loss = cross_entropy(output.logits.flatten(0, 1), window[:, 1:].flatten())
        loss = loss + 0.01 * sum(switch_loss(routing) for routing in output.routings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def entropy(p):
    """Entropy in nats over the last dimension."""
    return -(p * p.clamp(min=1e-20).log()).sum(-1)


def report(layer, routing):
    """Counts, both entropies, and the first expert of each token of the sentence."""
    counts_E = routing.counts_E()
    even, most = counts_E / counts_E.sum(), math.log(routing.num_experts)
    print(f"layer {layer}")
    print(f"  assignments per expert: {counts_E.tolist()}")
    print(f"  busiest expert over the mean: {counts_E.max() / counts_E.float().mean():.2f}")
    print(f"  entropy of the load: {entropy(even):.2f} of {most:.2f} nats (most is even)")
    print(f"  entropy of a token's choice: {entropy(routing.probs_TE).mean():.2f} of {most:.2f}")
    first_T = routing.experts_TK()[:, 0].tolist()
    weights_T = routing.weights_R.view(-1, routing.top_k)[:, 0]
    print(f"  mean weight of the first choice: {weights_T.mean():.2f}")
    print(f"  {SENTENCE}")
    print(f"  {''.join(map(str, first_T))}")


def main():
    torch.manual_seed(0)
    text = torch.tensor(list(Path(textwrap.__file__).read_bytes()))
    model = Decoder(CFG)
    train_a_little(model, text)
    model.eval()
    with torch.no_grad():
        output = model(torch.tensor([list(SENTENCE.encode())]))
    print("Under each letter of the sentence: the first expert it went to.")
    for layer, routing in zip(model.moe_layers, output.routings, strict=True):
        report(layer, routing)


if __name__ == "__main__":
    main()
