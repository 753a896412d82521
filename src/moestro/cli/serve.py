"""`moestro serve`: a model over HTTP, for the clients that speak to OpenAI."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.budget import NONE, Chunk, Memory, refuse_chunk
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
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.models.budget import Use
    from moestro.serve.served import Served
    from moestro.serve.settings import ServeSettings

Host = Annotated[
    str, typer.Option(help="The address to answer at; 0.0.0.0 for all of this machine's.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="Keys that clients must show, one a line; default none."),
]
Name = Annotated[
    str | None, typer.Option(help="What requests call the model; default the folder's name.")
]
MaxLive = Annotated[int | None, typer.Option(help="Requests answered at once; default 16.")]
MaxWaiting = Annotated[
    int | None,
    typer.Option(help="Requests that wait for their turn, before one is refused; default 64."),
]
Context = Annotated[
    int | None, typer.Option(help="Most tokens of a prompt and its answer; default the model's.")
]
CacheMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for what earlier texts begin with, so that it is computed once, such as 4GiB; "
        "0B: none; default 2GiB, and with --memory an eighth of what is left at most."
    ),
]


Report = Annotated[
    Path | None,
    typer.Option(
        help="A page that `moestro probe --report` wrote, which the playground links; default: "
        "report.html in the model's folder or in its folder probe."
    ),
]
AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=PATH",
        help="A run of `moestro tune --lora`, or a folder of PEFT's, for requests that call the "
        "model NAME; may be repeated.",
    ),
]  # fmt: skip
REPORT = "report.html"
# For sed: the first line with a key, without the space around it, such as a carriage return.
_FIRST_KEY = "s/^[[:space:]]*//;s/[[:space:]]*$//;/./{p;q;}"


_MISSING = "serving needs packages that are not installed: pip install 'moestro[serve]'"


def serve(
    path: ModelName,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    name: Name = None,
    max_live: MaxLive = None,
    max_waiting: MaxWaiting = None,
    context: Context = None,
    cache_memory: CacheMemory = None,
    report: Report = None,
    adapter: AdapterNames = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "as-is",
    packed: PackedFile = None,
    cache: CacheName = "as-is",
    memory: Memory = NONE,
    chunk: Chunk = None,
    accept_field: AcceptField = None,
) -> None:
    """Serve a model over HTTP, in the shapes that OpenAI's clients speak.

    Without --host only this machine reaches it. SIGTERM or Ctrl-C lets running answers finish.
    """
    try:
        from moestro.serve.running import bind, is_loopback, run
    except ImportError:
        raise ConfigError(_MISSING) from None
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.checkpoints.opening import adapted, kept_as
    from moestro.serve.served import serve_model
    from moestro.serve.settings import ServeSettings
    from moestro.serve.state import new_state

    limits = {"max_live": max_live, "max_waiting": max_waiting, "context": context}
    limits["cache_bytes"] = _cache_bytes(cache_memory)
    keys, local = _keys(api_key_file), is_loopback(host)
    paths, budgets = _paths(adapter, memory), list[Any]()
    limits = {field: value for field, value in limits.items() if value is not None}
    settings = ServeSettings(api_keys=keys, any_host=bool(keys) or not local, **limits)
    refuse_chunk(chunk, memory)
    use = _use(settings, cache_memory is None)._replace(chunk=chunk)
    with bind(host, port) as bound:
        folder = find_checkpoint(path, kept_as(weights, packed))
        name = _other_than(paths, name or name_of(path, folder))
        options: Any = {"device": device, "dtype": dtype, "weights": weights, "packed": packed}
        options |= {"cache": cache, "accept_fields": accept_field, "told": budgets.append}
        opened = open_shown(folder, memory, use, **options)
        if budgets and use.kept_shrinks:
            settings = settings.model_copy(update={"cache_bytes": budgets[-1].needs.spare})
        models = {each: adapted(opened, place) for each, place in paths.items()}
        served = serve_model(name, opened.model, folder, context, models)
        address = f"http://{_shown(host)}:{bound.getsockname()[1]}"
        typer.echo(f"{_what(served)}, weights {weights}")
        typer.echo(f"at {address}/v1, up to {settings.max_live} requests at once")
        _warn(keys, local)
        typer.echo(_curl(served, address, api_key_file))
        page = _page(report, path, folder, address)
        run(new_state(served, settings, page), bound, _ready)


def _ready() -> None:
    typer.echo("ready; Ctrl-C ends it")


def _paths(adapter: list[str] | None, memory: str) -> dict[str, str]:
    """Where adapters are, by what requests call them."""
    paths: dict[str, str] = {}
    for given in adapter or ():
        name, _, place = given.partition("=")
        if not name.strip() or not place or name in paths:
            raise ConfigError(f"--adapter {given}: give NAME=PATH, each name once")
        paths[name] = place
    if paths and memory != NONE:
        raise ConfigError("adapters need all experts in memory: leave out --memory, or --adapter")
    return paths


def _other_than(paths: dict[str, str], name: str) -> str:
    """The model's name, which no adapter may have."""
    if name in paths:
        raise ConfigError(f"--adapter {name}= is the model's own name; choose another")
    return name


def _warn(keys: tuple[str, ...], local: bool) -> None:
    if not keys and not local:
        told = "anybody who reaches this port may use it; --api-key-file asks for a key"
        typer.echo(f"moestro: {told}", err=True)


def _page(report: Path | None, path: str, folder: Path, address: str) -> str | None:
    """The report's text, after a word on where it will be; one that is only found may be bad."""
    if report is not None:
        page = _read(report, "--report")
    elif (found := _report(path, folder)) is None:
        return None
    else:
        try:
            page = _read(found, "the report of `moestro probe`")
        except ConfigError as error:
            typer.echo(f"moestro: {error}; it is not shown", err=True)
            return None
    typer.echo(f"the report of `moestro probe` at {address}/report")
    return page


def _report(path: str, folder: Path) -> Path | None:
    """The page that `moestro probe` wrote of this model, where it would be looked for."""
    given = Path(path)
    bases = [base for base in (given, folder) if base.is_dir()]
    places = [base / inner / REPORT for base in bases for inner in ("", "probe")]
    return next((place for place in places if place.is_file()), None)


def _cache_bytes(cache_memory: str | None) -> int | None:
    """Memory for earlier texts; None: the settings' default."""
    from moestro.plan.sizes import parse_bytes

    if cache_memory is None:
        return None
    return 0 if cache_memory in ("0", "0B") else parse_bytes(cache_memory)


def _use(settings: ServeSettings, shrinks: bool) -> Use:
    """What requests take at most; earlier texts less than that, if that `shrinks`."""
    from moestro.models.budget import Use

    live, kept = settings.max_live, settings.cache_bytes
    return Use(settings.context, live, kept, kept_shrinks=shrinks, echoed=True)


def _keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file."""
    if path is None:
        return ()
    lines = _read(path, "--api-key-file").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line")
    return keys


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}") from None


def _shown(host: str) -> str:
    """An address that reaches a host from this machine."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


def _what(served: Served) -> str:
    moe = served.model.cfg.moe
    kind = "dense"
    if moe is not None:
        kind = f"{len(served.moe_layers)} mixtures of {moe.num_experts} experts"
    adapters = f", adapters {', '.join(served.adapted)}" if served.adapted else ""
    return f"{served.name}: {kind}, context {served.context}{adapters}"


def _curl(served: Served, address: str, key_file: Path | None) -> str:
    """A line that works when it is pasted."""
    route, body = "completions", {"prompt": "Once upon a time", "max_tokens": 64}
    if served.template is not None:
        messages = [{"role": "user", "content": "Hello"}]
        route, body = "chat/completions", {"messages": messages, "max_tokens": 64}
    words = f"curl {address}/v1/{route} -H 'content-type: application/json'"
    if key_file is not None:
        first = f"sed -n '{_FIRST_KEY}' {shlex.quote(str(key_file))}"
        words += f' -H "authorization: Bearer $({first})"'
    return f"{words} -d {shlex.quote(json.dumps(body))}"
