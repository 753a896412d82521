"""The trials of recipes.py: what each changes in the demo's settings."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Trial(NamedTuple):
    """Settings over the demo's, whose they are, and how long it trains.

    Attributes:
        side: the mixture or its dense twin.
        settings: over the demo's.
        length: share of the twin's tokens; the learning rate's schedule is as long.
    """

    side: Literal["mixture", "twin"]
    settings: tuple[str, ...] = ()
    length: float = 1.0


def _moe(*settings: str, length: float = 1.0) -> Trial:
    return Trial("mixture", settings, length)


def _twin(*settings: str) -> Trial:
    return Trial("twin", settings)


def _experts(number: int, top_k: int = 2, hidden: int = 128) -> tuple[str, ...]:
    return (
        f"model.moe.num_experts={number}", f"model.moe.top_k={top_k}",
        f"model.moe.hidden_dim={hidden}",
    )  # fmt: skip


def _experts_of(side: str) -> tuple[str, ...]:
    """Those of a trial called so; none: the demo's."""
    number = side.removeprefix("moe-")
    return _experts(int(number)) if number.isdigit() else ()


_LOSS_FREE = (
    "model.moe.router.kind=sigmoid", "model.moe.router.selection_bias=true",
    "balance.switch=0", "balance.bias_rate=1e-3",
)  # fmt: skip
# A smaller model, shorter, in micro-batches of 2 sequences, alike in all but what balances it.
_BALANCE = (
    "model.num_layers=2", "model.moe.router.kind=sigmoid", "train.batch_size=8",
    "train.accumulate=4", "balance.z=0",
)  # fmt: skip
_BIAS = ("model.moe.router.selection_bias=true", "balance.switch=0")
_SCALE = "model.moe.router.scale=2"
_SHARED = "model.moe.shared={hidden_dim=128}"

_MUON = ("optim.matrices=muon",)
# The rate falls in a line from the warm-up's end on.
_FALL = ("optim.schedule=wsd", "optim.decay=0.99", "optim.final_lr=0")
_MUON_RATES = ("2e-3", "4e-3", "8e-3", "1.6e-2")
_NARROW = ("model.dim=64", "model.dense.hidden_dim=128")
_RATES = ("2e-3", "4e-3", "8e-3", "1.6e-2")
# More of each token's compute in what experts replace, and less; words for bytes; both.
_SHAPES = {
    "slim": (32, ()),
    "wide": (256, ("model.dense.hidden_dim=512",)),
    "bpe": (128, ("data.tokenizer=bpe:2048",)),
    "bpe-wide": (256, ("data.tokenizer=bpe:2048", "model.dense.hidden_dim=512")),
}

TRIALS = {
    # Learning rates, as many for each side.
    **{f"moe-lr{rate}": _moe(f"optim.lr={rate}") for rate in ("1e-3", "2e-3", "4e-3", "8e-3")},
    **{f"twin-lr{rate}": _twin(f"optim.lr={rate}") for rate in ("1e-3", "2e-3", "4e-3", "8e-3")},
    # Steps of half as many tokens.
    **{f"moe-b8-lr{r}": _moe("train.batch_size=8", f"optim.lr={r}") for r in ("2e-3", "4e-3")},
    **{f"twin-b8-lr{r}": _twin("train.batch_size=8", f"optim.lr={r}") for r in ("2e-3", "4e-3")},
    # Of a quarter, and fewer.
    **{
        f"{side}-b{b}-lr{r}": make(*_experts_of(side), f"train.batch_size={b}", f"optim.lr={r}")
        for side, make in (("moe", _moe), ("moe-32", _moe), ("moe-64", _moe), ("twin", _twin))
        for b in (2, 4)
        for r in ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
    },
    # Muon for matrices.
    **{f"moe-muon-lr{r}": _moe(*_MUON, f"optim.lr={r}") for r in _MUON_RATES},
    **{f"twin-muon-lr{r}": _twin(*_MUON, f"optim.lr={r}") for r in _MUON_RATES},
    **{f"moe-muon-32-lr{r}": _moe(*_MUON, *_experts(32), f"optim.lr={r}") for r in _MUON_RATES},
    "moe-muon-32-k4-lr8e-3": _moe(*_MUON, *_experts(32, 4, 64), "optim.lr=8e-3"),
    # The weights of a token's K experts sum to 1; times K, an expert counts as in the twin.
    "moe-muon-scale2-lr8e-3": _moe(*_MUON, _SCALE, "optim.lr=8e-3"),
    "moe-muon-shared-lr8e-3": _moe(*_MUON, *_experts(16, 1, 128), _SHARED, "optim.lr=8e-3"),
    "moe-muon-16-k1-lr8e-3": _moe(*_MUON, *_experts(16, 1, 256), "optim.lr=8e-3"),
    "moe-muon-b8-lr8e-3": _moe(*_MUON, "train.batch_size=8", "optim.lr=8e-3"),
    "twin-muon-b8-lr8e-3": _twin(*_MUON, "train.batch_size=8", "optim.lr=8e-3"),
    "moe-muon-fall-lr8e-3": _moe(*_MUON, *_FALL, "optim.lr=8e-3"),
    "twin-muon-fall-lr8e-3": _twin(*_MUON, *_FALL, "optim.lr=8e-3"),
    "moe-muon-switch1e-3-lr8e-3": _moe(*_MUON, "balance.switch=1e-3", "optim.lr=8e-3"),
    "moe-muon-loss-free-lr8e-3": _moe(*_MUON, *_LOSS_FREE, "optim.lr=8e-3"),
    # Number and size of experts, at equal active width.
    "moe-32": _moe(*_experts(32)),
    "moe-64": _moe(*_experts(64)),
    "moe-32-k4": _moe(*_experts(32, 4, 64)),
    "moe-64-k4": _moe(*_experts(64, 4, 64)),
    "moe-16-k1": _moe(*_experts(16, 1, 256)),
    "moe-shared": _moe(*_experts(16, 1, 128), _SHARED),
    "moe-dense-first": _moe("model.dense_first=1"),
    # Balance.
    "moe-loss-free-lr4e-3": _moe(*_LOSS_FREE, "balance.bias_rate=1e-2", "optim.lr=4e-3"),
    "moe-32-loss-free-lr4e-3": _moe(
        *_LOSS_FREE, *_experts(32), "balance.bias_rate=1e-2", "optim.lr=4e-3"
    ),
    "moe-32-lr4e-3": _moe(*_experts(32), "optim.lr=4e-3"),
    "moe-global": _moe("balance.scope=global"),
    "moe-none": _moe("balance.switch=0"),
    "moe-switch1e-3": _moe("balance.switch=1e-3"),
    # Start, schedule, decay.
    "moe-init0.1": _moe("model.moe.init_scale=0.1"),
    "moe-wd0": _moe("optim.weight_decay=0"),
    "twin-wd0": _twin("optim.weight_decay=0"),
    "moe-wsd": _moe("optim.schedule=wsd", "optim.decay=0.5", "optim.final_lr=0"),
    "twin-wsd": _twin("optim.schedule=wsd", "optim.decay=0.5", "optim.final_lr=0"),
    # Half as long as the twin.
    **{f"moe-half-lr{r}": _moe(f"optim.lr={r}", length=0.5) for r in ("2e-3", "4e-3", "8e-3")},
    **{
        f"moe-{n}-half-lr{r}": _moe(*_experts(n), f"optim.lr={r}", length=0.5)
        for n in (32, 64)
        for r in ("2e-3", "4e-3", "8e-3")
    },
    "moe-muon-half-lr4e-3": _moe(*_MUON, "optim.lr=4e-3", length=0.5),
    "moe-muon-half-lr8e-3": _moe(*_MUON, "optim.lr=8e-3", length=0.5),
    "moe-muon-32-half-lr8e-3": _moe(*_MUON, *_experts(32), "optim.lr=8e-3", length=0.5),
    # A narrower model, which a text of the same length brings nearer to its limit.
    **{f"narrow-twin-lr{r}": _twin(*_NARROW, f"optim.lr={r}") for r in _RATES},
    **{
        f"narrow-{n}-lr{r}": _moe(*_NARROW, *_experts(n, 2, 64), f"optim.lr={r}")
        for n in (16, 32, 64)
        for r in _RATES
    },
    **{
        f"narrow-{n}-half-lr{r}": _moe(*_NARROW, *_experts(n, 2, 64), f"optim.lr={r}", length=0.5)
        for n in (16, 32, 64)
        for r in _RATES
    },
    # Both, a narrower model and smaller steps.
    **{
        f"narrow-{n}-b{b}-lr{r}": _moe(
            *_NARROW, *_experts(n, 2, 64), f"train.batch_size={b}", f"optim.lr={r}"
        )
        for n in (16, 32, 64)
        for b in (2, 4)
        for r in ("1e-3", *_RATES)
    },
    **{
        f"narrow-twin-b{b}-lr{r}": _twin(*_NARROW, f"train.batch_size={b}", f"optim.lr={r}")
        for b in (2, 4)
        for r in ("1e-3", *_RATES)
    },
    **{
        f"{name}-twin-lr{r}": _twin(*_experts(16, 2, hidden), *shape, f"optim.lr={r}")
        for name, (hidden, shape) in _SHAPES.items()
        for r in _RATES
    },
    **{
        f"{name}-{n}-lr{r}": _moe(*_experts(n, 2, hidden), *shape, f"optim.lr={r}")
        for name, (hidden, shape) in _SHAPES.items()
        for n in (16, 32, 64, 128)
        for r in _RATES
    },
    # What keeps experts evenly used, over seeds.
    "balance-none": _moe(*_BALANCE, "balance.switch=0", length=0.5),
    "balance-switch": _moe(*_BALANCE, length=0.5),
    "balance-switch-global": _moe(*_BALANCE, "balance.scope=global", length=0.5),
    "balance-loss-free": _moe(*_BALANCE, *_BIAS, "balance.bias_rate=1e-2", length=0.5),
}
