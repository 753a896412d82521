"""Settings of a run: text, balance, optimiser, training, and all of them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from moestro.config.model import EncDecConfig, ModelConfig
from moestro.config.number import Coefficient, Fraction, Positive, PositiveFloat, Seed
from moestro.config.parallel import ParallelConfig
from moestro.settings import Settings


class ChatConfig(Settings):
    """How conversations become rows of tokens, of which only the assistant's are learned."""

    pack: bool = Field(
        True, description="Several conversations in one row of seq_len tokens, each on its own."
    )
    turns: Literal["all", "each"] = Field(
        "all",
        description="Each conversation once, with all turns of the assistant; or, for templates "
        "that rewrite earlier turns, once for each, as it was when that turn was written.",
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
        "bytes",
        description="'bytes', 'bpe:SIZE' (trained on the text), a tokenizer.json, or its folder.",
    )
    seq_len: Annotated[int, Field(ge=2)] = 256
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="Share of the documents kept for evaluation."
    )
    domain_bytes: Positive | None = Field(
        None, description="Most bytes taken of one domain, so that none dominates."
    )
    seed: Seed = 0
    chat: ChatConfig | None = Field(
        None, description="Sources are .jsonl files of conversations; see docs/tuning.md."
    )


class BalanceConfig(Settings):
    """What keeps the experts evenly used: the weight of each loss, summed over the layers."""

    switch: Coefficient = 0.01
    scope: Literal["micro", "sequence", "global"] = Field(
        "micro",
        description="The tokens that the Switch loss counts: a micro-batch, each sequence, or "
        "the micro-batches of a step so far, of all ranks.",
    )
    importance: Coefficient = 0.0
    load: Coefficient = Field(0.0, description="Smooth load CV²; needs the noisy_top_k router.")
    z: Coefficient = 0.001
    bias_rate: Coefficient = Field(
        0.0, description="u of the loss-free bias update; needs router.selection_bias."
    )


class OptimConfig(Settings):
    """The optimizer and its learning-rate schedule."""

    matrices: Literal["adamw", "muon"] = Field(
        "adamw",
        description="What updates the matrices of attention, experts and dense networks; all else "
        "is AdamW's.",
    )
    lr: PositiveFloat = 2e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: Fraction = Field(0.05, description="Share of the steps spent warming up.")
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2, description="Share of the steps spent decaying (wsd only)."
    )
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.1, description="Learning rate at the end, as a share of lr."
    )
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Coefficient = 0.1
    freeze: tuple[Literal["router"], ...] = Field((), description="What is not trained: 'router'.")
    clip: PositiveFloat = 1.0


class LoraConfig(Settings):
    """Low-rank adapters that are trained in place of the weights (Hu et al. 2021)."""

    base: str = Field("", description="The checkpoint that they belong to; `tune` sets it.")
    base_digest: str = Field("", description="Tells when its files change; `tune` sets it.")
    rank: Positive = Field(16, description="Columns of each pair of matrices.")
    alpha: PositiveFloat | None = Field(
        None, description="Adapters count alpha / rank times; default: 2 · rank."
    )
    dropout: Fraction = Field(0.0, description="Of what adapters read, in training.")
    targets: tuple[Literal["attention", "router", "experts", "dense"], ...] = Field(
        ("attention", "router", "experts", "dense"),
        min_length=1,
        description="Where they are; `experts` is all experts, one pair each, `dense` dense "
        "networks and shared experts.",
    )
    weights: Literal["as-is", "int8", "int4"] = Field(
        "as-is", description="The base's, packed to save memory (QLoRA)."
    )

    accept_fields: tuple[str, ...] = Field(
        (), description="Unknown fields of the base's config.json that change nothing."
    )

    @property
    def scale(self) -> float:
        """What the product of a pair is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class RuntimeConfig(Settings):
    """Options that change speed or output, not the experiment itself."""

    device: str = "auto"
    backend: str = Field("auto", description="Kernel backend; `moestro doctor` lists them.")
    compile: bool = False
    checkpoint_activations: bool = False
    tensorboard: bool = False
    save: Literal["wait", "background"] = Field(
        "wait", description="background: training goes on while a copy is written."
    )


class TrainConfig(Settings):
    """How long to train, in what precision, and what to save."""

    steps: Positive = 500
    batch_size: Positive = Field(16, description="Sequences per step, over all ranks.")
    accumulate: Positive = Field(1, description="Micro-batches per step.")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    eval_every: Positive = 100
    eval_tokens: Positive = 65_536
    save_every: Positive = 250
    keep: Positive = Field(2, description="Checkpoints kept; the newest good one always is.")
    seed: Seed = 0
    runtime: RuntimeConfig = RuntimeConfig()


def _kind(value: Any) -> str:
    names = value if isinstance(value, dict) else getattr(type(value), "model_fields", ())
    two_sided = "encoder_layers" in names or "decoder_layers" in names
    return "encoder-decoder" if two_sided else "decoder"


AnyModel = Annotated[
    Annotated[ModelConfig, Tag("decoder")] | Annotated[EncDecConfig, Tag("encoder-decoder")],
    Discriminator(_kind),
]


class RunConfig(Settings):
    """Everything that describes one run; saved beside every checkpoint.

    Its `model` is an encoder-decoder when it sets `encoder_layers` or `decoder_layers`.
    """

    model: AnyModel = ModelConfig()
    data: DataConfig = DataConfig()
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig | None = Field(None, description="Adapters; unset: all weights are trained.")
    parallel: ParallelConfig = ParallelConfig()

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
        if self.lora is not None and self.balance.bias_rate:
            raise ValueError(
                "balance.bias_rate changes the routers' selection biases, which adapters do not "
                "keep; set balance.bias_rate = 0"
            )
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
