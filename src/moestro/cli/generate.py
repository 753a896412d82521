"""`moestro generate`: continue a prompt with a trained model, streaming the text."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.budget import NONE, Memory, telling
from moestro.cli.opening import (
    AcceptField,
    AdapterName,
    CacheName,
    Device,
    Dtype,
    ModelName,
    PackedFile,
    Weights,
    open_shown,
)
from moestro.cli.options import (
    AsJson,
    Frequency,
    MinP,
    Presence,
    Repetition,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from moestro.cli.painting import Paint
from moestro.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moestro.infer.sampling import SamplingConfig
    from moestro.infer.writing import Piece
    from moestro.models.budget import Use
    from moestro.models.build import Model
    from moestro.text import Tokenizer

# Control characters would move the cursor or recolour the terminal; each has a picture instead.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)

PromptText = Annotated[
    str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")
]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="The prompt is a message; write it in the model's chat template."),
]
System = Annotated[str | None, typer.Option(help="With --chat: the system message.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate; default 256.")]
Special = Annotated[
    bool,
    typer.Option(
        "--special",
        help="Spell out special tokens, and show a whole reply; by default a special token is a "
        "line break, and --chat shows only the reply's final channel.",
    ),
]
ShowExperts = Annotated[
    bool, typer.Option("--show-experts", help="Mark each token by its first expert.")
]
Layer = Annotated[
    int | None,
    typer.Option(
        help="The layer, from 0, whose experts --show-experts shows; default the middle mixture."
    ),
]


def generate(
    path: ModelName,
    prompt: PromptText = "",
    chat: Chat = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition: Repetition = None,
    presence: Presence = None,
    frequency: Frequency = None,
    seed: Seed = None,
    stop: Stop = None,
    special: Special = False,
    show_experts: ShowExperts = False,
    layer: Layer = None,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "as-is",
    packed: PackedFile = None,
    cache: CacheName = "as-is",
    adapter: AdapterName = None,
    memory: Memory = NONE,
    accept_field: AcceptField = None,
) -> None:
    """Continue a prompt with a trained model, or answer it with --chat.

    The tokenizer and the chat template are the checkpoint's own; special tokens may be spelled out
    in a prompt. Sampling settings of its generation_config.json override the defaults. An
    encoder-decoder fills the prompt's gaps, <extra_id_0> and so on.

    Only the continuation goes to stdout; notes go to stderr. Without colour (a pipe or NO_COLOR)
    --show-experts prints the expert's number in brackets wherever it changes.
    """
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.opening import kept_as
    from moestro.text import load_tokenizer

    given = given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
        seed=seed, stop=tuple(stop) if stop else None,
    )  # fmt: skip
    _check_pairs(layer, show_experts, system, chat)
    text, folder = _read_prompt(prompt), find_checkpoint(path, kept_as(weights, packed))
    tokenizer, sampling = load_tokenizer(folder), stated_or_given(folder, given)
    start = _conversation(folder, tokenizer, text, system) if chat else text
    options: Any = {"device": device, "dtype": dtype, "weights": weights, "packed": packed}
    options |= {"cache": cache, "adapter": adapter, "accept_fields": accept_field}
    model = open_shown(folder, memory, _use(tokenizer, start, sampling), **options).model
    layers = chosen_layers(model)
    column = column_of(layers, layer) if show_experts else None
    dropped, pieces = _start(model, tokenizer, start, sampling, special)
    choose = _answer if chat and not special else iter
    if not as_json:
        return _print(choose(telling(model, lined(pieces))), model, layers, column)
    typer.echo(json.dumps(_collect(telling(model, pieces), layers, dropped, choose)))


def _print(
    pieces: Iterator[Piece], model: Model, layers: tuple[int, ...], column: int | None
) -> None:
    """The text, with its experts where a column of them is chosen."""
    if column is None:
        _print_plain(pieces)
    else:
        _print_experts(pieces, model, layers[column], column)


def _use(tokenizer: Tokenizer, start: str | list[int], sampling: SamplingConfig) -> Use:
    """How much of a cache a text needs."""
    from moestro.models.budget import Use

    read = tokenizer.encode_prompt(start) if isinstance(start, str) else start
    return Use(len(read) + sampling.max_tokens, prompt=len(read))


def _check_pairs(layer: int | None, show_experts: bool, system: str | None, chat: bool) -> None:
    """Refuse an option that means nothing without another."""
    if layer is not None and not show_experts:
        raise ConfigError("--layer chooses what --show-experts shows; add --show-experts")
    if system is not None and not chat:
        raise ConfigError("--system is a part of a conversation; add --chat")


def given_sampling(**options: Any) -> dict[str, Any]:
    """The sampling settings that were given, checked before anything is read."""
    from moestro.infer.sampling import SamplingConfig

    given = {name: value for name, value in options.items() if value is not None}
    SamplingConfig(**given)
    return given


def stated_or_given(folder: Path, given: dict[str, Any]) -> SamplingConfig:
    """What was asked for, else what the checkpoint states, which is said."""
    from moestro.infer.sampling import GENERATION_FILE, SamplingConfig, stated_sampling

    stated = {n: value for n, value in stated_sampling(folder).items() if n not in given}
    if stated:
        values = ", ".join(f"{name} {value}" for name, value in stated.items())
        typer.echo(f"moestro: as {GENERATION_FILE} states: {values}", err=True)
    return SamplingConfig(**{**stated, **given})


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


def _conversation(
    folder: Path, tokenizer: Tokenizer, message: str, system: str | None
) -> list[int]:
    """The tokens of a conversation of one message, up to where the model's reply begins."""
    from moestro.chat import load_chat

    if not message:
        raise ConfigError("--chat needs a message; give it after the model's name")
    messages = [{"role": "user", "content": message}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    template = load_chat(folder)
    try:
        text = template.render(messages)
    except DataError as error:
        if system is None:
            raise
        raise DataError(
            f"{error}; not every template takes the system message of --system: leave it out, or "
            "begin the prompt with it"
        ) from None
    return tokenizer.encode_prompt(text, templated=True)


def _start(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | list[int],
    sampling: SamplingConfig,
    special: bool,
) -> tuple[int, Iterator[Piece]]:
    """How many tokens of the prompt are left out, which is said, and the text to come."""
    from moestro.infer import engine, prompts

    tokens, dropped = prompts.encode(model.cfg, tokenizer, prompt)
    if dropped:
        which = "last" if model.cfg.has_encoder else "first"
        typer.echo(
            f"moestro: the prompt is {len(tokens) + dropped} tokens long, the model's context "
            f"{len(tokens)}; the {which} {dropped} are left out",
            err=True,
        )
    return dropped, engine.stream(model, tokenizer, prompt, sampling, special)


def chosen_layers(model: Model) -> tuple[int, ...]:
    """Layer numbers of the mixtures that a generated token meets: a decoder's own."""
    encoder_layers = sum(len(stack.layers) for stack in model.cfg.stacks()[:-1])
    return tuple(n for n in model.moe_layers if n >= encoder_layers)


def column_of(moe_layers: tuple[int, ...], layer: int | None) -> int:
    """Which entry of `Piece.experts` belongs to the chosen layer."""
    if not moe_layers:
        raise ConfigError("this model is dense, it has no experts to show")
    if layer is None:
        return len(moe_layers) // 2
    if layer not in moe_layers:
        known = ", ".join(map(str, moe_layers))
        raise ConfigError(f"layer {layer} is not a mixture; this model's mixtures are {known}")
    return moe_layers.index(layer)


def _answer(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The text of the final channel alone; says so where it remains empty beside others."""
    from moestro.infer.channels import FINAL

    others, answered = "", False
    for piece in pieces:
        if piece.channel == FINAL:
            answered = answered or piece.text != ""
            yield piece
        else:
            others = others or piece.channel
            yield piece._replace(text="")
    if others and not answered:
        typer.echo(
            f"moestro: no answer, only text in the channel {others}; --special shows it, "
            "--max-tokens gives room for more",
            err=True,
        )


def _collect(
    pieces: Iterator[Piece],
    layers: tuple[int, ...],
    dropped: int,
    choose: Callable[[Iterable[Piece]], Iterator[Piece]],
) -> dict[str, Any]:
    """The whole continuation as one JSON-ready object; its text is of the chosen pieces."""
    from moestro.infer.channels import FINAL, HEADER

    start = time.perf_counter()
    made = list(pieces)
    seconds = time.perf_counter() - start
    channels: dict[str, str] = {}
    for piece in made:
        if piece.channel not in (FINAL, HEADER):
            channels[piece.channel] = channels.get(piece.channel, "") + piece.text
    return {
        "text": "".join(piece.text for piece in choose(made)),
        "channels": channels,
        "tokens": [piece.token for piece in made],
        "layers": list(layers),
        "experts": [list(piece.experts) for piece in made],
        "finish_reason": made[-1].finish,
        "tokens_per_s": len(made) / seconds,
        "prompt_tokens_dropped": dropped,
    }


def lined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces; where they end, by themselves or by Ctrl-C, so does the line on stdout.

    It lies inside of whatever says something about the text when it is done.
    """
    begun = False
    try:
        for piece in pieces:
            begun = True
            yield piece
    finally:
        if begun:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _print_plain(pieces: Iterator[Piece]) -> None:
    """Text as it is generated; escaped for a terminal, exact in a pipe."""
    terminal = sys.stdout.isatty()
    for piece in pieces:
        text = piece.text.translate(PICTURES) if terminal else piece.text
        sys.stdout.write(text)
        sys.stdout.flush()


def _print_experts(pieces: Iterator[Piece], model: Model, layer: int, column: int) -> None:
    """Text with each token marked by its first expert in one layer, and a legend at the end."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    paint = Paint(console, model.cfg.moe.num_experts if model.cfg.moe else 0)
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
        paint.legend(layer, counts)
