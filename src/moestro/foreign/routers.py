"""How the routers of transformers score and choose: one table that names every class once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.foreign.classes import core, core_kind, kind

# What families call the bias that they choose with and that is in no weight.
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


# (router, output) → experts_TK, weights_TK, logits_TE
Read = Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]
# (router, output, experts_TK, weights_TK) → the output with that choice
Write = Callable[[Any, Any, Tensor, Tensor], Any]


class RouterTraits(NamedTuple):
    """How a class of routers gets from logits to its choice.

    Attributes:
        scoring: softmax, sigmoid, none (it returns probabilities instead of logits), or the
            attribute of the router that holds which of these it is, or a function. Divided by
            their sum, scores are the probabilities.
        weigh: (router, scores [T, K] of the experts chosen) → their weights, where the K largest
            scores are chosen. None: it chooses in some other way.
        by_logits: the scores to choose and weigh by are the logits themselves.
        grouped: chosen within the best groups, where so configured.
        output: how to read what it returns, and to write another choice into it, where the experts
            are not handed the choice.
    """

    scoring: str
    weigh: Callable[[Any, Tensor], Tensor] | None = None
    by_logits: bool = False
    grouped: bool = False
    output: tuple[Read, Write] | None = None


def scoring(router: nn.Module | None) -> str | None:
    """How the logits of a router, within wrappers, become probabilities; None: not known."""
    row = ROUTERS.get(core_kind(router))
    if router is None or row is None:
        return None
    configured = getattr(core(router), row.scoring, None)
    return configured if configured in ("sigmoid", "softmax") else row.scoring


def probabilities(scoring: str, router: Any, logits_TE: Tensor) -> Tensor:
    """Rows that sum to 1, at least fp32, of a router's logits."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if scoring == "none":
        return logits_TE
    if scoring == "softmax":
        return logits_TE.softmax(-1)
    if scoring == "sigmoid":
        return F.logsigmoid(logits_TE).softmax(-1)
    scores_TE: Tensor = getattr(core(router), scoring)(logits_TE)
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def choose(router: Any, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K], as a router with a rule chooses; the bias is in no weight."""
    row = ROUTERS[kind(router)]
    assert row.weigh is not None
    scores_TE = logits_TE
    if not row.by_logits:
        sigmoid = row.scoring == "sigmoid"
        scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1, dtype=torch.float32)
    choice_TE = scores_TE.detach() + bias_E
    if row.grouped and router.topk_method == "group_limited_greedy":
        grouped_TNP = choice_TE.view(len(choice_TE), router.num_group, -1)
        best_TG = grouped_TNP.amax(-1).topk(router.topk_group, dim=-1, sorted=False).indices
        open_TN = torch.zeros_like(grouped_TNP[..., 0], dtype=torch.bool).scatter(1, best_TG, True)
        choice_TE = grouped_TNP.masked_fill(~open_TN[..., None], -math.inf).flatten(1)
    experts_TK = choice_TE.topk(router.top_k, dim=-1, sorted=not row.grouped).indices
    return row.weigh(router, scores_TE.gather(-1, experts_TK)), experts_TK


def _normalised(router: Any, scores_TK: Tensor) -> Tensor:
    return scores_TK / scores_TK.sum(-1, keepdim=True)


def _as_configured(router: Any, scores_TK: Tensor) -> Tensor:
    return _normalised(router, scores_TK) if router.norm_topk_prob else scores_TK


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
    experts_TK, weights_TK = (
        torch.empty_like(each_R).index_copy(0, places_R, each_R).view(len(logits_TE), router.top_k)
        for each_R in (experts_R, weights_R)
    )
    return experts_TK, weights_TK, logits_TE


def _write_jetmoe(router: Any, output: Any, experts_TK: Tensor, weights_TK: Tensor) -> Any:
    flat_R = experts_TK.flatten()
    places_R = flat_R.sort(0).indices
    sizes = torch.bincount(flat_R, minlength=router.num_experts).tolist()
    tokens_R = places_R.div(experts_TK.shape[1], rounding_mode="trunc")
    return places_R, tokens_R, weights_TK.flatten()[places_R], sizes, output[-1]


# Of transformers 5.24.
_ROWS: tuple[tuple[RouterTraits, str], ...] = (
    (RouterTraits("softmax", lambda router, scores: scores), "JambaTopKRouter"),
    (RouterTraits("softmax", _normalised), """
        HunYuanMoEV1Gate MiniMaxTopKRouter MixtralTopKRouter Qwen3OmniMoeTextTopKRouter
        Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter"""),
    (RouterTraits("softmax", _as_configured), """
        FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter
        Qwen3NextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter
        Qwen4ExpTextTopKRouter"""),
    (RouterTraits("softmax", lambda router, scores: scores * router.routed_scaling_factor,
                  grouped=True),
     "DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter"),
    (RouterTraits("softmax", lambda router, logits: logits.softmax(-1), by_logits=True), """
        AriaTextTopKRouter GptOssTopKRouter GraniteMoeHybridTopKRouter GraniteMoeSWATopKRouter
        GraniteMoeSharedTopKRouter GraniteMoeTopKRouter"""),
    (RouterTraits("softmax", lambda router, logits: logits.softmax(-1) / router.top_k,
                  by_logits=True),
     "OpenAIPrivacyFilterTopKRouter"),
    (RouterTraits("softmax", output=(_read_jetmoe, _write_jetmoe)), "JetMoeTopKGating"),
    (RouterTraits("softmax"), """
        DbrxRouter Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter LaraMiniTopKRouter
        LongcatFlashTopkRouter Mistral4TopkRouter MistralLarge4TextTopkRouter PhimoeTopKRouter
        ZayaRouter"""),
    (RouterTraits("sigmoid", _as_configured), "FlintTopKRouter"),
    (RouterTraits("sigmoid", output=(_read_llama4, _write_llama4)), "Llama4Router"),
    (RouterTraits("sigmoid"), """
        AXK1TopkRouter AXK2TopkRouter AfmoeTokenChoiceRouter BailingHybridTopkRouter BeamTopKRouter
        DeepseekV32TopkRouter DeepseekV3TopkRouter Dots1TopkRouter Dots3NoteTextTopkRouter
        ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter Glm4MoeTopkRouter Glm4vMoeTextTopkRouter
        Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV3TopKRouter HYV4TopkRouter HYV4VLTopkRouter
        InklingTopkRouter KimiLinearTopkRouter Kolibri1TopKRouter LagunaTopKRouter Lfm2MoeTopKRouter
        MiMoV2FlashTopkRouter MiniMaxM2TopKRouter MiniMaxM3VLTopKRouter NemotronHTopkRouter
        SolarOpenTopkRouter Step3p7TopKRouter"""),
    (RouterTraits("none"), "Gemma4TextRouter DiffusionGemmaTextRouter"),
    (RouterTraits("expert_selection_fn"), "Cohere2MoeTopKRouter"),
    (RouterTraits("score_fn"), """
        DeepseekV4HashRouter DeepseekV4TopKRouter Inkling2TopKRouter Inkling2LoopTopKRouter"""),
    (RouterTraits("scoring_function"), "MuseSparkTopkRouter"),
)  # fmt: skip
ROUTERS = {name: row for row, names in _ROWS for name in names.split()}
