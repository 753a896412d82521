"""Settings of a whole model: a decoder, or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from moestro.config.attention import (
    AttentionConfig,
    ConvConfig,
    RelativeConfig,
    RopeConfig,
    WindowConfig,
)
from moestro.config.mixture import DenseConfig, MoEConfig
from moestro.config.number import Layers, Natural, Positive, PositiveFloat
from moestro.settings import Settings


class NormConfig(Settings):
    """The norm before each sublayer and at the end."""

    kind: Literal["rms", "layer"] = Field(
        "rms", description="RMSNorm, or LayerNorm with a bias (Phi-3.5-MoE)."
    )
    eps: PositiveFloat = Field(1e-6, description="Added to the mean square, or to the variance.")
    residual_scale: PositiveFloat = Field(
        1.0, description="What a sublayer returns is multiplied by it when it is added (Granite)."
    )
    zero_centred: bool = Field(
        False, description="RMSNorm multiplies by 1 + its weight, which starts at 0 (Qwen3-Next)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.zero_centred and self.kind != "rms":
            raise ValueError(f"zero_centred is of RMSNorm; kind is {self.kind}, so leave it off")
        return self


class HeadConfig(Settings):
    """From the last hidden state to the logits; and the scale of the embeddings."""

    tied: bool = Field(True, description="Use the input embedding's matrix.")
    bias: bool = Field(False, description="One per entry of the vocabulary.")
    scale: PositiveFloat = Field(
        1.0, description="The hidden state is multiplied by it (T5's tied head: 1 / sqrt(dim))."
    )
    embed_scale: PositiveFloat = Field(
        1.0, description="The embeddings are multiplied by it (Granite)."
    )


class LayerSpec(NamedTuple):
    """One block.

    Attributes:
        mixture: whether its feed-forward network is a mixture.
        window: most positions that its attention looks back on, its own included; None: no limit.
        chunk: tokens of the pieces that the text is cut into; attention stays within one.
        rotary: its queries and keys turn, where those of any layer do.
        state: what it is in place of attention: a gated DeltaNet or a short convolution.
    """

    mixture: bool
    window: int | None = None
    chunk: int | None = None
    rotary: bool = True
    state: Literal["delta", "conv"] | None = None


class StackSpec(NamedTuple):
    """Blocks that read one text.

    Attributes:
        layers: first block first.
        causal: a position sees those up to its own, else (an encoder) the whole text.
        cross: each block also attends to the output of the stack before.
    """

    layers: tuple[LayerSpec, ...]
    causal: bool = True
    cross: bool = False


class NetworkConfig(Settings):
    """What decoders and encoder-decoders have in common."""

    vocab_size: Positive = Field(
        256, description="V. Training raises it to what the tokenizer needs."
    )
    dim: Positive = Field(128, description="D, the width of the model.")
    dense: DenseConfig = DenseConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig | None = None
    moe_every: Positive = Field(1, description="Every n-th layer is a mixture.")
    norm: NormConfig = NormConfig()
    head: HeadConfig = HeadConfig()

    @model_validator(mode="before")
    @classmethod
    def _share_dim(cls, values: Any) -> Any:
        """`moe.dim` follows `dim` when it is left out."""
        if isinstance(values, Mapping) and isinstance(values.get("moe"), Mapping):
            default_dim = cls.model_fields["dim"].default
            moe = {"dim": values.get("dim", default_dim), **values["moe"]}
            return {**values, "moe": moe}
        return values

    @model_validator(mode="after")
    def _widths(self) -> Self:
        if self.moe is not None and self.moe.dim != self.dim:
            raise ValueError(
                f"moe.dim is {self.moe.dim} but the model's dim is {self.dim}; "
                "leave moe.dim out, or set both to the same width"
            )
        attention = self.attention
        if attention.latent is None and attention.head_dim is None:
            odd = isinstance(attention.positions, RopeConfig) and self.head_dim % 2
            if self.dim % attention.num_heads or odd:
                raise ValueError(
                    f"dim {self.dim} over {attention.num_heads} heads is not an even whole number "
                    "per head; change one of them, or set attention.head_dim"
                )
        if isinstance(attention.positions, RopeConfig) and attention.positions.fraction < 1:
            turning = int(self.head_dim * attention.positions.fraction)
            if turning == 0 or turning % 2:
                raise ValueError(
                    f"attention.positions.fraction = {attention.positions.fraction} of a head of "
                    f"width {self.head_dim} is {turning}; pairs turn, so choose an even number"
                )
        return self

    @property
    def head_dim(self) -> int:
        """A, the width of one attention head; without meaning for latent attention."""
        return self.attention.head_dim or self.dim // self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """G, the number of key/value heads."""
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads a text before the decoder writes another."""
        return len(self.stacks()) > 1

    def stacks(self) -> tuple[StackSpec, ...]:
        """The stacks of blocks in the order that they run; the last one predicts."""
        raise NotImplementedError  # each network has its own

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) of a stack holds a mixture."""
        return self.moe is not None and (layer + 1) % self.moe_every == 0


class ModelConfig(NetworkConfig):
    """A decoder language model; `moe` unset is a dense one."""

    num_layers: Layers = Field(4, description="L, transformer blocks.")
    dense_first: Natural = Field(0, description="First layers kept dense.")

    @model_validator(mode="after")
    def _some_mixture(self) -> Self:
        if self.moe is not None and not any(map(self.is_moe_layer, range(self.num_layers))):
            raise ValueError(
                f"no layer is a mixture: num_layers {self.num_layers}, dense_first "
                f"{self.dense_first}, moe_every {self.moe_every}; lower one of the last two"
            )
        return self

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds a mixture."""
        return layer >= self.dense_first and super().is_moe_layer(layer)

    def stacks(self) -> tuple[StackSpec, ...]:
        """One stack, whose windows never exceed the context."""
        return (StackSpec(tuple(self._layer(n) for n in range(self.num_layers))),)

    def _layer(self, layer: int) -> LayerSpec:
        context = self.attention.context
        window = min(self.window(layer) or context, context)
        state: Literal["delta", "conv"] | None = "delta" if self.is_delta_layer(layer) else None
        if self.is_conv_layer(layer):
            state = "conv"
        mix = self.attention.window
        chunked = isinstance(mix, WindowConfig) and mix.chunked
        chunk = self.window(layer) if chunked else None
        return LayerSpec(self.is_moe_layer(layer), window, chunk, self.is_rotary(layer), state)

    def window(self, layer: int) -> int | None:
        """Tokens that layer number `layer` (from 0) looks back on; None: the whole context."""
        window = self.attention.window
        return window.size if isinstance(window, WindowConfig) and self._mixed(layer) else None

    def is_rotary(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has rotary positions."""
        positions = self.attention.positions
        if not isinstance(positions, RopeConfig):
            return False
        return not (positions.skipped_every and (layer + 1) % positions.skipped_every == 0)

    def is_delta_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) is a gated DeltaNet."""
        return self.attention.delta is not None and self._mixed(layer)

    def is_conv_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) is a short convolution."""
        return self.attention.conv is not None and self._mixed(layer)

    def _mixed(self, layer: int) -> bool:
        """Whether a layer is of the kind in `attention.window`."""
        mix = self.attention.window
        if isinstance(mix, ConvConfig):
            return layer not in mix.attention_layers
        return mix is not None and not (mix.full_every and (layer + 1) % mix.full_every == 0)


class EncDecConfig(NetworkConfig):
    """An encoder-decoder language model (T5, Switch Transformer); learns to fill in hidden spans.

    A run's `model` is one when it sets `encoder_layers` or `decoder_layers`.
    """

    attention: AttentionConfig = AttentionConfig(positions=RelativeConfig(shared=True))
    encoder_layers: Layers = Field(4, description="Transformer blocks of the encoder.")
    decoder_layers: Layers = Field(4, description="Transformer blocks of the decoder.")

    @model_validator(mode="after")
    def _t5(self) -> Self:
        attention = self.attention
        plain = attention.latent is None and attention.window is None and not attention.sinks
        if not plain or attention.qk_norm != "none" or attention.bias != "none":
            raise ValueError(
                "an encoder-decoder's attention has neither latent, window, sinks, qk_norm nor "
                "bias; leave them out"
            )
        if not isinstance(attention.positions, RelativeConfig) or not attention.positions.shared:
            raise ValueError(
                'an encoder-decoder has positions = {kind = "relative", shared = true}'
            )
        shortest = min(self.encoder_layers, self.decoder_layers)
        if self.moe is not None and not any(map(self.is_moe_layer, range(shortest))):
            raise ValueError(
                f"no layer is a mixture: {shortest} layers, moe_every {self.moe_every}; lower it"
            )
        return self

    def stacks(self) -> tuple[StackSpec, ...]:
        """The encoder, and the decoder that attends to its output."""
        sides = (range(self.encoder_layers), range(self.decoder_layers))
        encoder, decoder = (tuple(LayerSpec(self.is_moe_layer(n)) for n in side) for side in sides)
        return StackSpec(encoder, causal=False), StackSpec(decoder, cross=True)
