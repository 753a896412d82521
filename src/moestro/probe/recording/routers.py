"""What is known of single router and experts classes of transformers, by their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How routers turn logits into scores, of transformers 5.24. In all, the probabilities are the
# scores divided by their sum.
_SIGMOID = (
    "AXK1TopkRouter", "AXK2TopkRouter", "AfmoeTokenChoiceRouter", "BailingHybridTopkRouter",
    "BeamTopKRouter", "DeepseekV32TopkRouter", "DeepseekV3TopkRouter", "Dots1TopkRouter",
    "Dots3NoteTextTopkRouter", "ExaoneMoeTopkRouter", "FlintTopKRouter",
    "Glm4MoeLiteTopkRouter", "Glm4MoeTopkRouter", "Glm4vMoeTextTopkRouter",
    "Glm5NextTextTopkRouter", "GlmMoeDsaTopkRouter", "HYV3TopKRouter", "HYV4TopkRouter",
    "HYV4VLTopkRouter", "InklingTopkRouter", "KimiLinearTopkRouter", "Kolibri1TopKRouter",
    "LagunaTopKRouter", "Lfm2MoeTopKRouter", "Llama4Router", "MiMoV2FlashTopkRouter",
    "MiniMaxM2TopKRouter", "MiniMaxM3VLTopKRouter", "NemotronHTopkRouter", "SolarOpenTopkRouter",
    "Step3p7TopKRouter",
)  # fmt: skip
_SOFTMAX = (
    "AriaTextTopKRouter", "DbrxRouter", "DeepseekOcr2TextTopkRouter", "DeepseekV2TopkRouter",
    "Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter", "FlexOlmoTopKRouter",
    "GptOssTopKRouter", "GraniteMoeHybridTopKRouter", "GraniteMoeSWATopKRouter",
    "GraniteMoeSharedTopKRouter", "GraniteMoeTopKRouter", "HunYuanMoEV1Gate", "JambaTopKRouter",
    "JetMoeTopKGating", "LaraMiniTopKRouter", "LongcatFlashTopkRouter", "MellumTopKRouter",
    "MiniMaxTopKRouter",
    "Mistral4TopkRouter", "MistralLarge4TextTopkRouter", "MixtralTopKRouter", "OlmoeTopKRouter",
    "OpenAIPrivacyFilterTopKRouter", "PhimoeTopKRouter", "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "Qwen3OmniMoeTextTopKRouter",
    "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3VLMoeTextTopKRouter", "Qwen3_5MoeTopKRouter",
    "Qwen4ExpTextTopKRouter", "UnlimitedOcrTextTopkRouter", "ZayaRouter",
)  # fmt: skip
SCORING = {
    **dict.fromkeys(_SIGMOID, "sigmoid"),
    **dict.fromkeys(_SOFTMAX, "softmax"),
    # Returns probabilities in the place of logits.
    "Gemma4TextRouter": "none",
    "DiffusionGemmaTextRouter": "none",
    # The settings choose; the router holds the choice in the attribute named here.
    "Cohere2MoeTopKRouter": "expert_selection_fn",
    "DeepseekV4HashRouter": "score_fn",
    "DeepseekV4TopKRouter": "score_fn",
    "Inkling2TopKRouter": "score_fn",
    "Inkling2LoopTopKRouter": "score_fn",
    "MuseSparkTopkRouter": "scoring_function",
}
# Where the number of experts stands, for classes that count those that pass tokens on unchanged.
COUNTS = {"LongcatFlashExperts": "total_experts"}
# A choice of weight 0 means that the token skips the mixture: counted as one more expert.
SKIPPING = frozenset({"ZayaExperts"})
# Mixtures of something other than feed-forward networks.
NOT_FEED_FORWARD = frozenset({"JetMoeMoA"})


class Other(NamedTuple):
    """How to see and change what a router returns whose experts are not handed its choices.

    Attributes:
        read: (router, output) → experts_TK, weights_TK, logits_TE.
        write: (router, output, experts_TK, weights_TK) → the output with that choice.
    """

    read: Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]
    write: Callable[[Any, Any, Tensor, Tensor], Any]


def passes_on(module: nn.Module) -> bool:
    """Whether a module takes whatever it is given, as wrappers do (adapters, compiled modules)."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(each.kind is each.VAR_POSITIONAL for each in parameters)


def core(module: nn.Module) -> nn.Module:
    """What a wrapper holds, or the module itself: the first that names what it takes."""
    return next((each for each in module.modules() if not passes_on(each)), module)


def outermost(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name of the outermost module that only passes calls on to the one of that name."""
    outer = name.rpartition(".")[0]
    while outer and passes_on(modules[outer]):
        if not isinstance(modules[outer], nn.ModuleDict | nn.ModuleList):
            name = outer
        outer = outer.rpartition(".")[0]
    return name


def kind(module: object) -> str:
    """The name of the class whose forward a module runs.

    Classes that are made at run time around another (FSDP, parametrizations) inherit its forward.
    """
    classes = type(module).__mro__
    return next((each.__name__ for each in classes if "forward" in vars(each)), classes[0].__name__)


def named(module: nn.Module | None) -> str:
    """What to call a module in messages: its class, within wrappers."""
    return "no router" if module is None else kind(core(module))


def scoring(router: nn.Module | None) -> str | None:
    """How a router's logits become probabilities; None: not known."""
    if router is None:
        return None
    found = SCORING.get(kind(core(router)))
    if found is None or found in ("sigmoid", "softmax", "none"):
        return found
    chosen = getattr(core(router), found, None)
    return chosen if chosen in ("sigmoid", "softmax") else found


def probabilities(how: str, router: Any, logits_TE: Tensor) -> Tensor:
    """Rows that sum to 1, at least fp32, of a router's logits."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if how == "none":
        return logits_TE
    if how == "softmax":
        return logits_TE.softmax(-1)
    if how == "sigmoid":
        return F.logsigmoid(logits_TE).softmax(-1)
    scores_TE: Tensor = getattr(core(router), how)(logits_TE)
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def _read_llama4(router: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all experts, zero for those not chosen: the largest are those in use."""
    scores_TE, logits_TE = output
    weights_TK, experts_TK = scores_TE.topk(router.top_k, dim=1)
    return experts_TK, weights_TK, logits_TE


def _write_llama4(router: Any, output: Any, experts_TK: Tensor, weights_TK: Tensor) -> Any:
    scores_TE, logits_TE = output
    return torch.zeros_like(scores_TE).scatter_add(1, experts_TK, weights_TK), logits_TE


def _read_jetmoe(router: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert, how many each has, and the place each came from."""
    places_R, _, weights_R, sizes, logits_TE = output
    counts_E = torch.tensor(sizes, dtype=torch.int64, device=places_R.device)
    experts_R = torch.arange(len(sizes), device=places_R.device).repeat_interleave(counts_E)
    shape = (len(logits_TE), router.top_k)
    experts_TK = torch.empty_like(places_R).index_copy(0, places_R, experts_R).view(shape)
    return (
        experts_TK,
        torch.empty_like(weights_R).index_copy(0, places_R, weights_R).view(shape),
        logits_TE,
    )


def _write_jetmoe(router: Any, output: Any, experts_TK: Tensor, weights_TK: Tensor) -> Any:
    flat_R = experts_TK.flatten()
    places_R = flat_R.sort(0).indices
    sizes = torch.bincount(flat_R, minlength=router.num_experts).tolist()
    tokens_R = places_R.div(experts_TK.shape[1], rounding_mode="trunc")
    return places_R, tokens_R, weights_TK.flatten()[places_R], sizes, output[-1]


# Routers whose output is looked at instead of what the experts are handed.
OTHERS = {
    "Llama4Router": Other(_read_llama4, _write_llama4),
    "JetMoeTopKGating": Other(_read_jetmoe, _write_jetmoe),
}
