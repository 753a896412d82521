"""Checkpoints of a model that is spread over ranks: each writes, and reads, its own rows.

    checkpoints/step-000500/
        model-rank-00001-of-00004.safetensors       beside what one process writes (`train.state`),
        optimizer-rank-00001-of-00004.safetensors   in place of its two files

Blocks carry their place in the whole tensor, so any number of ranks with any layout goes on from
them, one process too, and so does a spread run from what one process wrote. All ranks need the
folder: one disk, or one that they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moestro.checkpoints.folders import step_folders, verify_folder
from moestro.checkpoints.pieces import (
    WEIGHTS,
    Piece,
    file_of_pieces,
    in_pieces,
    load_block,
    open_pieces,
)
from moestro.checkpoints.tensor_files import Source, open_file
from moestro.errors import CheckpointError
from moestro.models.build import Model
from moestro.train.distributed import Ranks
from moestro.train.parallel import Place, local
from moestro.train.snapshot import OPTIMIZER, Snapshot, misfit


class Share(NamedTuple):
    """One rank's rows of a model and its optimizer.

    Attributes:
        model: spread over the ranks.
        optimizer: of its parameters.
        places: which rows of each parameter are here, by name.
        ranks: this process's place.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    places: Mapping[str, Place]
    ranks: Ranks

    def snapshot(self) -> Snapshot:
        """What this rank writes of a checkpoint."""
        rank, world = self.ranks.rank, self.ranks.world
        weights = file_of_pieces(WEIGHTS, self._weights(), rank, world)
        moments = file_of_pieces(OPTIMIZER, self._moments(), rank, world)
        return Snapshot(self.model.cfg, (weights, moments))

    def restore(self, checkpoint: Path) -> None:
        """Read this rank's rows of the optimizer's state.

        Raises:
            CheckpointError: a file cannot be read, or a tensor belongs to no parameter.
        """
        parameters = dict(self.model.named_parameters())
        for full_name, source in open_optimizer(checkpoint).items():
            name, _, key = full_name.rpartition(".")
            if name not in parameters:
                raise misfit(full_name, source.shape)
            state, place = self.optimizer.state[parameters[name]], self.places[name]
            if not source.shape:
                state[key] = source.load(torch.float32).to(parameters[name].device)
                continue
            if source.shape != place.shape:
                raise misfit(full_name, source.shape)
            state[key] = torch.zeros_like(parameters[name], requires_grad=False)
            load_block(source, place.first, local(state[key]))

    def _weights(self) -> list[Piece]:
        pieces = self._rows(dict(self.model.named_parameters()))
        saved = self.model.state_dict().keys() if self.ranks.writes else ()
        buffers = ((n, b) for n, b in self.model.named_buffers() if n in saved)
        return [*pieces, *(Piece(name, buffer) for name, buffer in buffers)]

    def _moments(self) -> list[Piece]:
        pieces: list[Piece] = []
        for name, parameter in self.model.named_parameters():
            place = self.places[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value.dim():
                    pieces += self._rows({name: value}, f".{key}")
                elif place.saves and not any(place.first):
                    pieces.append(Piece(f"{name}.{key}", value))
        return pieces

    def _rows(self, tensors: Mapping[str, Tensor], suffix: str = "") -> list[Piece]:
        """What this rank saves of tensors that lie as the parameters of these names do."""
        return [
            Piece(name + suffix, local(tensor), self.places[name].first)
            for name, tensor in tensors.items()
            if self.places[name].saves and local(tensor).numel()
        ]


def newest_together(run: Path, ranks: Ranks) -> Path | None:
    """The newest good checkpoint of a run; None: it has saved none. Every rank calls it.

    Each reads a share of the files: to read all on each would take longer than to train.

    Raises:
        CheckpointError: there are some, and none is whole; says what is wrong with each.
    """
    troubles: list[str] = []
    steps = ranks.gathered([*step_folders(run)] if ranks.writes else None)[0]
    for step in reversed(steps):
        folder = step_folders(run).get(step)
        trouble = ranks.first(_trouble(folder, ranks))
        if trouble is None:
            return folder
        troubles.append(trouble)
    if troubles:
        raise CheckpointError(f"no checkpoint in {run} is whole: {'; '.join(troubles)}")
    return None


def _trouble(folder: Path | None, ranks: Ranks) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files."""
    if folder is None:
        return f"rank {ranks.rank} does not see what the first sees: all need the same folder"
    try:
        verify_folder(folder, ranks.rank, ranks.world)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def open_optimizer(checkpoint: Path) -> Mapping[str, Source]:
    """The optimizer's tensors of a checkpoint, written by one rank or by many."""
    if in_pieces(checkpoint, OPTIMIZER):
        return open_pieces(checkpoint, OPTIMIZER)
    return open_file(checkpoint / f"{OPTIMIZER}.safetensors")
