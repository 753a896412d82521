"""`moestro chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.budget import NONE, Chunk, Memory, refuse_chunk, telling
from moestro.cli.generate import (
    PICTURES,
    chosen_layers,
    column_of,
    given_sampling,
    lined,
    stated_or_given,
)
from moestro.cli.opening import (
    AcceptField,
    CacheName,
    Device,
    Dtype,
    ModelName,
    PackedFile,
    Weights,
    name_of,
    open_shown,
)
from moestro.cli.options import (
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
from moestro.errors import ConfigError, MoestroError

if TYPE_CHECKING:
    from moestro.infer.conversation import Conversation
    from moestro.infer.writing import Piece
    from moestro.models.build import Model

HELP = """\
/experts [LAYER]  the last answer, each token coloured by its first expert in a layer
/system [TEXT]    what the model is told before the first message; nothing: no such message
/reset            begin a new conversation
/save FILE        write the conversation as JSON
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next."""
PROMPT, MORE = "> ", "… "


def chat(
    path: ModelName,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; default 2048.")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition: Repetition = None,
    presence: Presence = None,
    frequency: Frequency = None,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "as-is",
    packed: PackedFile = None,
    cache: CacheName = "as-is",
    memory: Memory = NONE,
    chunk: Chunk = None,
    accept_field: AcceptField = None,
) -> None:
    """Talk with a model, by its own chat template.

    Answers go to stdout, everything else to stderr. Ctrl-C stops an answer, Ctrl-D leaves; /help
    lists the commands.
    """
    from moestro.chat import load_chat
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.opening import kept_as
    from moestro.infer.conversation import CACHE_BYTES, Conversation
    from moestro.models.budget import Use, text_bytes
    from moestro.text import load_tokenizer

    given = given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
        seed=seed, stop=tuple(stop) if stop else None,
    )  # fmt: skip
    folder = find_checkpoint(path, kept_as(weights, packed))
    tokenizer, template = load_tokenizer(folder), load_chat(folder)
    sampling = stated_or_given(folder, {"max_tokens": 2048, **given})
    options: Any = {"device": device, "dtype": dtype, "weights": weights, "packed": packed}
    options |= {"cache": cache, "accept_fields": accept_field}
    refuse_chunk(chunk, memory)
    use = Use(texts=2, chunk=chunk)
    model = open_shown(folder, memory, use, **options).model
    if model.cfg.has_encoder:
        raise ConfigError("an encoder-decoder answers one text at a time: use `moestro generate`")
    context, number = model.cfg.attention.context, model.embed.weight.element_size()
    kept = CACHE_BYTES if memory == NONE else text_bytes(model.cfg, context, number, cache)
    conversation = Conversation(model, tokenizer, template, sampling, system, kept)
    _note(f"{name_of(path, folder)}: /help lists the commands, Ctrl-D leaves")
    _Terminal(conversation, model).run()


class _Terminal:
    """Reads lines until the input ends, and does what they say."""

    def __init__(self, conversation: Conversation, model: Model) -> None:
        self._talk, self._model = conversation, model
        self._last: list[Piece] = []

    def run(self) -> None:
        for line in _lines():
            try:
                if line.startswith("/"):
                    if not self._command(*line[1:].split(maxsplit=1)):
                        return
                elif line.strip():
                    self._answer(line)
            except MoestroError as error:
                _note(str(error))

    def _command(self, name: str = "", rest: str = "") -> bool:
        """Do what a line says; False to leave."""
        if name in ("exit", "quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "experts": self._experts,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "help": lambda _: _note(HELP),
        }
        if name not in commands:
            raise ConfigError(f"/{name} is not a command; /help lists them")
        commands[name](rest.strip())
        return True

    def _answer(self, text: str) -> None:
        self._last, start, stopped = [], time.perf_counter(), ""
        try:
            pieces = self._talk.ask(text)
            with closing(pieces):
                for piece in telling(self._model, lined(pieces)):
                    self._last.append(piece)
                    _print(piece)
        except KeyboardInterrupt:
            stopped = ", stopped"
        seconds = time.perf_counter() - start
        if self._last and self._last[-1].finish == "length":
            stopped = ", cut at --max-tokens"
        count = len(self._last)
        _note(f"{count} tokens, {count / seconds:.1f} tokens/s{stopped}")

    def _experts(self, rest: str) -> None:
        from rich.console import Console

        layers = chosen_layers(self._model)
        if rest and not rest.isdecimal():
            raise ConfigError(f"/experts takes the number of a layer; given {rest!r}")
        column = column_of(layers, int(rest) if rest else None)
        if not self._last:
            raise ConfigError("there is no answer yet")
        moe = self._model.cfg.moe
        paint = Paint(Console(highlight=False, soft_wrap=True), moe.num_experts if moe else 0)
        counts: Counter[int] = Counter()
        last: int | None = None
        for piece in self._last:
            expert = piece.experts[column] if piece.experts else None
            counts.update(() if expert is None else (expert,))
            paint.token(piece.text.translate(PICTURES), expert, changed=expert != last)
            last = expert
        paint.console.print()
        paint.legend(layers[column], counts)

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._last = []
        _note("a new conversation")

    def _system(self, rest: str) -> None:
        self._talk.system = rest or None
        _note("the model is told this from now on" if rest else "the model is told nothing before")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs the name of a file")
        try:
            self._talk.save(Path(rest).expanduser())
        except (OSError, RuntimeError, ValueError) as error:  # no such user, no such name
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{rest} cannot be written: {why}") from None
        _note(f"written to {rest}")


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe; a line that ends with a backslash goes on."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 — makes input() edit lines
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(MORE if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("\nCtrl-D leaves")
            continue
        yield line


def _print(piece: Piece) -> None:
    """The final channel on stdout; thoughts and the like, dimmed, on stderr."""
    from moestro.infer.channels import FINAL

    text = piece.text.translate(PICTURES) if sys.stdout.isatty() else piece.text
    if piece.channel == FINAL:
        sys.stdout.write(text)
        sys.stdout.flush()
    elif text and sys.stderr.isatty():
        sys.stderr.write(f"\x1b[2m{text}\x1b[0m")
        sys.stderr.flush()


def _note(text: str) -> None:
    typer.echo(text, err=True)
