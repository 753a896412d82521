"""Rules spelled out for one model: which tensor of a checkpoint is which slice of which of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moestro.checkpoints.families.table import LAYOUTS, Rule

# The end of a key that only fused experts have.
FUSED = ".experts.gate_up_proj"
_INDEXED = re.compile(r".*\[(\{e\}|\d+)\]")


class TensorSlice(NamedTuple):
    """One tensor of a checkpoint, and the slice of ours that it fills.

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

    def of(self, ours: Tensor) -> Tensor:
        """The slice of our tensor, a view."""
        if self.entry is not None:
            ours = ours[self.entry]
        return ours if self.rows is None else ours[self.rows[0] : self.rows[1]]


def slices(
    rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], cfg: Any = None
) -> list[TensorSlice]:
    """Every tensor that a checkpoint of this model holds, in the order of ours.

    Args:
        rules: of the model's family.
        shapes: of all our tensors, by name.
        cfg: the model's settings, for rules with `sizes`.
    """
    compiled = [(_pattern(rule), rule) for rule in rules]
    found: list[TensorSlice] = []
    for name, shape in shapes.items():
        fitting = [(match, rule) for way, rule in compiled if (match := way.fullmatch(name))]
        assert len(fitting) == 1, f"{len(fitting)} rules for {name}; a family's table needs one"
        match, rule = fitting[0]
        found += _spell_out(rule, name, {"name": name, **match.groupdict()}, shape, cfg)
    return found


def fused(rules: Sequence[Rule], renamed: Mapping[str, str]) -> list[Rule]:
    """The rules for all experts of a layer in one tensor, with the layout of ours.

    transformers writes that with `save_original_format=False`, and renames some parts of keys.

    Args:
        rules: for each expert in tensors of its own.
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
    name = re.escape(rule.ours.split("[")[0])
    return re.compile(name.replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{name\}", ".+"))


def _spell_out(
    rule: Rule, name: str, words: Mapping[str, str], shape: tuple[int, ...], cfg: Any
) -> Iterator[TensorSlice]:
    indexed = _INDEXED.fullmatch(rule.ours)
    entries: Sequence[int | None] = (None,)
    if indexed is not None:
        entries = range(shape[0]) if indexed[1] == "{e}" else (int(indexed[1]),)
        shape = shape[1:]
    count = len(rule.theirs)
    spans: list[tuple[int, int] | None] = [None]
    if count > 1:
        sizes = (shape[0] // count,) * count if rule.sizes is None else rule.sizes(cfg)
        assert sum(sizes) == shape[0], f"the parts of {name} are {sizes}, its rows {shape[0]}"
        spans = [(sum(sizes[:part]), sum(sizes[: part + 1])) for part in range(count)]
    layouts = (rule.layout,) * count if isinstance(rule.layout, str) else rule.layout
    for entry in entries:
        for theirs, rows, layout in zip(rule.theirs, spans, layouts, strict=True):
            part = shape if rows is None else (rows[1] - rows[0], *shape[1:])
            key = theirs.format(e=entry, **words)
            yield TensorSlice(key, name, entry, rows, layout, LAYOUTS[layout].shape(part))
