"""Routing decisions in answers: which experts took each token, in the shapes of vLLM and SGLang."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.infer.decoding import Routed
from moestro.infer.writing import Piece
from moestro.serve.engine import Job
from moestro.serve.schema import Generation
from moestro.serve.served import Served


class RoutedFields(NamedTuple):
    """What an answer has of routing.

    Attributes:
        choices: fields of each choice, of the tokens that it wrote.
        prompt: fields of the answer, of the prompt's tokens.
    """

    choices: list[dict[str, Any]]
    prompt: dict[str, Any]


def routed_fields(job: Job, wanted: Generation, index: int | None = None) -> RoutedFields:
    """The experts of a job's texts, each [token, mixture, choice]; nothing where not asked for.

    Args:
        job: with the texts done.
        wanted: says whether experts, weights and which form.
        index: of one text; None: of all. The prompt's experts are told with the first.
    """
    numbers = range(len(job.asks)) if index is None else [index]
    if not wanted.routed:
        return RoutedFields([{} for _ in numbers], {})
    parts = [_parts(job.routed[n], len(job.asks[n].tokens), wanted) for n in numbers]
    prompt = {f"prompt_{name}": value for name, value in parts[0][0].items()} if not index else {}
    return RoutedFields([own for _, own in parts], prompt)


def token_of(piece: Piece) -> dict[str, Any]:
    """A token of a stream, with the first expert that it met in each mixture."""
    return {
        "id": piece.token,
        "text": piece.text,
        "channel": piece.channel,
        "experts": list(piece.experts),
    }


def _parts(
    routed: Sequence[Routed], prompt: int, wanted: Generation
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the prompt, and of the text."""
    experts_TLK = torch.cat([each.experts_TLK for each in routed])
    weights_TLK = torch.cat([each.weights_TLK for each in routed])
    form = wanted.routed_experts_format or "lists"
    fields: list[dict[str, Any]] = []
    for span in (slice(None, prompt), slice(prompt, None)):
        own = {}
        if wanted.return_routed_experts:
            own["routed_experts"] = _written(experts_TLK[span].int(), form)
        if wanted.return_routed_weights:
            own["routed_weights"] = _written(weights_TLK[span].float(), form)
        fields.append(own)
    return fields[0], fields[1]


def _written(values_TLK: Tensor, form: str) -> Any:
    """Nested lists, or what numpy's `frombuffer` reads."""
    if form == "lists":
        # Token by token, so that other threads go on between them.
        return [values_LK.tolist() for values_LK in values_TLK]
    array = values_TLK.contiguous().numpy()
    data = base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return {"data": data.decode(), "shape": list(array.shape), "dtype": str(array.dtype)}


def load(served: Served, load_LE: Tensor | None) -> dict[str, Any]:
    """How often each expert was chosen, mixture by mixture."""
    layers, moe = list(served.moe_layers), served.model.cfg.moe
    experts = moe.num_experts if moe is not None else 0
    counts = [[0] * experts for _ in layers] if load_LE is None else load_LE.tolist()
    return {"model": served.name, "layers": layers, "num_experts": experts, "load": counts}
