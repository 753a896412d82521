"""What a model's routers did on labelled text, kept small enough to hold for a whole corpus.

Letters beside those of docs/shapes.md: N windows of text, M labelled domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.errors import DataError, MoestroError, ShapeError
from moestro.moe.routing import Routing

if TYPE_CHECKING:
    from moestro.models.decoder import Decoder


class Recording(NamedTuple):
    """The routing of N windows through L mixture layers; windows of one domain lie together.

    Attributes:
        domains: The M labels.
        moe_layers: The layer number of each of the L mixture layers.
        top_k: K, or 0 where tokens have varying numbers of experts (expert choice).
        domain_N: int64, the domain of each window, as an index into `domains`.
        block_N: int64, the independent piece of text each window belongs to: windows of one
            document share a block. Numbered from 0 in order, never across domains.
        counts_LNE: int64, assignments each expert received from each window, before any drop.
        probs_LNE: float64, mean over the window's tokens of the router's probabilities.
        entropy_LN: float64, mean over the window's tokens of their entropy, in nats.
        dropped_LN: int64, assignments that found no room.
        experts_LNSK: the experts of every token, first choice first, in the smallest unsigned
            dtype; None for expert choice, where tokens have no ranked choices.
    """

    domains: tuple[str, ...]
    moe_layers: tuple[int, ...]
    top_k: int
    domain_N: NDArray[np.int64]
    block_N: NDArray[np.int64]
    counts_LNE: NDArray[np.int64]
    probs_LNE: NDArray[np.float64]
    entropy_LN: NDArray[np.float64]
    dropped_LN: NDArray[np.int64]
    experts_LNSK: NDArray[np.unsignedinteger[Any]] | None

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts_LNE.shape[2])


def record(
    model: Decoder,
    windows: Mapping[str, Tensor],
    batch_size: int = 16,
    *,
    blocks: Mapping[str, Tensor] | None = None,
) -> Recording:
    """Run the model over labelled windows and keep what its routers decided.

    Batches mix the domains evenly: under expert choice or a capacity, what happens to a token
    depends on its batch, and a batch of one domain would hide how domains differ. Memory grows
    with the choices kept (N · S · K small integers a layer), never with logits.

    Args:
        model: The model; runs in eval mode, and its training mode is restored.
        windows: Domain -> tokens, int64 [N, S]; N may differ by domain, S may not.
        batch_size: Windows per forward pass.
        blocks: Domain -> int64 [N], equal for neighbouring windows of one document (see
            `document_blocks`). Unset: every window counts as an independent piece of text.

    Raises:
        MoestroError: the model has no mixture layer.
        DataError: there is no window to run, or a domain has none.
        ShapeError: windows are not int64 [N, S] with one S, or blocks do not match them.
    """
    if not model.moe_layers:
        raise MoestroError(
            "this model has no mixture layer (a dense model), so there is no routing to look at; "
            "give a model whose settings have model.moe"
        )
    if batch_size < 1:
        raise MoestroError(f"batch_size is {batch_size}; give at least 1")
    _check(windows)
    tokens_NS = torch.cat(list(windows.values()))
    sizes = [len(tokens) for tokens in windows.values()]
    # Each window at its place in (0, 1) of its own domain, so that every batch is a fair mix.
    place_N = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    order_N = torch.from_numpy(np.argsort(place_N, kind="stable"))
    parts = []
    with _evaluating(model) as device:
        for chosen_B in torch.split(order_N, batch_size):
            tokens_BS = tokens_NS[chosen_B]
            routings = model(tokens_BS.to(device)).routings
            parts.append([_reduce(routing, *tokens_BS.shape) for routing in routings])
    back_N = np.argsort(order_N.numpy())
    layers = [_join(part, back_N) for part in zip(*parts, strict=True)]
    counts, probs, entropy, dropped, experts = zip(*layers, strict=True)
    return Recording(
        domains=tuple(windows),
        moe_layers=tuple(model.moe_layers),
        top_k=0 if experts[0] is None else experts[0].shape[-1],
        domain_N=np.repeat(np.arange(len(sizes)), sizes),
        block_N=_number_blocks(windows, blocks),
        counts_LNE=np.stack(counts),
        probs_LNE=np.stack(probs),
        entropy_LN=np.stack(entropy),
        dropped_LN=np.stack(dropped),
        experts_LNSK=None if experts[0] is None else np.stack(experts),
    )


def document_blocks(tokens_NS: Tensor, end_of_text: int) -> Tensor:
    """Number windows so that those of one document share a number. int64 [N].

    For windows in text order: a window in which no document ends belongs together with the next.
    Where text between windows was skipped this can only join too much, never too little, so noise
    estimated over blocks is not understated.
    """
    ends_N = (tokens_NS == end_of_text).any(dim=1).long()
    return ends_N.cumsum(0) - ends_N


class _Part(NamedTuple):
    """One layer's routing of some windows; the fields are those of Recording without L."""

    counts_NE: NDArray[np.int64]
    probs_NE: NDArray[np.float64]
    entropy_N: NDArray[np.float64]
    dropped_N: NDArray[np.int64]
    experts_NSK: NDArray[np.unsignedinteger[Any]] | None


def _reduce(routing: Routing, num_windows: int, seq_len: int) -> _Part:
    """Sum one layer's routing over the tokens of each window."""
    num_experts = routing.num_experts
    window_R = routing.tokens_R // seq_len
    cells = num_windows * num_experts
    counts = torch.bincount(window_R * num_experts + routing.experts_R, minlength=cells)
    if routing.kept_R is None:
        dropped_N = torch.zeros(num_windows, dtype=torch.int64)
    else:
        dropped_N = torch.bincount(window_R[~routing.kept_R], minlength=num_windows)
    probs_TE = routing.probs_TE.double()
    entropy_T = torch.special.entr(probs_TE).sum(dim=1)
    experts_NSK = None
    if routing.top_k:
        smallest = np.min_scalar_type(num_experts - 1)
        experts_TK = routing.experts_TK().cpu().numpy().astype(smallest)
        experts_NSK = experts_TK.reshape(num_windows, seq_len, -1)
    return _Part(
        counts_NE=counts.view(num_windows, num_experts).cpu().numpy(),
        probs_NE=probs_TE.view(num_windows, seq_len, -1).mean(dim=1).cpu().numpy(),
        entropy_N=entropy_T.view(num_windows, seq_len).mean(dim=1).cpu().numpy(),
        dropped_N=dropped_N.cpu().numpy(),
        experts_NSK=experts_NSK,
    )


def _join(parts: tuple[_Part, ...], back_N: NDArray[np.int64]) -> _Part:
    """Put one layer's batches together and its windows back in the order they were given."""
    choices = [part.experts_NSK for part in parts if part.experts_NSK is not None]
    return _Part(
        counts_NE=np.concatenate([part.counts_NE for part in parts])[back_N],
        probs_NE=np.concatenate([part.probs_NE for part in parts])[back_N],
        entropy_N=np.concatenate([part.entropy_N for part in parts])[back_N],
        dropped_N=np.concatenate([part.dropped_N for part in parts])[back_N],
        experts_NSK=np.concatenate(choices)[back_N] if choices else None,
    )


def _number_blocks(
    windows: Mapping[str, Tensor], blocks: Mapping[str, Tensor] | None
) -> NDArray[np.int64]:
    """Number the blocks of all domains through, each run of equal labels being one block."""
    numbered, first = [], 0
    for domain, tokens_NS in windows.items():
        label_N = torch.arange(len(tokens_NS)) if blocks is None else blocks.get(domain)
        if label_N is None or label_N.shape != tokens_NS.shape[:1]:
            given = "nothing" if label_N is None else f"shape {list(label_N.shape)}"
            raise ShapeError(
                f"blocks of domain {domain!r}: given {given}; "
                f"one number for each of its {len(tokens_NS)} windows is needed"
            )
        starts_N = np.diff(label_N.cpu().numpy(), prepend=label_N[:1].cpu().numpy()) != 0
        number_N = first + np.cumsum(starts_N)
        first = int(number_N[-1]) + 1
        numbered.append(number_N)
    return np.concatenate(numbered)


def _check(windows: Mapping[str, Tensor]) -> None:
    """Refuse windows that cannot be run together, naming the domain."""
    if not windows:
        raise DataError(
            "there is no labelled text to run (no domains); give windows of at least one"
        )
    lengths = set()
    for domain, tokens_NS in windows.items():
        if tokens_NS.ndim != 2 or tokens_NS.dtype != torch.int64:
            raise ShapeError(
                f"windows of domain {domain!r} are {tokens_NS.dtype} {list(tokens_NS.shape)}; "
                "give int64 [N, S]: N windows of S tokens"
            )
        if not tokens_NS.numel():
            raise DataError(
                f"domain {domain!r} has no held-out window; give it more text, or leave it out"
            )
        lengths.add(tokens_NS.shape[1])
    if len(lengths) > 1:
        raise ShapeError(
            f"windows have different lengths ({', '.join(map(str, sorted(lengths)))}); "
            "cut the text of every domain to the same number of tokens"
        )


@contextmanager
def _evaluating(model: Decoder) -> Iterator[torch.device]:
    """Run in eval mode without gradients; give the model's device; restore its mode after."""
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters(), None)
    model.eval()
    try:
        with torch.inference_mode():
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module, training in modes:
            module.training = training
