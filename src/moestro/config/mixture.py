"""Settings of one mixture-of-experts layer and of the dense network in its place.

Letters follow docs/shapes.md: D width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moestro.config.number import Fraction, Positive, PositiveFloat
from moestro.settings import Settings

Activation = Literal["swiglu", "geglu", "clamped_swiglu", "relu", "gelu"]


class RouterConfig(Settings):
    """Which experts each token goes to, with what weight. See `moestro.moe.routers`."""

    kind: Literal["softmax", "sigmoid", "noisy_top_k", "sparsemixer", "expert_choice", "hash"] = (
        "softmax"
    )
    renormalize: bool | None = Field(
        None,
        description="Divide the K weights by their sum. Unset: yes for K > 1 but with sparsemixer, "
        "whose two need not sum to one; no for K = 1 (Switch), where a softmax gate would become "
        "the constant 1 and the router learn nothing.",
    )
    selection_bias: bool = Field(
        False, description="Add a bias per expert when choosing (loss-free balancing)."
    )
    bias: bool = Field(False, description="Add a learned bias to the logits (gpt-oss).")
    num_groups: Positive = 1
    top_groups: Positive = 1
    group_score: Literal["max", "top2"] = "top2"
    scale: PositiveFloat = 1.0
    weighs: Literal["output", "input"] = Field(
        "output",
        description="What an expert's weight multiplies: its output, or (Llama-4) its input.",
    )
    jitter: Fraction = 0.0

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
        if self.bias and self.kind == "hash":
            raise ValueError("the hash router has no logits to add a bias to; leave bias off")
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

    factor: PositiveFloat = 1.25
    eval_factor: PositiveFloat = 2.0
    priority: Literal["arrival", "router"] = "arrival"
    scope: Literal["rank", "global"] = Field(
        "rank",
        description="Whose tokens share the capacity in training: those of each rank's "
        "micro-batch, or those of all ranks', the first rank's first. Otherwise a call's own.",
    )
    per_sequence: Positive | None = Field(
        None,
        description="C itself, counted in each sequence alone, whatever the factors (the Switch "
        "Transformer checkpoints in transformers).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.per_sequence is not None and self.scope == "global":
            raise ValueError(
                "per_sequence counts in each sequence alone, wherever it is; leave scope = 'rank'"
            )
        return self


class ExpertsConfig(Settings):
    """What is inside each expert beside its matrices."""

    bias: bool = Field(False, description="Biases on all projections (gpt-oss).")
    dropout: Fraction = Field(
        0.0, description="Chance of zeroing an expert's hidden unit in training."
    )


class MoEConfig(Settings):
    """One mixture-of-experts layer, in place of a feed-forward network."""

    dim: Positive = Field(description="D, the width of the tokens.")
    hidden_dim: Positive = Field(description="F, the hidden width of one expert.")
    num_experts: Positive = 8
    top_k: Positive = 2
    activation: Activation = "swiglu"
    router: RouterConfig = RouterConfig()
    shared: SharedConfig | None = None
    capacity: CapacityConfig | None = None
    experts: ExpertsConfig = ExpertsConfig()
    init_scale: PositiveFloat = Field(
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
        if router.kind == "sparsemixer" and self.top_k != 2:
            raise ValueError(f"sparsemixer chooses 2 experts; top_k is {self.top_k}, set it to 2")
        if router.kind == "sparsemixer" and router.jitter == 0:
            raise ValueError(
                "sparsemixer compares logits within 2 · jitter; with jitter = 0 every weight is 1 "
                "and the router learns nothing; set jitter, as to 0.01"
            )
        if router.weighs == "input" and (
            self.top_k != 1 or router.kind not in ("softmax", "sigmoid")
        ):
            raise ValueError(
                f"weighs = input is for the kinds softmax and sigmoid with top_k = 1; kind is "
                f"{router.kind} and top_k {self.top_k}"
            )
        if router.renormalize and self.top_k == 1 and router.kind in ("softmax", "noisy_top_k"):
            raise ValueError(
                "renormalize with top_k = 1: a weight divided by itself makes every weight the "
                "constant 1, so the router gets no gradient; leave renormalize unset, or choose "
                "2 experts or more"
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

    @property
    def noisy(self) -> bool:
        """Whether training draws random numbers."""
        kind = self.router.kind  # sparsemixer's jitter is a distance
        drawn = kind == "noisy_top_k" or (self.router.jitter > 0 and kind != "sparsemixer")
        return drawn or self.experts.dropout > 0

    @property
    def renormalizes(self) -> bool:
        """Whether the K weights are divided by their sum: `router.renormalize`, or its default."""
        chosen = self.router.renormalize
        if chosen is None:
            return self.top_k > 1 and self.router.kind != "sparsemixer"
        return chosen


class DenseConfig(Settings):
    """The feed-forward network of layers that are not mixtures."""

    hidden_dim: Positive = 256
    activation: Activation = "swiglu"
