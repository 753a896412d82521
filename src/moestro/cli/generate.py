"""`moestro generate`: continue a prompt with a trained model, text appearing as it is made."""

from __future__ import annotations

import colorsys
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moestro.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from moestro.infer.engine import Piece
    from moestro.models.decoder import Decoder
    from moestro.text import Tokenizer

# Control characters would move the cursor or recolour the terminal; each has a picture instead.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


RunPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A run folder, or one checkpoint in it.")
]
PromptText = Annotated[
    str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate; default 256.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 takes the likeliest token every time, 1 follows the model's own odds; default 0.8."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Only the K likeliest tokens; default all.")]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Only the likeliest tokens that together reach this probability; default 1.0."
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="The same seed gives the same text again; default 0.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
ShowExperts = Annotated[
    bool, typer.Option("--show-experts", help="Mark each token by its first expert.")
]
Layer = Annotated[
    int | None,
    typer.Option(
        help="The layer, from 0, whose experts --show-experts shows; default the middle mixture."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object at the end, nothing before.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def generate(
    path: RunPath,
    prompt: PromptText = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    show_experts: ShowExperts = False,
    layer: Layer = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a trained model.

    Only the continuation goes to stdout; what there is to say about it goes to stderr. Without
    colour (a pipe, or NO_COLOR set) --show-experts prints the expert's number in brackets
    wherever the expert changes.
    """
    from moestro.infer.engine import encode_prompt, stream
    from moestro.infer.sampling import SamplingConfig

    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    sampling = SamplingConfig(**{name: value for name, value in given.items() if value is not None})
    if layer is not None and not show_experts:
        raise ConfigError("--layer chooses what --show-experts shows; add --show-experts")
    text = _read_prompt(prompt)
    model, tokenizer = _load(path, device)
    column = _column(model.moe_layers, layer) if show_experts else None
    encoded = encode_prompt(tokenizer, text, model.cfg.attention.context)
    if encoded.dropped:
        typer.echo(
            f"moestro: the prompt is {len(encoded.tokens) + encoded.dropped} tokens long, the "
            f"model's context {len(encoded.tokens)}; the first {encoded.dropped} are left out",
            err=True,
        )
    pieces = stream(model, tokenizer, text, sampling)
    if as_json:
        typer.echo(json.dumps(_collect(pieces, model.moe_layers, encoded.dropped)))
    elif column is None:
        _print_plain(pieces)
    else:
        _print_experts(pieces, model, column)


def _read_prompt(prompt: str) -> str:
    """The prompt as valid text, from stdin where it is `-`."""
    raw = sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the prompt is not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}; "
            "convert it first"
        ) from None


def _load(path: Path, device: str) -> tuple[Decoder, Tokenizer]:
    """The newest checkpoint under `path` and its tokenizer, ready to generate."""
    import torch

    from moestro.models.checkpoint import load_model, newest_checkpoint
    from moestro.text import load_tokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable = torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ConfigError(
            f"--device {device} cannot be used here; choose auto, cpu, or cuda on a machine "
            "where `moestro doctor` shows a CUDA device"
        )
    folder = newest_checkpoint(path)
    return load_model(folder, device), load_tokenizer(folder)


def _column(moe_layers: tuple[int, ...], layer: int | None) -> int:
    """Which entry of `Piece.experts` belongs to the chosen layer."""
    if not moe_layers:
        raise ConfigError("--show-experts: this model is dense, it has no experts to show")
    if layer is None:
        return len(moe_layers) // 2
    if layer not in moe_layers:
        known = ", ".join(map(str, moe_layers))
        raise ConfigError(f"--layer {layer} is not a mixture; this model's mixtures are {known}")
    return moe_layers.index(layer)


def _collect(pieces: Iterator[Piece], layers: tuple[int, ...], dropped: int) -> dict[str, Any]:
    """The whole continuation as one JSON-ready object."""
    start = time.perf_counter()
    made = list(pieces)
    seconds = time.perf_counter() - start
    return {
        "text": "".join(piece.text for piece in made),
        "tokens": [piece.token for piece in made],
        "layers": list(layers),
        "experts": [list(piece.experts) for piece in made],
        "finish_reason": made[-1].finish,
        "tokens_per_s": len(made) / seconds,
        "prompt_tokens_dropped": dropped,
    }


def _print_plain(pieces: Iterator[Piece]) -> None:
    """Text as it is made; harmless to a terminal, exact in a pipe."""
    terminal = sys.stdout.isatty()
    try:
        for piece in pieces:
            text = piece.text.translate(PICTURES) if terminal else piece.text
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _print_experts(pieces: Iterator[Piece], model: Decoder, column: int) -> None:
    """Text with each token marked by its first expert in one layer, and a legend at the end."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    paint = _Paint(console, model.cfg.moe.num_experts if model.cfg.moe else 0)
    counts: Counter[int] = Counter()
    last: int | None = None
    try:
        for piece in pieces:
            expert = piece.experts[column] if piece.experts else None
            if expert is not None:
                counts[expert] += 1
            if piece.text:
                paint.token(piece.text.translate(PICTURES), expert, changed=expert != last)
                last = expert
    finally:
        console.print()
        paint.legend(model.moe_layers[column], counts)


class _Paint(NamedTuple):
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
