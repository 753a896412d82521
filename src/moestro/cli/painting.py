"""Text marked by the experts of its tokens: in colour on a terminal, in brackets elsewhere."""

from __future__ import annotations

import colorsys
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console


class Paint(NamedTuple):
    """Marks text by expert: in colour where the terminal has it, in brackets otherwise."""

    console: Console
    num_experts: int

    def token(self, text: str, expert: int | None, *, changed: bool) -> None:
        """Print one token's text."""
        coloured = self._coloured()
        if not coloured and changed and expert is not None:
            text = f"[{_name(expert)}]{text}"
        style = expert_style(expert, self.num_experts) if coloured and expert is not None else ""
        self.console.print(text, style=style, end="", markup=False, emoji=False)
        self.console.file.flush()

    def legend(self, layer: int, counts: Counter[int]) -> None:
        """Print which experts were met and how often."""
        total = counts.total()
        if not total:
            return
        self.console.print(f"\nfirst expert in layer {layer}, share of {total} tokens:", end="")
        for expert in sorted(counts):
            self.console.print("  ", end="")
            style = expert_style(expert, self.num_experts) if self._coloured() else ""
            label = f" {_name(expert)} " if style else f"[{_name(expert)}]"
            self.console.print(label, style=style, end="", markup=False)
            self.console.print(f" {counts[expert] / total:.0%}", end="")
        self.console.print()

    def _coloured(self) -> bool:
        return self.console.color_system is not None and not self.console.no_color


def _name(expert: int) -> str:
    return "none" if expert < 0 else str(expert)


def expert_style(expert: int, num_experts: int) -> str:
    """A rich style for one expert: black on a light colour, readable on any background."""
    if expert < 0:
        return "reverse"
    lightness = (0.82, 0.66)[expert % 2]
    red, green, blue = colorsys.hls_to_rgb(expert / max(1, num_experts), lightness, 0.75)
    return f"#000000 on #{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
