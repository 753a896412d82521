"""Published models on many GPUs, on paper: what `plan` says, what binds, and what unevenness costs.

Nothing is run. Activations are recomputed. State and traffic are `moestro.plan.parallel.spread`'s.
Seconds are those of the arithmetic at 40 % of an H100's peak, and of what is sent at 50 GB/s a GPU;
nothing is overlapped, so a layer's seconds are their sum.

Unevenness is simulated. Each rank reads one sequence of one domain and sends its tokens to experts
as the domains of a trained router do (results/evidence.json, shares by domain and layer); the
fullest rank of an expert group keeps the others waiting. Stragglers are normal noise on the seconds
of each rank and layer: at every exchange a group waits for its slowest rank, and a step for its
slowest group. That weights are gathered one layer ahead, over all ranks, adds nothing: noise never
parts groups by a whole layer.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import measure
import numpy as np
from numpy.typing import NDArray

from moestro.config import ParallelConfig
from moestro.plan.devices import DEVICES
from moestro.plan.parallel import SPREAD, Rank, Step
from moestro.plan.presets import preset
from moestro.plan.report import Question, report
from moestro.train.task import example_train_flops

GIB, H100, EFFICIENCY, NETWORK_BYTES_PER_S = 2**30, DEVICES["h100"], 0.4, 50e9
RECOMPUTED = 4 / 3  # the forward is computed again, a third of a step's arithmetic
NOISE = 0.05  # σ of a rank's seconds in one layer
DRAWS = 20


class Case(NamedTuple):
    """A model and its layout; None for `shard`: all ranks."""

    name: str
    ranks: int
    expert: int
    shard: int | None
    tokens: int = 4096


CASES = (
    Case("mixtral-8x7b", 16, 8, None),
    Case("mixtral-8x7b", 16, 8, 8),
    Case("deepseek-v3", 2048, 64, None),
    Case("deepseek-v3", 2048, 256, 256),
    Case("glam-64b-64e", 1024, 64, None, 1024),
    Case("switch-c-2048", 2048, 2048, None, 512),
    Case("deepseek-v3", 10240, 64, 2048),
)
# Tokens per second and chip of published runs.
PUBLISHED = {
    # 180,000 H800 hours for 10¹² tokens, on 2,048 (DeepSeek-AI 2024, arXiv 2412.19437, §1).
    "deepseek-v3": 1e12 / (180e3 * 3600),
    # 574 hours on 1,024 TPU v4 for 280·10⁹ tokens (Du et al. 2022, GLaM).
    "glam-64b-64e": 280e9 / (574 * 3600 * 1024),
}


def uneven(case: Case, experts: int, rng: np.random.Generator) -> float:
    """Rows of the fullest rank of an expert group over the mean: the mean of some draws."""
    text = (measure.RESULTS / "evidence.json").read_text()
    share_LME: NDArray[np.float64] = np.array(json.loads(text)["table_LME"])
    layers, domains, known = share_LME.shape
    ratios = []
    for _ in range(DRAWS):
        # As many experts as needed: those of several layers side by side, in any order.
        blocks = [share_LME[rng.integers(layers)] for _ in range(-(-experts // known))]
        load_ME = np.concatenate(blocks, axis=1)[:, rng.permutation(len(blocks) * known)][
            :, :experts
        ]
        load_ME = load_ME / load_ME.sum(axis=1, keepdims=True)
        of_group_E = load_ME[rng.integers(domains, size=case.expert)].mean(axis=0)
        rows_P = of_group_E.reshape(case.expert, -1).sum(axis=1)
        ratios.append(rows_P.max() / rows_P.mean())
    return float(np.mean(ratios))


def straggling(case: Case, layers: int, rng: np.random.Generator) -> float:
    """Seconds of a step with noise over those without."""
    found = []
    for _ in range(DRAWS):
        noise_LGP = rng.normal(1, NOISE, (layers, case.ranks // case.expert, case.expert))
        found.append(noise_LGP.max(axis=2).mean(axis=0).max())
    return float(np.mean(found))


def row(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """One line of the table."""
    subject = preset(case.name)
    cfg = subject.cfg
    assert cfg is not None
    assert cfg.moe is not None
    how = ParallelConfig(expert=case.expert, shard=case.shard or "auto")
    asked = Question(
        context=case.tokens, ranks=case.ranks, parallel=SPREAD, spread=how,
        step=Step(recomputes=True),
    )  # fmt: skip
    answer = report(subject, asked, with_dense=False)
    one: Rank | None = answer.rank
    assert one is not None
    assert one.activations is not None
    lengths = (case.tokens, case.tokens // 4) if cfg.has_encoder else (case.tokens,)
    flops = example_train_flops(cfg, *lengths)
    compute_s = RECOMPUTED * flops / (EFFICIENCY * H100.flops_per_s)
    network_s = one.sent / NETWORK_BYTES_PER_S
    exchange_s = one.all_to_all / NETWORK_BYTES_PER_S
    state = one.weights + one.gradients + one.optimizer
    held = one.held
    layers = sum(layer.mixture for stack in cfg.stacks() for layer in stack.layers)
    load, slow = uneven(case, cfg.moe.num_experts, rng), straggling(case, layers, rng)
    if held > H100.memory_bytes:
        binds = "memory"
    else:
        binds = "network" if network_s > compute_s else "arithmetic"
    times = {"arithmetic s": compute_s, "network s": network_s, "all-to-all s": exchange_s}
    published = PUBLISHED.get(case.name)
    return {
        "model": case.name, "ranks": case.ranks, "split": case.expert,
        "shard": case.shard or case.ranks,
        "state GiB": state / GIB, "gathered GiB": (one.gathered or 0) / GIB,
        "activations GiB": one.activations / GIB, "sent GiB": one.sent / GIB,
        **times, "binds": binds, "tokens/s/GPU": case.tokens / (compute_s + network_s),
        "published": published or "", "fullest rank": load, "stragglers": slow,
        # Experts' arithmetic and rows wait for the fullest rank, all else for the slowest.
        "uneven tokens/s/GPU": case.tokens
        / (slow * (compute_s * load + network_s + (load - 1) * exchange_s)),
    }  # fmt: skip


def main() -> None:
    args = measure.arguments(__doc__ or "", repeats=1).parse_args()
    rng = np.random.default_rng(0)
    measure.report(f"scale{args.name}", [row(case, rng) for case in CASES], {})


if __name__ == "__main__":
    main()
