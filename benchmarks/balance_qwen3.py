"""A fine-tune of a small Qwen3-MoE that starts badly skewed, with each way to balance it.

A model is trained from nothing on code, English and worked arithmetic. Then each router is pushed
towards three of its experts, and the model is fine-tuned on arithmetic alone. Every method starts
from the same weights and reads the same batches. Text is bytes of what every Python has.

Imbalance (most loaded expert over the mean) and dead experts are of held-out arithmetic, the mean
over the mixtures; `loss` is held-out cross entropy in nats per byte of arithmetic, `first loss`
of the text that the model was trained on at first, which the fine-tune forgets.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from itertools import islice
from typing import Any

import measure
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moestro.hf
from moestro.data.builtin import arithmetic_texts, library_texts
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record

LENGTH, BATCH, MICRO = 128, 16, 2
HELD_OUT = 64  # windows
FAVOURED, PUSH = 3, 4.0
# What the fine-tune is balanced with; None: nothing, "own": the family's own loss, by its switch.
METHODS: dict[str, Any] = {
    "none": None,
    "family's own, 0.001": "own",
    "Switch, micro-batch, 0.01": {"switch": 0.01},
    "Switch, sequence, 0.01": {"switch": 0.01, "scope": "sequence"},
    "Switch, global, 0.01": {"switch": 0.01, "scope": "global"},
    "loss-free bias, 0.003": {"switch": 0.0, "bias_rate": 0.003},
    "z, 0.001": {"switch": 0.0, "z": 0.001},
}


def windows(text: str) -> Tensor:
    """The bytes of a text, cut into windows [N, LENGTH]."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


def corpora() -> tuple[Tensor, Tensor]:
    """Windows of code, English and arithmetic by turns, and of other arithmetic."""
    pages = list(islice(library_texts(), 400))
    arithmetic = "".join(islice(arithmetic_texts(1), 700))
    kinds = ["\n".join(page.code for page in pages), "\n".join(page.english for page in pages)]
    parts = [windows(text) for text in (*kinds, arithmetic)]
    size = min(len(part) for part in parts)
    broad = torch.stack([part[:size] for part in parts], 1).flatten(0, 1)
    return broad, windows("".join(arithmetic_texts(2)))


def build(seed: int) -> Qwen3MoeForCausalLM:
    """Three mixtures of 16 experts, 2 a token."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2,
            moe_intermediate_size=64, max_position_embeddings=LENGTH, norm_topk_prob=True,
            use_cache=False,
        )
    )  # fmt: skip


def train(model: Any, text: Tensor, steps: int, seed: int, method: Any) -> Any:
    """Train in place. Returns the balancer, whose biases are in force, or None."""
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    balancer = moestro.hf.balance(model, **method) if isinstance(method, dict) else None
    model.config.output_router_logits = method == "own"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        places = torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)
        for micro in text[order[places]].chunk(MICRO):
            loss = model(micro, labels=micro).loss
            if balancer is not None:
                loss = loss + balancer.loss()
            (loss / MICRO).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.step()
    model.config.output_router_logits = False
    return balancer


@torch.no_grad()
def skew(model: Any, text: Tensor) -> None:
    """Push each router towards its first experts, by what most tokens have in common."""
    seen: dict[Any, Tensor] = {}
    routers = [layer.mlp.gate for layer in model.model.layers]
    hooks = [
        router.register_forward_pre_hook(
            lambda module, args: seen.update({module: args[0].flatten(0, -2).mean(0)})
        )
        for router in routers
    ]
    model(text)
    for router, hook in zip(routers, hooks, strict=True):
        hook.remove()
        common_D = seen[router] / seen[router].norm().square()
        router.weight[:FAVOURED] += PUSH * common_D


@torch.no_grad()
def held_out(model: Any, text: Tensor) -> float:
    """Cross entropy in nats per byte."""
    model.eval()
    return statistics.fmean(model(part, labels=part).loss.item() for part in text.split(32))


def health(model: Any, text: Tensor) -> tuple[float, float]:
    """Imbalance and dead experts on a text, the mean over the mixtures."""
    trace = record(model, [Passage(row) for row in text])
    counts_LE = [
        torch.bincount(torch.from_numpy(used.astype("int64")).flatten(), minlength=16).double()
        for used in trace.experts_TLK.transpose(1, 0, 2)
    ]
    imbalance = statistics.fmean((each.max() / each.mean()).item() for each in counts_LE)
    return imbalance, statistics.fmean((each == 0).sum().item() for each in counts_LE)


def measured(seed: int, first: int, steps: int, methods: list[str]) -> list[dict[str, Any]]:
    """One row a method, all from the same skewed model."""
    broad, narrow = corpora()
    broad, broad_held = broad[:-HELD_OUT], broad[-HELD_OUT:]
    narrow, narrow_held = narrow[:-HELD_OUT], narrow[-HELD_OUT:]
    model = build(seed)
    train(model, broad, first, seed, {"switch": 0.01}).remove()
    even, _ = health(model, narrow_held)
    skew(model, narrow[:32])
    before, dead = health(model, narrow_held)
    rows = []
    for name in methods:
        tuned = copy.deepcopy(model)
        balancer = train(tuned, narrow, steps, seed, METHODS[name])
        imbalance, still = health(tuned, narrow_held)
        rows.append({
            "seed": seed, "method": name, "unskewed": even, "imbalance before": before,
            "dead before": dead, "imbalance": imbalance, "dead": still,
            "loss": held_out(tuned, narrow_held), "first loss": held_out(tuned, broad_held),
        })  # fmt: skip
        if balancer is not None:
            balancer.remove()
        print(*(f"{k} {v:.3f}" if isinstance(v, float) else v for k, v in rows[-1].items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=200, help="steps before the fine-tune")
    parser.add_argument("--steps", type=int, default=200, help="steps of the fine-tune")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--name", default="", help="suffix of the result file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [
        row for seed in range(args.seeds)
        for row in measured(seed, args.first, args.steps, args.methods)
    ]  # fmt: skip
    table = []
    for name in args.methods:
        own = [row for row in rows if row["method"] == name]
        keys = [key for key in own[0] if key not in ("seed", "method")]
        table.append({
            "method": name,
            **{key: statistics.fmean(row[key] for row in own) for key in keys},
            "losses": [round(row["loss"], 4) for row in own],
            "imbalances": [round(row["imbalance"], 3) for row in own],
        })  # fmt: skip
    claims = {"seeds": args.seeds, "first steps": args.first, "steps": args.steps}
    measure.report(f"balance_qwen3{args.name}", table, claims)


if __name__ == "__main__":
    main()
