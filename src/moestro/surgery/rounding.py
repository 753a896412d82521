"""Weights moved onto int4's grid so that a text's outputs change least; packing then adds nothing.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): input by input, what rounding did to the outputs is
made up for by the inputs that are still to come, the largest of a group first. The scale of each
group of Q is the one of least squared error, weighted by the inputs' second moments, among scales
that clip its largest weight.

That weight becomes -8, so packing finds the same scale. A scale has 5 bits and an integer 3 beside
its sign, so every product is a bf16 number: the result is a plain bf16 checkpoint for any program,
and int4 is its exact packed form.

Letters: R rows of inputs, T tokens, O outputs, I inputs, Q inputs of a group, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moestro.checkpoints.quantize import packable
from moestro.checkpoints.tensor_files import read_tensors
from moestro.checkpoints.transfer import Progress
from moestro.config import ModelConfig
from moestro.kernels import reference
from moestro.moe.experts import StackedWeights
from moestro.moe.routing import Routing
from moestro.surgery.calibration import LEAST_TOKENS
from moestro.surgery.layers import Change, Layers, Tensors

# Added to the diagonal of the second moments, as a share of its mean.
DAMPING = 0.1
ROWS = 16_384  # of a matrix that are rounded together, as a head has many
_CLIPS = [1.0 - 0.025 * step for step in range(17)]


class Care(NamedTuple):
    """What rounding takes care of; without any, weights go to the nearest.

    Attributes:
        clip: a group's scale may clip its largest weight, where that has the least squared error.
        importance: that error is weighted by the inputs' second moments.
        feedback: inputs that are still to come make up for an error.
        head: the head is rounded too, which packing rounds else; one that is tied to the embedding
            becomes a matrix of its own.
    """

    clip: bool = True
    importance: bool = True
    feedback: bool = True
    head: bool = True


ALL = Care()


class Moments:
    """Σ x xᵀ of the inputs of one matrix, and how many there were."""

    def __init__(self, width: int) -> None:
        self.sums_II = torch.zeros(width, width, dtype=torch.float32, device="cpu")
        self.rows = 0

    def add(self, x_RI: Tensor) -> None:
        """Count rows of inputs."""
        x_RI = x_RI.float()
        self.sums_II += x_RI.T @ x_RI
        self.rows += len(x_RI)


class Seen(nn.Module):
    """A module that packing replaces, beside what its matrices multiply.

    Attributes:
        moments: of each matrix, by its parameter's name: one, or one for each expert.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        names = [name for name, each in inner.named_parameters() if each.dim() > 1]
        widths = {name: inner.get_parameter(name).shape for name in names if "bias" not in name}
        self.moments = {
            name: [Moments(shape[-1]) for _ in range(shape[0] if len(shape) == 3 else 1)]
            for name, shape in widths.items()
        }

    def forward(self, x: Tensor, *rest: Routing) -> Tensor:
        """Whatever the module returns."""
        if isinstance(self.inner, StackedWeights):
            self._add_networks(self.inner, x, *rest)
        else:
            (moments,) = self.moments["weight"]
            moments.add(x.flatten(0, -2))
        y: Tensor = self.inner(x, *rest)
        return y

    def _add_networks(
        self, inner: StackedWeights, x_TD: Tensor, routing: Routing | None = None
    ) -> None:
        """Inputs of each expert, times their weights, which its errors are multiplied by."""
        for expert, (up_HD, moments) in enumerate(
            zip(inner.gate_up, self.moments["gate_up"], strict=True)
        ):
            x_RD, weights_R1 = x_TD, x_TD.new_ones(len(x_TD), 1)
            if routing is not None:
                rows = routing.experts_R == expert
                x_RD = x_TD[routing.tokens_R[rows]]
                weights_R1 = routing.weights_R[rows, None].to(x_TD.dtype)
            hidden_RH = x_RD @ up_HD.T
            if inner.gate_up_bias is not None:
                hidden_RH = hidden_RH + inner.gate_up_bias[expert]
            moments.add(x_RD * weights_R1)
            hidden_RF = reference.activate(hidden_RH, inner.activation)
            self.moments["down"][expert].add(hidden_RF * weights_R1)


class Rounded(NamedTuple):
    """The change, which lasts as long as the folder, and on how many matrices little was known.

    Attributes:
        change: what to run or write.
        alone: matrices that saw too few inputs, and were rounded each weight for itself.
        matrices: of all.
    """

    change: Change
    alone: int
    matrices: int


def rounded(
    layers: Layers,
    tokens_NS: Tensor,
    group: int,
    folder: Path,
    progress: Progress | None = None,
    care: Care = ALL,
) -> Rounded:
    """All matrices that packing replaces, on int4's grid; in one pass over a text.

    The embedding stays as it is.

    Args:
        layers: of the model.
        tokens_NS: windows, int64 [N, S + 1]; their hidden states are in memory together.
        group: Q, 32 or 64.
        folder: an empty one for what is rounded; as large as the model.
        progress: called with (blocks so far, blocks in all).
        care: what to take care of.

    Raises:
        OSError: the folder is full.
    """
    seen: dict[str, Seen] = {}
    alone: list[bool] = []
    head = layers.cfg.num_layers  # comes after the last block

    def finish(layer: int) -> None:
        place = f"blocks.{layer}." if layer < head else ""
        made = _on_grids(seen, group, care)
        save_file(
            {name: each.to(layers.stored[place + name]) for name, each in made.items()},
            folder / f"{layer}.safetensors",
        )
        every = [moments for each in seen.values() for moments in each.moments.values()]
        alone.extend(its.rows < LEAST_TOKENS for moments in every for its in moments)
        seen.clear()

    def watch(layer: int, part: nn.Module) -> None:
        if layer:
            finish(layer - 1)
        if layer < head or care.head:
            for path in packable(part):
                seen[path] = Seen(part.get_submodule(path))
                part.set_submodule(path, seen[path])

    def block(layer: int, tensors: Tensors) -> Tensors:
        return {**tensors, **read_tensors(folder / f"{layer}.safetensors")}

    def own_head(tensors: Tensors) -> Tensors:
        found = read_tensors(folder / f"{head}.safetensors")
        return {**tensors, **{name.removeprefix("head."): each for name, each in found.items()}}

    layers.bits(tokens_NS, [layers.unchanged()], watch, progress=progress)
    finish(head)
    change = Change(settings(layers.cfg, care), block, own_head)
    return Rounded(change, sum(alone), len(alone))


def settings(cfg: ModelConfig, care: Care) -> ModelConfig:
    """Those of the rounded model; a head that is rounded is not tied."""
    if not care.head:
        return cfg
    return cfg.model_copy(update={"head": cfg.head.model_copy(update={"tied": False})})


def _on_grids(seen: dict[str, Seen], group: int, care: Care) -> dict[str, Tensor]:
    """What each matrix becomes, by its full name."""
    made = {}
    for path, each in seen.items():
        for name, moments in each.moments.items():
            weight = each.inner.get_parameter(name).detach()
            stack = weight if weight.dim() == 3 else weight[None]
            pairs = zip(stack, moments, strict=True)
            new = [on_grid(one, its, group, care) for one, its in pairs]
            made[f"{path}.{name}"] = torch.stack(new).view_as(weight)
    return made


def on_grid(w_OI: Tensor, moments: Moments, group: int, care: Care = ALL) -> Tensor:
    """A matrix whose groups of inputs lie on int4's grid; [O, I], in the matrix' dtype.

    Args:
        w_OI: the matrix.
        moments: of its inputs; of fewer than `LEAST_TOKENS`, each weight is rounded for itself.
        group: Q.
        care: what to take care of.
    """
    weighed, made_OI = _weighed(moments, w_OI.shape[1], group, care), torch.empty_like(w_OI)
    for start in range(0, len(w_OI), ROWS):
        rows = slice(start, start + ROWS)
        made_OI[rows] = _on_grid(w_OI[rows].float(), weighed, group, care)
    return made_OI


def _on_grid(w_OI: Tensor, weighed: Weighed, group: int, care: Care) -> Tensor:
    """Some rows of a matrix, which are rounded each for itself; fp32 [O, I]."""
    order_I, squares_I, factor_II = weighed
    left_OI, width = w_OI[:, order_I], len(order_I)
    made_OI = torch.empty_like(left_OI)
    for start in range(0, width, group):
        end = min(start + group, width)
        part_OQ = left_OI[:, start:end]
        scales_O = _scales(part_OQ, squares_I[start:end], _CLIPS if care.clip else _CLIPS[:1])
        # Of weights that are all 0 none is the largest.
        largest_O = part_OQ.abs().argmax(1).masked_fill((part_OQ == 0).all(1), -1)
        errors_OQ = torch.zeros_like(part_OQ)
        for place in range(end - start):
            column = start + place
            w_O = left_OI[:, column]
            q_O = (w_O / scales_O).round().clamp(-8, 7).masked_fill(largest_O == place, -8)
            made_OI[:, order_I[column]] = q_O * scales_O
            errors_OQ[:, place] = (w_O - q_O * scales_O) / factor_II[column, column]
            rest_Q = factor_II[column, column + 1 : end]
            left_OI[:, column + 1 : end] -= errors_OQ[:, place, None] * rest_Q
        left_OI[:, end:] -= errors_OQ @ factor_II[start:end, end:]
    return made_OI


class Weighed(NamedTuple):
    """What the inputs of a matrix say of its rounding, in the order in which they are rounded.

    Of each group the largest inputs come first: more are left to make up for their errors.

    Attributes:
        order_I: the inputs in that order, int64 [I].
        squares_I: what the error of each counts, fp32 [I].
        factor_II: hands errors on to the inputs that are still to come; fp32 [I, I], upper
            triangular.
    """

    order_I: Tensor
    squares_I: Tensor
    factor_II: Tensor


def _weighed(moments: Moments, width: int, group: int, care: Care) -> Weighed:
    """How a matrix of this many inputs is rounded."""
    order_I = torch.arange(width, device="cpu")
    eye_II = torch.eye(width, dtype=torch.float32, device="cpu")
    squares_I = torch.ones(width, dtype=torch.float32, device="cpu")
    if moments.rows < LEAST_TOKENS or not moments.sums_II.any():
        return Weighed(order_I, squares_I, eye_II)
    mean = moments.sums_II.diagonal().mean()
    damped_II = moments.sums_II / mean + DAMPING * eye_II
    if care.importance:
        squares_I = damped_II.diagonal()
    if not care.feedback:
        return Weighed(order_I, squares_I, eye_II)
    groups = torch.split(damped_II.diagonal(), group)
    orders = [each.argsort(descending=True, stable=True) for each in groups]
    order_I = torch.cat([group * place + each for place, each in enumerate(orders)])
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II[order_I][:, order_I]))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    return Weighed(order_I, squares_I[order_I], factor_II)


def _scales(w_OQ: Tensor, squares_Q: Tensor, clips: Sequence[float]) -> Tensor:
    """The best scale of each row, of those that clip its largest weight to -8; fp32 [O].

    Args:
        w_OQ: a group of each row.
        squares_Q: what the error of each input counts.
        clips: shares of the largest weight to try.
    """
    largest_O = w_OQ.gather(1, w_OQ.abs().argmax(1, keepdim=True)).squeeze(1)
    best_O = torch.ones_like(largest_O)
    least_O = torch.full_like(largest_O, torch.inf)
    for clip in clips:
        scales_O = _five_bits(largest_O * clip / -8)
        q_OQ = (w_OQ / scales_O[:, None]).round().clamp(-8, 7)
        error_O = ((q_OQ * scales_O[:, None] - w_OQ).square() * squares_Q).sum(1)
        better = error_O < least_O
        least_O, best_O = error_O.where(better, least_O), scales_O.where(better, best_O)
    return best_O


def _five_bits(x: Tensor) -> Tensor:
    """Rounded to 5 significant bits; tiny where it is 0."""
    mantissa, exponent = torch.frexp(x)
    rounded = torch.ldexp((mantissa * 32).round(), exponent - 5)
    return rounded.where(x != 0, 2.0**-20)
