"""Settings of attention: heads, positions, windows, and the latent kind of DeepSeek-V2."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from moestro.config.number import MOST, Natural, Positive, PositiveFloat, Share
from moestro.settings import Settings

# How keys and values are kept: in the weights' dtype, or as bytes with a scale a row.
CacheKind = Literal["as-is", "int8"]


class LinearScaling(Settings):
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat = Field(description="How many times longer the context becomes.")


class Llama3Scaling(Settings):
    """Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat = Field(description="Divides the low frequencies.")
    low_freq_factor: PositiveFloat = Field(
        1.0, description="Frequencies with fewer periods than this in the original context are low."
    )
    high_freq_factor: PositiveFloat = Field(
        4.0, description="Frequencies with more periods are high."
    )
    original_context: Positive = Field(description="The context it was first trained with.")


class YarnScaling(Settings):
    """Frequencies blended by their number of periods; attention sharpened (Peng et al. 2023)."""

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat = Field(description="How many times longer the context becomes.")
    original_context: Positive = Field(description="The context it was first trained with.")
    beta_fast: PositiveFloat = Field(
        32.0, description="Frequencies with more periods in the original context are kept."
    )
    beta_slow: PositiveFloat = Field(
        1.0, description="Frequencies with fewer periods are divided by factor."
    )
    attention_factor: PositiveFloat | None = Field(
        None, description="Cosines and sines are multiplied by it; unset: 0.1 · ln(factor) + 1."
    )
    mscale: float | None = Field(None, description="DeepSeek's m in 0.1 · m · ln(factor) + 1.")
    mscale_all_dim: float | None = Field(
        None, description="The same for the whole head: it scales the attention scores (squared)."
    )
    truncate: bool = Field(True, description="Round the borders of the blend to whole dimensions.")


class LongRopeScaling(Settings):
    """A divisor for each frequency, one list within the original context and one beyond it."""

    kind: Literal["longrope"] = "longrope"
    short_factor: tuple[float, ...] = Field(description="Divisors within the original context.")
    long_factor: tuple[float, ...] = Field(description="Divisors beyond it.")
    original_context: Positive = Field(description="The context it was first trained with.")
    short_scale: PositiveFloat = Field(
        1.0, description="Multiplies cosines and sines within the original context."
    )
    long_scale: PositiveFloat = Field(1.0, description="Multiplies cosines and sines beyond it.")


RopeScaling = Annotated[
    LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling, Field(discriminator="kind")
]


class TemperatureConfig(Settings):
    """Queries grow with their position p by 1 + scale · ln(1 + ⌊(p + 1) / length⌋) (Llama-4)."""

    scale: PositiveFloat = Field(0.1, description="How fast they grow.")
    length: Positive = Field(8192, description="Positions up to which they do not.")


class RopeConfig(Settings):
    """Rotary positions (Su et al. 2021)."""

    kind: Literal["rope"] = "rope"
    theta: PositiveFloat = Field(10_000.0, description="Base of the rotary angles.")
    fraction: Share = Field(
        1.0,
        description="Of each head, from its first number on, that turns; the rest has no position.",
    )
    scaling: RopeScaling | None = Field(
        None, description="How angles extend beyond the training context."
    )
    score_scale: PositiveFloat | None = Field(
        None, description="Of attention scores (Granite); unset: 1 / sqrt(head_dim)."
    )
    skipped_every: Natural = Field(
        0, description="Every n-th layer has no positions (Llama-4); 0: all have."
    )
    temperature: TemperatureConfig | None = Field(
        None, description="Of the queries of layers without positions."
    )


class RelativeConfig(Settings):
    """A learned bias per head and bucket of distances (Raffel et al. 2020, T5).

    As in T5, the scores are not divided by the square root of the head's width.
    """

    kind: Literal["relative"] = "relative"
    buckets: Annotated[int, Field(ge=4, le=MOST)] = Field(
        32, description="Entries of the table per head."
    )
    max_distance: Positive = Field(128, description="From here on all distances share one bucket.")
    shared: bool = Field(False, description="One table for all layers (T5) or one in each (GLaM).")


def _kind_or(default: str) -> Discriminator:
    """Tells kinds apart by `kind`, which may be left out for the `default`."""

    def kind(value: Any) -> str:
        given = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        return default if given is None else str(given)

    return Discriminator(kind)


Positions = Annotated[
    Annotated[RopeConfig, Tag("rope")] | Annotated[RelativeConfig, Tag("relative")],
    _kind_or("rope"),
]


class WindowConfig(Settings):
    """Layers that attend to a few tokens only."""

    kind: Literal["window"] = "window"
    size: Positive = Field(description="Tokens a position attends to, itself included.")
    full_every: Natural = Field(
        0, description="Every n-th layer still has full attention; 0: none."
    )
    chunked: bool = Field(
        False, description="Texts are cut into pieces of `size`; a token sees its own (Llama-4)."
    )


class DeltaConfig(Settings):
    """Gated DeltaNet layers (Yang, Kautz and Hatamizadeh 2024) beside those with attention.

    They look back through a state of fixed size, one matrix per value head: it decays, and each
    token replaces what the state holds for its key.
    """

    kind: Literal["delta"] = "delta"
    key_heads: Positive = Field(description="Heads of queries and keys.")
    value_heads: Positive = Field(description="Heads of values; as many share a key head evenly.")
    key_dim: Positive = Field(description="Width of a query and of a key.")
    value_dim: Positive = Field(description="Width of a value.")
    conv_width: Positive = Field(
        4, description="Tokens that the causal convolution of queries, keys and values sees."
    )
    full_every: Natural = Field(
        4, description="Every n-th layer has attention instead; 0: none has."
    )
    gated_attention: bool = Field(
        True,
        description="Attention's output is scaled by sigmoid(x · W), per number (Qwen3-Next).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"{self.value_heads} value_heads do not share {self.key_heads} key_heads evenly"
            )
        return self

    @property
    def key_width(self) -> int:
        """Of all keys together; of the queries too."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Of all values together; of their gates too."""
        return self.value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Numbers of a token that pass the convolution."""
        return 2 * self.key_width + self.value_width


class ConvConfig(Settings):
    """Gated short convolutions (LFM2, Liquid AI 2025) beside layers with attention."""

    kind: Literal["conv"] = "conv"
    width: Positive = Field(3, description="Tokens that a convolution sees.")
    attention_layers: tuple[Natural, ...] = Field(
        (), description="Numbers, from 0, of the layers that have attention instead."
    )


Mix = Annotated[
    Annotated[WindowConfig, Tag("window")]
    | Annotated[DeltaConfig, Tag("delta")]
    | Annotated[ConvConfig, Tag("conv")],
    _kind_or("window"),
]


class IndexerConfig(Settings):
    """Each token attends to the positions that score best with it (DeepSeek-V3.2, §2.1)."""

    num_heads: Positive = Field(64, description="Heads of the scores.")
    head_dim: Positive = Field(128, description="Width of one; the cache keeps it too.")
    top_k: Positive = Field(2048, description="Positions that a token attends to.")


class LatentConfig(Settings):
    """Multi-head latent attention (DeepSeek-V2, §2.1): keys and values from one small vector."""

    q_rank: Positive | None = Field(None, description="Width of the queries' vector; unset: none.")
    kv_rank: Positive = Field(description="Width of the vector that the cache keeps.")
    nope_dim: Positive = Field(description="Width of a head's part without positions.")
    rope_dim: Positive = Field(description="Width of its rotary part; the keys share one.")
    value_dim: Positive = Field(description="Width of a head's values.")
    indexer: IndexerConfig | None = Field(
        None, description="Chooses the positions to attend to (DeepSeek-V3.2); unset: all."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}; rotary positions need an even number")
        if self.indexer is not None:
            if self.q_rank is None:
                raise ValueError("an indexer reads the queries' vector; set q_rank")
            if self.indexer.head_dim < self.rope_dim:
                raise ValueError(
                    f"indexer.head_dim is {self.indexer.head_dim}; rope_dim = {self.rope_dim} "
                    "numbers of it turn, so choose as many or more"
                )
        return self


class AttentionConfig(Settings):
    """Attention of a decoder, or of both sides of an encoder-decoder."""

    num_heads: Positive = Field(4, description="H, query heads.")
    num_kv_heads: Positive | None = Field(None, description="G; unset: as many as num_heads.")
    head_dim: Positive | None = Field(None, description="A; unset: dim / num_heads.")
    qk_norm: Literal["none", "head", "full", "rotated", "unit"] = Field(
        "none",
        description="RMSNorm of queries and keys: of each head, of all together (OLMoE), or of "
        "each head after its rotation, with gains (rotated: Hunyuan) or without and only in "
        "layers with positions (unit: Llama-4).",
    )
    bias: Literal["none", "qkv", "all"] = Field(
        "none", description="Which projections have a bias."
    )
    window: Mix | None = Field(
        None, description="Layers that see only a window, keep only a state, or convolve."
    )
    sinks: bool = Field(
        False, description="A learned score per head that takes attention from all keys (gpt-oss)."
    )
    positions: Positions = RopeConfig()
    latent: LatentConfig | None = Field(
        None,
        description="DeepSeek's latent attention; num_kv_heads and head_dim are then ignored.",
    )
    context: Positive = Field(256, description="Most tokens a position attends to.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads do not share {self.num_kv_heads} key/value heads evenly"
            )
        rope = isinstance(self.positions, RopeConfig)
        if self.head_dim is not None and self.head_dim % 2 and rope:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.qk_norm in ("rotated", "unit") and not rope:
            raise ValueError(
                f"qk_norm is {self.qk_norm}, but positions are not rotary; choose head"
            )
        for name, found in (("delta", self.delta), ("conv", self.conv)):
            if found is not None and not rope:
                raise ValueError(
                    f"a model with {name} layers has rotary positions; leave positions out"
                )
        if self.latent is not None:
            self._check_latent()
        return self

    @property
    def delta(self) -> DeltaConfig | None:
        """The delta layers beside those with attention, where there are any."""
        return self.window if isinstance(self.window, DeltaConfig) else None

    @property
    def conv(self) -> ConvConfig | None:
        """The convolutions beside layers with attention, where there are any."""
        return self.window if isinstance(self.window, ConvConfig) else None

    def _check_latent(self) -> None:
        for name in ("num_kv_heads", "head_dim", "window"):
            if getattr(self, name) is not None:
                raise ValueError(f"latent attention has no {name}; leave it out")
        plain = self.qk_norm == "none" and self.bias == "none" and not self.sinks
        if not plain or not isinstance(self.positions, RopeConfig):
            raise ValueError(
                "latent attention has rotary positions, and neither qk_norm, bias nor sinks; "
                "leave them out"
            )
        if self.positions.score_scale is not None:
            raise ValueError(
                "latent attention scales its scores itself; leave positions.score_scale out"
            )
        if self.positions.fraction != 1:
            raise ValueError(
                "of a latent head, rope_dim numbers turn; leave positions.fraction out"
            )
        if self.positions.skipped_every:
            raise ValueError(
                "latent attention turns in every layer; leave positions.skipped_every out"
            )
