"""The `moestro` command: finds the verb, loads only its file, and turns errors into exit codes.

    0    done                       2    something the user can fix: input, settings, options
    1    the run itself failed      130  Ctrl-C      141  the reader of the output left

`MOESTRO_DEBUG=1` prints the traceback of an expected error too.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from moestro import __version__
from moestro.cli.tables import printable
from moestro.errors import MoestroError, TrainingError

VERBS = {
    "train": "Train a language model on text, as a mixture or dense.",
    "tune": "Fine-tune a checkpoint on conversations, all of it or by adapters.",
    "compare": "Train a mixture and its dense twin side by side, and compare what they learned.",
    "generate": "Continue a prompt with a trained model.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model over HTTP, for OpenAI's and Anthropic's clients.",
    "bench": "Measure how fast a model runs on this machine, and compare.",
    "eval": "Measure how well a model predicts held-out text, in each weight format.",
    "probe": "Measure which expert does what, on labelled text.",
    "upcycle": "Make a dense model a mixture that computes the same.",
    "prune": "Remove experts, and measure what it costs.",
    "merge": "Merge experts that are alike, and measure what it costs.",
    "round": "Round weights for int4 so that a text loses least.",
    "convert": "Write a checkpoint in another layout or dtype.",
    "check": "Compare a mixture with its definition, forward and backward.",
    "plan": "Compute what a model costs, before loading anything.",
    "doctor": "Show what this machine can run, and why.",
}

FAILED, BAD_INPUT, INTERRUPTED, READER_LEFT = 1, 2, 130, 141
LONGEST_MESSAGE = 4000  # characters
# What to do where memory ends, by verb.
_TRAINED = "lower train.batch_size or the model's widths, or raise train.accumulate"
_RUN = "give a limit with --memory, pack with --weights int4, or keep less of a text"
_LESS = "give a smaller model, a shorter text or fewer tokens"
_ROOM = dict.fromkeys(("train", "compare", "tune"), _TRAINED) | dict.fromkeys(
    ("generate", "chat", "serve", "eval", "bench"), _RUN
)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line, `args` or the process's own, and return its exit code."""
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    for name in ("stdout", "stderr"):  # closed when the process began
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command = typer.main.get_command(_app(words))
            code = command.main(words, prog_name="moestro", standalone_mode=False)
        sys.stdout.flush()
    except TyperException as error:
        return _report(_usage_message(error), BAD_INPUT)
    except MoestroError as error:
        return _report(str(error), FAILED if isinstance(error, TrainingError) else BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        _let_go()
        left = error.errno in (errno.EPIPE, errno.EIO)
        return READER_LEFT if left else _report(str(error), FAILED)
    except (MemoryError, RuntimeError) as error:
        # Of torch on CPU, and on CUDA.
        said = any(each in str(error) for each in ("allocate memory", "out of memory"))
        if not said and not isinstance(error, MemoryError):
            raise
        return _report(f"not enough memory; {_ROOM.get(words[0], _LESS)}", FAILED)
    except SystemExit:  # a reader that left, seen by typer or rich first
        _let_go()
        return READER_LEFT
    return code if isinstance(code, int) else 0


def _app(words: Sequence[str]) -> typer.Typer:
    """All verbs for `--help`; only the one that `words` name is loaded from its file."""
    app = typer.Typer(
        name="moestro",
        help="Build, train, look inside and run mixture-of-experts language models.",
        epilog="`moestro VERB --help` explains one verb.",
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_options)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for verb, summary in VERBS.items():
        module = import_module(f"moestro.cli.{verb}") if verb == chosen else None
        app.command(verb, short_help=summary)(getattr(module, verb, _unloaded))
    return app


def _unloaded() -> None:
    """Stand for a verb that this command line does not use."""


def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=lambda on: _version(on), help="Print the version."
        ),
    ] = False,
) -> None:
    """Take the options that come before a verb."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moestro {__version__}")
        raise typer.Exit


def _usage_message(error: TyperException) -> str:
    """One sentence for a wrong option or verb, with the nearest name where there is one."""
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    near = getattr(error, "possibilities", None)
    if near:
        message = f"{error.message}. Did you mean {' or '.join(sorted(near))}?"
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "moestro"
    end = "" if message.endswith((".", "?")) else "."
    return f"{message[:1].lower()}{message[1:]}{end} See `{where} --help`."


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line for a person, without file and line of the code that raised it."""
    typer.echo(f"moestro: warning: {_printable(str(message))}", err=True)


def _printable(message: str) -> str:
    """A message without control characters, which names in damaged files can hold."""
    shown = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} …"
    return printable(shown, keep="\n")


def _report(message: str, code: int) -> int:
    if os.environ.get("MOESTRO_DEBUG"):
        traceback.print_exc()
    with suppress(OSError):  # the terminal may be gone
        typer.echo(f"moestro: error: {_printable(message)}", err=True)
    return code


def _let_go() -> None:
    """Point what cannot be written away, so that the interpreter's last flush says nothing."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
