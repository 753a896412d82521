"""Rules spelled out for one model: which tensor of a checkpoint is which part of which of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from moestro.checkpoints.families.table import LAYOUTS, Rule

# The end of a key that only fused experts have.
FUSED = ".experts.gate_up_proj"
_INDEXED = re.compile(r"(?P<name>.*)\[(?P<index>\{e\}|\d+)\]")


class Piece(NamedTuple):
    """One tensor of a checkpoint, and the part of ours that it is.

    Attributes:
        theirs: its key.
        ours: the name of our tensor.
        entry: of our first axis; None: all of it.
        rows: [from, to) of the first axis after it; None: all.
        layout: name in `LAYOUTS`.
        shape: of theirs.
    """

    theirs: str
    ours: str
    entry: int | None
    rows: tuple[int, int] | None
    layout: str
    shape: tuple[int, ...]

    def part(self, ours: Tensor) -> Tensor:
        """The part of our tensor, a view."""
        if self.entry is not None:
            ours = ours[self.entry]
        return ours if self.rows is None else ours[self.rows[0] : self.rows[1]]


def pieces(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Every tensor that a checkpoint of this model holds, in the order of ours.

    Args:
        rules: of the model's family.
        shapes: of all our tensors, by name.
    """
    compiled = [(_pattern(rule), rule) for rule in rules]
    found: list[Piece] = []
    for name, shape in shapes.items():
        fitting = [(match, rule) for way, rule in compiled if (match := way.fullmatch(name))]
        assert len(fitting) == 1, f"{len(fitting)} rules for {name}; a family's table needs one"
        match, rule = fitting[0]
        found += _spell_out(rule, name, match.groupdict().get("n", ""), shape)
    return found


def fused(rules: Sequence[Rule], renamed: Mapping[str, str]) -> list[Rule]:
    """The rules where all experts of a layer are in one tensor, with the layout of ours.

    transformers writes that with `save_original_format=False`, and names some parts anew.

    Args:
        rules: where each expert has tensors of its own.
        renamed: parts of keys → their new names.
    """
    found = []
    for rule in rules:
        ours, each, _ = rule.ours.partition("[{e}]")
        theirs = rule.theirs
        if each:
            stack = ours.rpartition(".")[2]
            theirs = (f"{theirs[0].partition('experts.')[0]}experts.{stack}_proj",)
        for old, new in renamed.items():
            theirs = tuple(key.replace(old, new) for key in theirs)
        found.append(rule._replace(theirs=theirs, ours=ours if each else rule.ours))
    return found


def key_pattern(name: str) -> re.Pattern[str]:
    """Matches keys by a name with {n} for any number and * for anything."""
    text = re.escape(name).replace(r"\{n\}", r"\d+").replace(r"\*", ".*")
    return re.compile(text)


def _pattern(rule: Rule) -> re.Pattern[str]:
    name = rule.ours.split("[")[0]
    return re.compile(re.escape(name).replace(r"\{n\}", r"(?P<n>\d+)"))


def _spell_out(rule: Rule, name: str, layer: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    indexed = _INDEXED.fullmatch(rule.ours)
    entries: Sequence[int | None] = (None,)
    if indexed is not None:
        each = indexed["index"] == "{e}"
        entries = range(shape[0]) if each else (int(indexed["index"]),)
        shape = shape[1:]
    count = len(rule.theirs)
    sizes = rule.sizes or (shape[0] // count,) * count if count > 1 else (shape[0],)
    assert sum(sizes) == shape[0], f"the parts of {name} are {sizes}, its rows {shape[0]}"
    for entry in entries:
        start = 0
        for theirs, size in zip(rule.theirs, sizes, strict=True):
            key = theirs.replace("{n}", layer).replace("{e}", str(entry))
            rows = None if count == 1 else (start, start + size)
            part = LAYOUTS[rule.layout].shape((size, *shape[1:]))
            yield Piece(key, name, entry, rows, rule.layout, part)
            start += size
