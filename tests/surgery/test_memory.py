"""How many blocks are in memory while a model is run on text, changed and written."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.surgery.calibration import collect
from moestro.surgery.layers import Change, Layers, Tensors
from moestro.surgery.prune import at_random, pruned

from ..checkpoints.families import tiny

TOKENS = torch.randint(0, tiny.VOCABULARY, (12, 33), generator=torch.Generator().manual_seed(3))
EXPERTS = "ffn.experts.down"


class Counted:
    """Makes tensors of which it knows how many are still in memory, and how many ever were."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.most = 0

    def made_of(self, tensors: Tensors) -> Tensors:
        """The same numbers; those of the experts in memory of their own that is counted."""
        array = tensors[EXPERTS].numpy().copy()  # is let go when no tensor shares its memory
        self.made.append(weakref.ref(array))
        self.most = max(self.most, sum(each() is not None for each in self.made))
        return {**tensors, EXPERTS: torch.from_numpy(array)}


class CountedLayers(Layers):
    """Layers whose blocks are counted as they are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counted = Counted()

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See `Layers.tensors`."""
        found = super().tensors(path)
        return self.counted.made_of(found) if path.startswith("blocks.") else found


@pytest.fixture
def layers(tmp_path: Path) -> CountedLayers:
    tiny.save(tiny.build("mixtral"), tmp_path)
    return CountedLayers(tmp_path)


def counted(layers: CountedLayers, seed: int) -> Change:
    """A change whose blocks are counted too."""
    change = pruned(layers.cfg, at_random(layers.cfg, 3, seed))
    return Change(
        change.cfg, lambda layer, tensors: layers.counted.made_of(change.block(layer, tensors))
    )


@pytest.mark.parametrize("number", [1, 5])
def test_a_block_as_it_is_and_a_changed_one_are_in_memory_however_many_changes(
    number: int, layers: CountedLayers
) -> None:
    changes = [counted(layers, seed) for seed in range(number)]
    layers.bits(TOKENS, changes)
    assert len(layers.counted.made) == layers.cfg.num_layers * (1 + number)
    assert layers.counted.most == 2


@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_one_block_is_in_memory_while_experts_are_watched(
    memory_bytes: int | None, layers: CountedLayers
) -> None:
    collect(layers, TOKENS, memory_bytes=memory_bytes)
    assert len(layers.counted.made) >= layers.cfg.num_layers
    assert layers.counted.most == 1


def test_a_block_as_it_is_and_a_changed_one_are_in_memory_while_writing(
    layers: CountedLayers, tmp_path: Path
) -> None:
    layers.write(counted(layers, 0), tmp_path / "new")
    assert len(layers.counted.made) == layers.cfg.num_layers * 2
    assert layers.counted.most == 2
