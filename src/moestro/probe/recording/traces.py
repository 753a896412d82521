"""Trace: which expert saw which token, for a whole corpus, small enough to hold.

Letters beside those of docs/shapes.md: N sequences, M domains, P documents. The T tokens of all
sequences lie one after another, without padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moestro.errors import DataError, MoestroError
from moestro.kernels.packing import ExpertSlabs, PackedMatrix

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
_SAMPLED = 64  # numbers of each tensor that a fingerprint looks at


class Subject(NamedTuple):
    """The model that a trace is of."""

    name: str  # what it was called: a folder, an id of the hub, or its class
    fingerprint: str  # of its weights, see `fingerprint`
    moe_layers: tuple[int, ...]  # the layer number of each of its L mixture layers
    num_experts: int
    top_k: int  # 0 where tokens have varying numbers of experts (expert choice)


class Trace(NamedTuple):
    """The routing of T tokens through L mixture layers, before anything is summed up.

    What is unknown of the router's probabilities is NaN.
    """

    subject: Subject
    domains: tuple[str, ...]  # the M labels
    documents: tuple[str, ...]  # the P names of documents
    domain_N: Ints  # of each sequence, as an index into `domains`
    # The document of each sequence, as an index into `documents`. One document may have several
    # sequences; documents are the independent pieces of text.
    document_N: Ints
    batch_N: Ints  # equal for the sequences of one forward pass, rising
    length_N: Ints  # tokens of each sequence; they sum to T
    tokens_T: NDArray[np.int32]
    generated_T: NDArray[np.bool_]  # True for tokens that the model wrote itself
    # The experts of each token, first choice first, in the smallest unsigned dtype that holds E;
    # E marks an empty place.
    experts_TLK: NDArray[np.unsignedinteger[Any]]
    weights_TLK: Floats  # of that expert's output; 0 in an empty place
    # False for an assignment that found no room; None where all were kept.
    kept_TLK: NDArray[np.bool_] | None
    entropy_TL: Floats  # of the router's probabilities, in nats
    # Probability of the least likely chosen expert less that of the most likely one not chosen;
    # below 0 where a bias or groups overruled it.
    margin_TL: Floats
    probs_NLE: Floats  # mean over the sequence's tokens of the router's probabilities

    @property
    def sequence_T(self) -> Ints:
        """The sequence of each token."""
        return np.repeat(np.arange(len(self.length_N)), self.length_N)

    @property
    def position_T(self) -> Ints:
        """The place of each token in its sequence, from 0."""
        starts_N = np.cumsum(self.length_N) - self.length_N
        return np.arange(len(self.tokens_T)) - np.repeat(starts_N, self.length_N)

    @property
    def domain_T(self) -> Ints:
        """The domain of each token."""
        return np.repeat(self.domain_N, self.length_N)

    @property
    def document_T(self) -> Ints:
        """The document of each token."""
        return np.repeat(self.document_N, self.length_N)

    @property
    def names_N(self) -> list[tuple[str, str]]:
        """The names of the domain and the document of each sequence."""
        pairs = zip(self.domain_N.tolist(), self.document_N.tolist(), strict=True)
        return [(self.domains[domain], self.documents[document]) for domain, document in pairs]

    def counts(self, group_T: Ints, groups: int) -> Ints:
        """Assignments, before any drop, by layer, group of tokens and expert. int64 [L, G, E].

        Args:
            group_T: the group of each token, such as `domain_T` or `document_T`; those below 0 are
                left out.
            groups: how many groups there are.
        """
        num_experts, used_T = self.subject.num_experts, group_T >= 0
        counts = []
        for experts_TK in self.experts_TLK.swapaxes(0, 1):
            cell_TK = group_T[:, None] * (num_experts + 1) + experts_TK
            flat = np.bincount(cell_TK[used_T].ravel(), minlength=groups * (num_experts + 1))
            counts.append(flat.reshape(groups, num_experts + 1)[:, :num_experts])
        return np.stack(counts)

    def end_to_end(self) -> Trace:
        """All sequences as a single one, as a cache meets them that is not emptied between."""
        first = {n: value[:1] for n, value in self._asdict().items() if n.endswith(("_N", "_NLE"))}
        return self._replace(**{**first, "length_N": self.length_N.sum(keepdims=True)})

    def choose(self, which_N: NDArray[np.bool_]) -> Trace:
        """The trace of some sequences only; documents and domains keep their numbers."""
        return self._at(which_N, np.repeat(which_N, self.length_N))

    def choose_tokens(self, which_T: NDArray[np.bool_]) -> Trace:
        """The trace of some tokens only, such as `~generated_T`; sequences without any go.

        Of a sequence that loses a part the mean probabilities are not known: they become NaN.
        """
        length_N = np.bincount(self.sequence_T[which_T], minlength=len(self.length_N))
        probs_NLE = self.probs_NLE.copy()
        probs_NLE[length_N < self.length_N] = np.nan
        return self._replace(length_N=length_N, probs_NLE=probs_NLE)._at(length_N > 0, which_T)

    def _at(self, which_N: NDArray[np.bool_], which_T: NDArray[np.bool_]) -> Trace:
        changed: dict[str, Any] = {
            name: value[which_N if name.endswith(("_N", "_NLE")) else which_T]
            for name, value in self._asdict().items()
            if isinstance(value, np.ndarray)
        }
        return self._replace(**changed)


def join(traces: Sequence[Trace]) -> Trace:
    """One trace of all, in their order; equal names of domains and documents are the same.

    Raises:
        DataError: there is none, or they are of different models.
    """
    if not traces:
        raise DataError("there is no trace to join; record at least one text")
    first = traces[0]
    for other in traces[1:]:
        require_same(first.subject, other.subject)
    domains = tuple(dict.fromkeys(name for trace in traces for name in trace.domains))
    documents = tuple(dict.fromkeys(name for trace in traces for name in trace.documents))
    width = max(trace.experts_TLK.shape[2] for trace in traces)
    parts: list[dict[str, Any]] = []
    batches = 0
    for trace in traces:
        part = trace._asdict()
        part["domain_N"] = _renumber(trace.domain_N, trace.domains, domains)
        part["document_N"] = _renumber(trace.document_N, trace.documents, documents)
        part["batch_N"] = np.unique(trace.batch_N, return_inverse=True)[1] + batches
        batches = int(part["batch_N"].max(initial=batches - 1)) + 1
        part["experts_TLK"] = _widen(trace.experts_TLK, width, trace.subject.num_experts)
        part["weights_TLK"] = _widen(trace.weights_TLK, width, 0)
        if trace.kept_TLK is None:
            part["kept_TLK"] = np.ones(trace.experts_TLK.shape, dtype=np.bool_)
        part["kept_TLK"] = _widen(part["kept_TLK"], width, True)
        parts.append(part)
    arrays: dict[str, Any] = {
        name: np.concatenate([part[name] for part in parts])
        for name, value in parts[0].items()
        if isinstance(value, np.ndarray)
    }
    if all(trace.kept_TLK is None for trace in traces):
        arrays["kept_TLK"] = None
    return first._replace(domains=domains, documents=documents, **arrays)


def require_same(here: Subject, there: Subject) -> None:
    """Refuse to bring together what was recorded from two models.

    Raises:
        DataError: says what differs.
    """
    if here._replace(name="") == there._replace(name=""):
        return
    shapes = [f"{len(each.moe_layers)} mixture layers of {each.num_experts} experts, "
              f"{each.top_k or 'varying'} per token" for each in (here, there)]  # fmt: skip
    difference = "other weights" if shapes[0] == shapes[1] else f"{shapes[0]}; {shapes[1]}"
    raise DataError(
        f"these traces are of different models, {here.name} and {there.name} ({difference}); "
        "give the trace of the same checkpoint"
    )


def place_of(layer: int, moe_layers: Sequence[int]) -> int:
    """Which of the mixture layers has this layer number.

    Raises:
        MoestroError: none has.
    """
    if layer not in moe_layers:
        known = ", ".join(map(str, moe_layers))
        raise MoestroError(f"layer {layer} is not a mixture layer; choose one of {known}")
    return moe_layers.index(layer)


def fingerprint(model: nn.Module) -> str:
    """Tell a model's weights from any other's without reading all of them.

    The SHA-256 of each tensor's name, dtype and shape and of up to 64 of its numbers, evenly
    spaced; one step of training changes it.

    Raises:
        DataError: the model has no weights, being on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(model)):
        if tensor.is_meta:
            raise DataError(
                f"{name} is on the meta device and holds no numbers; load the model's weights first"
            )
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers that are saved, and packed weights, by name."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer
        for name, value in vars(module).items():
            if isinstance(value, PackedMatrix | ExpertSlabs):
                yield f"{path}.{name} {value.format.kind} {value.format.group}", value.data


def smallest_dtype(num_experts: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest unsigned dtype that holds every expert and the mark of an empty place."""
    return np.min_scalar_type(num_experts)


def _renumber(index_N: Ints, here: tuple[str, ...], there: tuple[str, ...]) -> Ints:
    place = {name: number for number, name in enumerate(there)}
    numbers = np.array([place[name] for name in here], dtype=np.int64)
    return numbers[index_N] if len(index_N) else index_N


def _widen(values_TLK: NDArray[Any], width: int, fill: float) -> NDArray[Any]:
    missing = width - values_TLK.shape[2]
    return np.pad(values_TLK, ((0, 0), (0, 0), (0, missing)), constant_values=fill)
