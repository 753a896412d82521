"""`moestro probe`: which expert does what over labelled text, told only as far as noise allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moestro.cli.opening import AcceptField, ModelName
from moestro.errors import ConfigError, MoestroError
from moestro.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moestro.cli.probe_model import Probed
    from moestro.probe.ablation.effects import Ablations
    from moestro.probe.measures.measure import Findings
    from moestro.probe.measures.saturation import Saturation
    from moestro.probe.measures.specialise import Grouping
    from moestro.probe.measures.versus import Comparison
    from moestro.probe.recording.passages import Passage
    from moestro.probe.recording.traces import Trace

Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the figures and numbers; default: probe in the run folder, probe-NAME "
        "here for a published model or a trace."
    ),
]
Tokens = Annotated[
    int, typer.Option(min=1, help="Most held-out tokens to read, shared evenly by the domains.")
]
Source = Annotated[
    list[str] | None,
    typer.Option(
        help="Other text than the run's: file, folder, glob or 'builtin'; may be repeated. "
        "Domains are the sub-folders, or the files' names."
    ),
]
Layer = Annotated[
    int | None,
    typer.Option(help="Layer, from 0, whose experts to show by domain; default the last mixture."),
]
By = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=REGEX",
        help="Group domains besides, by what the regex's one group finds in their names, as in "
        "'language=-(..)$'; may be repeated.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, the content of probe.json.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws behind the sampling noise.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Keep every routing decision in this file (.npz).")
]
Report = Annotated[
    Path | None, typer.Option(help="Write a page to read in a browser to this file (.html).")
]
Ablate = Annotated[
    int,
    typer.Option(
        min=0,
        help="Silence this many of the experts that look specialised, and as many others, one at "
        "a time, and measure the loss; two passes over the text for each.",
    ),
]
Generate = Annotated[
    int,
    typer.Option(
        min=0,
        help="Let the model write up to this many tokens after each text; they are measured apart "
        "from what it read.",
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(help="Another model or trace, to be compared with PATH on the same text."),
]
Checkpoints = Annotated[
    bool,
    typer.Option(help="Say how early in the run each token went where it goes in the end."),
]
Transformers = Annotated[
    bool, typer.Option("--transformers", help="Run the model by transformers' own code.")
]

TRACE = ".npz"


class Wanted(NamedTuple):
    """What was asked for besides the model."""

    tokens: int
    sources: tuple[str, ...]
    by: tuple[str, ...]
    seed: int
    trace: Path | None
    ablate: int
    generate: int
    transformers: bool
    accept_fields: tuple[str, ...]


class Looked(NamedTuple):
    """What one model gave.

    Attributes:
        trace: every decision.
        probed: the model; None where a trace was read.
        passages: the text it was recorded on; none where a trace was read.
    """

    trace: Trace
    probed: Probed | None
    passages: list[Passage]

    @property
    def read(self) -> Trace:
        """The decisions on what the model was given; what it wrote itself is left out."""
        written_T = self.trace.generated_T
        return self.trace.choose_tokens(~written_T) if written_T.any() else self.trace


class Done(NamedTuple):
    """What one call measured, and the files it wrote."""

    content: dict[str, Any]
    findings: Findings
    ablations: Ablations | None
    saturation: Saturation | None
    written: Comparison | None
    folder: Path
    files: list[str]
    report: Path | None


def probe(
    path: ModelName,
    out: Out = None,
    tokens: Tokens = 65_536,
    source: Source = None,
    layer: Layer = None,
    by: By = None,
    report: Report = None,
    trace: TraceFile = None,
    ablate: Ablate = 0,
    generate: Generate = 0,
    compare: Compare = None,
    checkpoints: Checkpoints = False,
    transformers: Transformers = False,
    as_json: AsJson = False,
    seed: Seed = 0,
    accept_field: AcceptField = None,
) -> None:
    """Measure which expert does what, over labelled held-out text.

    Load by layer and expert, use of experts by domain beside what chance and the tokens alone
    would give, repetition, caches, and on request what silencing an expert does. Figures (PNG and
    SVG), tables (CSV) and probe.json go to the folder --out. PATH may also be a trace.
    """
    wanted = Wanted(
        tokens, tuple(source or ()), tuple(by or ()), seed, trace, ablate, generate, transformers,
        tuple(accept_field or ()),
    )  # fmt: skip
    if compare is not None:
        from moestro.cli.probe_compare import run_compare

        if report or ablate or checkpoints or trace:
            raise ConfigError(
                "--compare writes a comparison only; leave out --report, --ablate, --checkpoints "
                "and --trace, or probe each model by itself"
            )
        run_compare(path, compare, wanted, out, as_json)
        return
    done = run(path, wanted, out, layer, report, checkpoints)
    if as_json:
        typer.echo((done.folder / "probe.json").read_text(encoding="utf-8").rstrip())
    else:
        _print(done, layer)


def run(
    path: str | Path,
    wanted: Wanted,
    out: Path | None = None,
    layer: int | None = None,
    report: Path | None = None,
    checkpoints: bool = False,
) -> Done:
    """Probe the model or trace that `path` means, and write everything.

    Raises:
        MoestroError: no model or text, a dense model, a layer that is no mixture, or a folder that
            cannot be written.
    """
    from rich.console import Console

    from moestro.cli.probe_more import (
        ablate_halves,
        content_of,
        require_places,
        saturation_of_run,
        tokenizer_of,
        write_page,
        written_beside_read,
    )
    from moestro.probe.measures.measure import measure
    from moestro.probe.report.figures import layer_index, save_figures
    from moestro.probe.report.table import save_csv
    from moestro.probe.report.tables import tables
    from moestro.probe.report.token_text import TokenText

    _groupings((), wanted.by)  # what is wrong with these is said before the model runs
    require_places(out, report)
    looked = look(path, wanted)
    trace, tokenizer = looked.trace, tokenizer_of(looked, needed=report is not None)
    groupings = _groupings(trace.domains, wanted.by)
    folder = make_folder(out or _beside(path, looked.probed))
    with Console(stderr=True).status("measuring"):
        findings = measure(looked.read, groupings=groupings, seed=wanted.seed)
        written = written_beside_read(looked, wanted.seed)
    if layer is not None:
        layer_index(findings, layer)
    saturation = saturation_of_run(looked, wanted.seed) if checkpoints else None
    ablations = ablate_halves(looked, wanted.ablate, wanted.seed) if wanted.ablate else None
    figures = [file.name for file in save_figures(findings, folder, layer, ablations)]
    content = content_of(trace, wanted, findings, ablations, saturation, written, figures)
    name = None if tokenizer is None else TokenText(tokenizer, trace.tokens_T).name
    found = tables(findings, ablations, saturation, name)
    files = [*figures, *(file.name for file in save_csv(found, folder)), "probe.json"]
    write(folder / "probe.json", json.dumps(content, indent=1) + "\n")
    if report is not None and tokenizer is not None:
        write_page(report, findings, looked, tokenizer, ablations, saturation)
    return Done(content, findings, ablations, saturation, written, folder, files, report)


def look(path: str | Path, wanted: Wanted, passages: list[Passage] | None = None) -> Looked:
    """Record a model on its text, or read a trace.

    Args:
        path: a model's name, or a trace's file.
        wanted: what to read and keep.
        passages: the text, where it is that of another model.
    """
    from moestro.cli.probe_more import bar
    from moestro.probe.recording.record import record_batches
    from moestro.probe.recording.tracefile import TraceWriter, read_trace
    from moestro.probe.recording.traces import join

    if is_trace(path):
        if wanted.trace or wanted.ablate or wanted.generate or wanted.sources:
            raise ConfigError(
                f"{path} is a trace: nothing is run, so leave out --source, --trace, --ablate and "
                "--generate, or give the model"
            )
        return Looked(read_trace(Path(path)), None, [])
    from moestro.cli.probe_model import open_probed

    probed = open_probed(path, wanted.transformers, wanted.generate, wanted.accept_fields)
    passages = passages or probed.passages(wanted.sources, wanted.tokens)
    parts = []
    with bar("probing held-out text") as progress:
        batches = record_batches(
            probed.model, passages, tokenizer=probed.tokenizer, name=str(probed.folder),
            generate=wanted.generate, progress=progress,
        )  # fmt: skip
        first = next(batches)
        if wanted.trace is None:
            parts = [first, *batches]
        else:
            with TraceWriter(wanted.trace, first.subject) as writer:
                for part in (first, *batches):
                    writer.write(part)
                    parts.append(part)
    return Looked(join(parts), probed, passages)


def is_trace(path: str | Path) -> bool:
    """Whether a trace is meant: models are folders or names of the hub."""
    return str(path).endswith(TRACE) or Path(path).is_file()


def _groupings(domains: tuple[str, ...], by: Sequence[str]) -> tuple[Grouping, ...]:
    """The groupings that --by asks for."""
    from moestro.probe.measures.specialise import by_pattern

    found = []
    for each in by:
        name, equals, pattern = each.partition("=")
        if not (name and equals and pattern):
            raise ConfigError(f"--by {each}: give NAME=REGEX, as in 'language=-(..)$'")
        found.append(by_pattern(name, pattern, domains))
    return tuple(found)


def _beside(path: str | Path, probed: Probed | None) -> Path:
    """Where the files go unless told: a published checkpoint is not ours to write into."""
    from moestro.checkpoints.pretrained import is_pretrained

    if probed is not None and not is_pretrained(probed.folder):
        return probed.home / "probe"
    return Path(f"probe-{Path(path).name.removesuffix(TRACE)}")


def make_folder(folder: Path) -> Path:
    """The folder, made where it is not there.

    Raises:
        MoestroError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def write(path: Path, text: str) -> None:
    """Write a small file.

    Raises:
        MoestroError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> MoestroError:
    reason = error.strerror or error
    return MoestroError(f"cannot write to {path}: {reason}; choose another folder with --out")


def _print(done: Done, layer: int | None) -> None:
    """The tables and the summary, for a person."""
    from rich.console import Console

    from moestro.cli.probe_compare import print_comparison
    from moestro.cli.probe_tables import print_findings

    console, content = Console(highlight=False), done.content
    domains = len(done.findings.domains)
    console.print(
        f"{content['model']}: {done.findings.tokens_M.sum():,} tokens of {domains} "
        f"{'domain' if domains == 1 else 'domains'}",
        markup=False,
        soft_wrap=True,
    )
    print_findings(console, done.findings, layer, done.ablations, done.saturation)
    if done.written is not None:
        on = f"what the model read and the {content['tokens_generated']:,} tokens that it wrote"
        print_comparison(console, done.written, on, "read", "written")
    for sentence in content["summary"]:
        console.print(f"• {sentence}", markup=False)
    for note in done.findings.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"\nwritten to {done.folder}: {', '.join(done.files)}", markup=False, soft_wrap=True
    )
    if done.report is not None:
        console.print(f"to read in a browser: {done.report}", markup=False, soft_wrap=True)
