"""The settings of each component: frozen, nested, one default in one place.

Letters follow docs/shapes.md: D width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moestro.settings import Settings

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Coefficient = Annotated[float, Field(ge=0.0)]
Activation = Literal["swiglu", "geglu", "relu", "gelu"]


class RouterConfig(Settings):
    """Who goes where, and with what weight. See `moestro.moe.routers`."""

    kind: Literal["softmax", "sigmoid", "noisy_top_k", "expert_choice", "hash"] = "softmax"
    renormalize: bool | None = Field(
        None,
        description="Divide the K weights by their sum. Unset: yes for K > 1, no for K = 1 "
        "(Switch), where a softmax gate would become the constant 1 and the router learn nothing.",
    )
    selection_bias: bool = Field(
        False, description="Add a bias per expert when choosing (loss-free balancing)."
    )
    num_groups: Positive = 1
    top_groups: Positive = 1
    group_score: Literal["max", "top2"] = "top2"
    scale: Annotated[float, Field(gt=0.0)] = 1.0
    jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups is {self.top_groups}, but there are only {self.num_groups} groups; "
                "lower top_groups or raise num_groups"
            )
        chosen_by_score = self.kind in ("softmax", "sigmoid")
        if self.selection_bias and not chosen_by_score:
            raise ValueError(
                f"selection_bias works with the kinds softmax and sigmoid, not {self.kind}; "
                "turn it off or change kind"
            )
        if self.num_groups > 1 and not chosen_by_score:
            raise ValueError(
                f"num_groups > 1 works with the kinds softmax and sigmoid, not {self.kind}"
            )
        return self


class SharedConfig(Settings):
    """A feed-forward network that every token passes, beside the routed experts."""

    hidden_dim: Positive
    gate: bool = Field(False, description="Scale its output by sigmoid(x · w), one per token.")


class CapacityConfig(Settings):
    """Most tokens an expert may take: C = ceil(factor · T · K / E); the rest are dropped."""

    factor: Annotated[float, Field(gt=0.0)] = 1.25
    eval_factor: Annotated[float, Field(gt=0.0)] = 2.0
    priority: Literal["arrival", "router"] = "arrival"


class MoEConfig(Settings):
    """One mixture-of-experts layer, in the place of a feed-forward network."""

    dim: Positive = Field(description="D, the width of the tokens.")
    hidden_dim: Positive = Field(description="F, the hidden width of one expert.")
    num_experts: Positive = 8
    top_k: Positive = 2
    activation: Activation = "swiglu"
    router: RouterConfig = RouterConfig()
    shared: SharedConfig | None = None
    capacity: CapacityConfig | None = None
    expert_dropout: Fraction = 0.0
    init_scale: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="s in Var = s / fan-in; Switch Transformer's reduced scale is 0.1."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {self.num_experts} experts; "
                f"choose top_k between 1 and {self.num_experts}, or raise num_experts"
            )
        router = self.router
        if router.renormalize and self.top_k == 1 and router.kind in ("softmax", "noisy_top_k"):
            raise ValueError(
                "renormalize with top_k = 1 makes every weight the constant 1, so the router gets "
                "no gradient; leave renormalize unset"
            )
        if self.num_experts % router.num_groups:
            raise ValueError(
                f"{self.num_experts} experts do not split into {router.num_groups} equal groups"
            )
        eligible = self.num_experts // router.num_groups * router.top_groups
        if self.top_k > eligible:
            raise ValueError(
                f"top_k is {self.top_k}, but {router.top_groups} of {router.num_groups} groups "
                f"hold only {eligible} experts; raise top_groups or lower top_k"
            )
        if router.kind == "expert_choice" and self.capacity is not None:
            raise ValueError("expert_choice fills every expert exactly; leave capacity unset")
        return self


class AttentionConfig(Settings):
    """Grouped-query attention with rotary positions."""

    num_heads: Positive = 4
    num_kv_heads: Positive | None = Field(None, description="G; unset: as many as num_heads.")
    head_dim: Positive | None = Field(None, description="A; unset: dim / num_heads.")
    qk_norm: bool = False
    rope_theta: Annotated[float, Field(gt=0.0)] = 10_000.0
    context: Positive = Field(256, description="Most tokens a position looks back on.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads do not share {self.num_kv_heads} key/value heads evenly"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        return self


class DenseConfig(Settings):
    """The feed-forward network of the layers that are no mixtures."""

    hidden_dim: Positive = 256
    activation: Activation = "swiglu"


class ModelConfig(Settings):
    """A decoder language model; `moe` unset is a dense one."""

    vocab_size: Positive = 256
    dim: Positive = 128
    num_layers: Positive = 4
    dense: DenseConfig = DenseConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig | None = None
    moe_every: Positive = Field(1, description="Every n-th layer is a mixture.")
    dense_first: Annotated[int, Field(ge=0)] = Field(0, description="First layers kept dense.")
    tie_embeddings: bool = True
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6

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
    def _consistent(self) -> Self:
        if self.moe is not None and self.moe.dim != self.dim:
            raise ValueError(
                f"moe.dim is {self.moe.dim} but the model's dim is {self.dim}; "
                "leave moe.dim out, or set both to the same width"
            )
        heads = self.attention.num_heads
        if self.attention.head_dim is None and (self.dim % heads or self.dim // heads % 2):
            raise ValueError(
                f"dim {self.dim} over {heads} heads is not an even whole number per head; "
                "change one of them, or set attention.head_dim"
            )
        if self.moe is not None and not any(map(self.is_moe_layer, range(self.num_layers))):
            raise ValueError(
                f"no layer is a mixture: num_layers {self.num_layers}, dense_first "
                f"{self.dense_first}, moe_every {self.moe_every}; lower one of the last two"
            )
        return self

    @property
    def head_dim(self) -> int:
        """A, the width of one attention head."""
        return self.attention.head_dim or self.dim // self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """G, the number of key/value heads."""
        return self.attention.num_kv_heads or self.attention.num_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds a mixture."""
        return (
            self.moe is not None and layer >= self.dense_first and (layer + 1) % self.moe_every == 0
        )


class DataConfig(Settings):
    """What text to read, how to cut it, what to hold out."""

    sources: tuple[str, ...] = Field(
        ("builtin",),
        description="Files, folders or globs; 'builtin' is text every Python installation has.",
    )
    domains: Literal["folder", "file", "field", "none"] = Field(
        "folder", description="Where a document's label comes from."
    )
    text_field: str = "text"
    domain_field: str = "domain"
    tokenizer: str = Field(
        "bytes", description="'bytes', 'bpe:SIZE' (trained on the text), or a tokenizer.json."
    )
    seq_len: Annotated[int, Field(ge=2)] = 256
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="Share of the documents kept for evaluation."
    )
    domain_bytes: Positive | None = Field(
        None, description="Most bytes taken of one domain, so that none drowns the others."
    )
    seed: int = 0


class BalanceConfig(Settings):
    """What keeps the experts evenly used: the weight of each loss, summed over the layers."""

    switch: Coefficient = 0.01
    scope: Literal["micro", "sequence", "global"] = Field(
        "micro",
        description="Over what the Switch loss counts: a micro-batch, each sequence, or "
        "the micro-batches of a step so far, of all ranks.",
    )
    importance: Coefficient = 0.0
    load: Coefficient = Field(0.0, description="Smooth load CV²; needs the noisy_top_k router.")
    z: Coefficient = 0.001
    bias_rate: Coefficient = Field(
        0.0, description="u of the loss-free bias update; needs router.selection_bias."
    )


class OptimConfig(Settings):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0.0)] = 2e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.05, description="Share of the steps spent warming up."
    )
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2, description="Share of the steps spent decaying (wsd only)."
    )
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.1, description="Learning rate at the end, as a share of lr."
    )
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Coefficient = 0.1
    clip: Annotated[float, Field(gt=0.0)] = 1.0


class RuntimeConfig(Settings):
    """Choices that change speed or output, never the settings of the experiment."""

    device: str = "auto"
    backend: str = Field("auto", description="Kernel backend; `moestro doctor` lists them.")
    compile: bool = False
    checkpoint_activations: bool = False
    tensorboard: bool = False


class TrainConfig(Settings):
    """How long to train, in what precision, and what to save."""

    steps: Positive = 500
    batch_size: Positive = Field(16, description="Sequences per step, over all ranks.")
    accumulate: Positive = Field(1, description="Micro-batches per step.")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_every: Positive = 100
    eval_tokens: Positive = 65_536
    save_every: Positive = 250
    keep: Positive = Field(2, description="Checkpoints kept; the newest good one always is.")
    seed: int = 0
    runtime: RuntimeConfig = RuntimeConfig()


class RunConfig(Settings):
    """Everything that describes one run; saved beside every checkpoint."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.seq_len > self.model.attention.context:
            raise ValueError(
                f"data.seq_len is {self.data.seq_len}, but model.attention.context is only "
                f"{self.model.attention.context}; raise the context or shorten the sequences"
            )
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} does not split into "
                f"{self.train.accumulate} micro-batches"
            )
        router = self.model.moe.router if self.model.moe else None
        if router and self.balance.bias_rate and not router.selection_bias:
            raise ValueError(
                "balance.bias_rate is set, but the router has no bias; "
                "set model.moe.router.selection_bias = true"
            )
        if router and self.balance.load and router.kind != "noisy_top_k":
            raise ValueError(
                f"balance.load needs the noisy_top_k router, not {router.kind}; "
                "set it to 0 or change model.moe.router.kind"
            )
        return self
