"""The trials of recipes.py: what each changes in the demo's settings."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Trial(NamedTuple):
    """Settings over the demo's, and whether they are for the mixture or for its dense twin."""

    side: Literal["mixture", "twin"]
    settings: tuple[str, ...] = ()


def _moe(*settings: str) -> Trial:
    return Trial("mixture", settings)


def _twin(*settings: str) -> Trial:
    return Trial("twin", settings)


def _experts(number: int, top_k: int = 2, hidden: int = 128) -> tuple[str, ...]:
    return (
        f"model.moe.num_experts={number}", f"model.moe.top_k={top_k}",
        f"model.moe.hidden_dim={hidden}",
    )  # fmt: skip


_LOSS_FREE = (
    "model.moe.router.kind=sigmoid", "model.moe.router.selection_bias=true",
    "balance.switch=0", "balance.bias_rate=1e-3",
)  # fmt: skip
_SHARED = "model.moe.shared={hidden_dim=128}"

_MUON = ("optim.matrices=muon",)
_MUON_RATES = ("2e-3", "4e-3", "8e-3")

TRIALS = {
    # Learning rates, as many for each side.
    **{f"moe-lr{rate}": _moe(f"optim.lr={rate}") for rate in ("1e-3", "2e-3", "4e-3", "8e-3")},
    **{f"twin-lr{rate}": _twin(f"optim.lr={rate}") for rate in ("1e-3", "2e-3", "4e-3", "8e-3")},
    # Steps of half as many tokens.
    **{f"moe-b8-lr{r}": _moe("train.batch_size=8", f"optim.lr={r}") for r in ("2e-3", "4e-3")},
    **{f"twin-b8-lr{r}": _twin("train.batch_size=8", f"optim.lr={r}") for r in ("2e-3", "4e-3")},
    # Muon for matrices.
    **{f"moe-muon-lr{r}": _moe(*_MUON, f"optim.lr={r}") for r in _MUON_RATES},
    **{f"twin-muon-lr{r}": _twin(*_MUON, f"optim.lr={r}") for r in _MUON_RATES},
    # Number and size of experts, at equal active width.
    "moe-32": _moe(*_experts(32)),
    "moe-64": _moe(*_experts(64)),
    "moe-32-k4": _moe(*_experts(32, 4, 64)),
    "moe-64-k4": _moe(*_experts(64, 4, 64)),
    "moe-16-k1": _moe(*_experts(16, 1, 256)),
    "moe-shared": _moe(*_experts(16, 1, 128), _SHARED),
    "moe-dense-first": _moe("model.dense_first=1"),
    # Balance.
    "moe-loss-free": _moe(*_LOSS_FREE),
    "moe-global": _moe("balance.scope=global"),
    "moe-none": _moe("balance.switch=0"),
    "moe-switch1e-3": _moe("balance.switch=1e-3"),
    # Start, schedule, decay.
    "moe-init0.1": _moe("model.moe.init_scale=0.1"),
    "moe-init3": _moe("model.moe.init_scale=3"),
    "moe-wd0": _moe("optim.weight_decay=0"),
    "twin-wd0": _twin("optim.weight_decay=0"),
    "moe-wsd": _moe("optim.schedule=wsd", "optim.decay=0.5", "optim.final_lr=0"),
    "twin-wsd": _twin("optim.schedule=wsd", "optim.decay=0.5", "optim.final_lr=0"),
}
