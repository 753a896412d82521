"""What a model's settings decide about how its tokens pass: natively or not, in chunks or whole.

Known without torch, since memory is counted from it before a model is opened.
"""

from __future__ import annotations

from moestro.config import LongRopeScaling, ModelConfig, NetworkConfig, RopeConfig, WindowConfig

# Tokens of a prompt per pass: enough rows for each expert, few enough for their memory.
CHUNK = 512
# Logits that a pass may leave where those of a whole prompt are wanted: 64 MiB.
MOST_LOGITS = 2**24
# Routers whose choices the native step makes.
_ROUTERS = ("softmax", "sigmoid", "sparsemixer")


def chunked(cfg: NetworkConfig) -> bool:
    """Whether a prompt may pass in chunks without changing what the model computes.

    Not where tokens compete for an expert's capacity, nor where angles depend on the whole length,
    nor through an encoder.
    """
    positions, moe = cfg.attention.positions, cfg.moe
    if cfg.has_encoder:
        return False
    if isinstance(positions, RopeConfig) and isinstance(positions.scaling, LongRopeScaling):
        return False
    return moe is None or (moe.capacity is None and moe.router.kind != "expert_choice")


def lacks(cfg: NetworkConfig) -> str | None:
    """What in the settings the native step does not have; None: nothing."""
    if not isinstance(cfg, ModelConfig):
        return "no native step for encoder-decoders"
    attention, moe = cfg.attention, cfg.moe
    lacking = {
        "relative positions": not isinstance(attention.positions, RopeConfig),
        "layers without positions": isinstance(attention.positions, RopeConfig)
        and attention.positions.skipped_every > 0,
        "chunked attention": isinstance(attention.window, WindowConfig)
        and attention.window.chunked,
        "normed queries without gains": attention.qk_norm == "unit",
        "an indexer of positions": attention.latent is not None
        and attention.latent.indexer is not None,
        "short convolutions": attention.conv is not None,
        "a scaled residual with normed queries": cfg.norm.residual_scale != 1
        and attention.qk_norm != "none",
    }
    if moe is not None:
        router = moe.router
        lacking["a capacity"] = moe.capacity is not None
        lacking["weights of the experts' inputs"] = router.weighs == "input"
        lacking[f"the {router.kind} router"] = router.kind not in _ROUTERS
    return next((f"no native step for {what}" for what, absent in lacking.items() if absent), None)
