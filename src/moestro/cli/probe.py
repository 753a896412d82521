"""`moestro probe`: which expert does what on labelled text, as far as noise allows."""

from __future__ import annotations

import json
from os import W_OK, access
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moestro.cli.opening import AcceptField, ModelName, bar, open_shown
from moestro.cli.options import AsJson, HeldOutSource
from moestro.cli.probe_tables import print_comparison, print_study
from moestro.errors import ConfigError, MoestroError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moestro.cli.probe_model import ProbedModel
    from moestro.probe.measures.saturation import Saturation
    from moestro.probe.measures.specialise import Grouping
    from moestro.probe.recording.passages import Passage
    from moestro.probe.study import Answers, Study

Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the figures and numbers; default: probe in the run folder, probe-NAME "
        "here for a published model or a trace."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most held-out tokens to read, shared evenly by the domains; default 65,536.",
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
        help="Also group the domains by what the regex's only group matches in their names, as in "
        "'language=-(..)$'; may be repeated.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws behind the sampling noise.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Save every routing decision to this file (.npz).")
]
Report = Annotated[Path | None, typer.Option(help="Write an HTML report to this file.")]
Ablate = Annotated[
    int,
    typer.Option(
        min=0,
        help="Silence this many of the experts that look specialised, and as many controls, one at "
        "a time, and measure the loss; two passes over the text for each.",
    ),
]
Generate = Annotated[
    int,
    typer.Option(
        min=0,
        help="Let the model write up to this many tokens after each text; they are measured "
        "separately.",
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(help="Another model or trace, to be compared with PATH on the same text."),
]
Checkpoints = Annotated[
    bool,
    typer.Option(help="Measure how early in the run the routing settled."),
]
Transformers = Annotated[
    bool, typer.Option("--transformers", help="Run the model by transformers' own code.")
]

TRACE = ".npz"
TOKENS = 65_536


class Recording(NamedTuple):
    """How a model is to be run: on which text, and what is kept."""

    tokens: int | None = None  # None: TOKENS
    sources: tuple[str, ...] = ()
    generate: int = 0
    trace: Path | None = None
    transformers: bool = False
    accept_fields: tuple[str, ...] = ()


class Questions(NamedTuple):
    """What is asked of one model beyond what is always measured."""

    layer: int | None = None
    ablate: int = 0
    checkpoints: bool = False
    seed: int = 0


def probe(
    path: ModelName,
    out: Out = None,
    tokens: Tokens = None,
    source: HeldOutSource = None,
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
    """Measure which expert does what, on labelled held-out text.

    Load by layer and expert, use of experts by domain compared with chance and with the tokens
    alone, repetition, caches, and on request the effect of silencing an expert. Figures (PNG and
    SVG), tables (CSV) and probe.json go to the folder --out. PATH may also be a trace.
    """
    how = Recording(
        tokens, tuple(source or ()), generate, trace, transformers, tuple(accept_field or ())
    )
    if transformers and accept_field:
        raise ConfigError(
            "--transformers runs the model by its own code, which asks about no field; leave out "
            "--accept-field or --transformers"
        )
    if compare is not None:
        only_one = {
            "--report": report, "--ablate": ablate, "--checkpoints": checkpoints, "--trace": trace,
            "--by": by, "--layer": layer is not None, "--generate": generate,
        }  # fmt: skip
        _leave_out(only_one, "--compare writes a comparison only", "probe each model by itself")
        _require_places(out, None)
        _compare((path, compare), how, out, as_json, seed)
        return
    asked = Questions(layer, ablate, checkpoints, seed)
    _groupings((), by)  # what is wrong with these is said before the model runs
    _require_places(out, report)
    opened = None if _is_trace(path) else _open(path, how)
    folder = out or _beside(path, opened)
    _require_places(folder, None)
    study = _study(path, opened, how, asked)
    if report is not None:
        study.require_tokenizer()
    answers = _answers(study, opened, _groupings(study.trace.domains, by), asked)
    files = study.save(answers, _made(folder), layer=layer, sources=how.sources, seed=seed)
    if report is not None:
        study.write_page(answers, report)
    if as_json:
        typer.echo((folder / "probe.json").read_text(encoding="utf-8").rstrip())
        return
    lines = [f"\nwritten to {folder}: {', '.join(files)}"]
    lines += [f"to read in a browser: {report}"] if report is not None else []
    print_study(study, answers, layer, lines)


def _answers(
    study: Study, opened: ProbedModel | None, groupings: tuple[Grouping, ...], asked: Questions
) -> Answers:
    """All that was asked for, with a display of what is under way."""
    from rich.console import Console

    with Console(stderr=True).status("measuring"):
        answers = study.measure(groupings, asked.seed)
    if asked.checkpoints and opened is not None:
        answers = answers._replace(saturation=_saturation(study, opened, asked.seed))
    if asked.ablate:
        with bar("silencing experts") as progress:
            ablations = study.ablate(asked.ablate, asked.seed, progress)
        answers = answers._replace(ablations=ablations)
    return answers


def _leave_out(given: Mapping[str, object], why: str, otherwise: str) -> None:
    """Refuse the options that were given, rather than ignore them."""
    names = [name for name, value in given.items() if value]
    if names:
        raise ConfigError(f"{why}, so leave out {', '.join(names)}, or {otherwise}")


def _study(path: str, opened: ProbedModel | None, how: Recording, asked: Questions) -> Study:
    """What a model decides on its text, or what a trace says where none is open."""
    if opened is None:
        return _read(path, how, asked)
    return _record(opened, how, _passages(opened, how, asked))


def _open(path: str, how: Recording) -> ProbedModel:
    """The model, to be run."""
    from moestro.cli.probe_model import open_probed

    return open_probed(path, how.transformers, how.generate, how.accept_fields)


def _passages(opened: ProbedModel, how: Recording, asked: Questions) -> Sequence[Passage]:
    """What the model is to read; questions that it cannot answer are refused before it does."""
    from moestro.probe.recording.reader import reader_of
    from moestro.probe.recording.traces import place_of
    from moestro.probe.study import require_ablatable

    if asked.layer is not None:
        place_of(asked.layer, [each.layer for each in reader_of(opened.model).mixtures])
    if asked.checkpoints:
        _steps(opened)
    passages = opened.passages(how.sources, how.tokens or TOKENS)
    if asked.ablate:
        require_ablatable(opened.model, passages)
    return passages


def _record(opened: ProbedModel, how: Recording, passages: Sequence[Passage]) -> Study:
    """What the model decides on these passages."""
    from moestro.probe.study import record_study

    with bar("probing held-out text") as progress:
        return record_study(
            opened.model, opened.tokenizer, passages, name=str(opened.folder),
            generate=how.generate, keep=how.trace, progress=progress,
        )  # fmt: skip


def _read(path: str, how: Recording, asked: Questions) -> Study:
    """What a trace says; whatever is about running a model is refused."""
    from moestro.probe.recording.traces import place_of
    from moestro.probe.study import read_study

    of_models = {
        "--source": how.sources, "--tokens": how.tokens, "--generate": how.generate,
        "--trace": how.trace, "--transformers": how.transformers,
        "--accept-field": how.accept_fields, "--ablate": asked.ablate,
        "--checkpoints": asked.checkpoints,
    }  # fmt: skip
    _leave_out(of_models, f"{path} is a trace: nothing is run", "give the model")
    study = read_study(Path(path))
    if asked.layer is not None:
        place_of(asked.layer, study.trace.subject.moe_layers)
    return study


def _is_trace(path: str) -> bool:
    """Whether a trace is meant: models are folders, GGUF files or names of the hub."""
    from moestro.checkpoints.gguf.header import is_gguf

    place = Path(path)
    return path.endswith(TRACE) or (place.is_file() and not is_gguf(place))


def _groupings(domains: tuple[str, ...], by: Sequence[str] | None) -> tuple[Grouping, ...]:
    """The groupings that --by asks for."""
    from moestro.probe.measures.specialise import by_pattern

    found = []
    for each in by or ():
        name, equals, pattern = each.partition("=")
        if not (name and equals and pattern):
            raise ConfigError(f"--by {each}: give NAME=REGEX, as in 'language=-(..)$'")
        found.append(by_pattern(name, pattern, domains))
    return tuple(found)


def _require_places(out: Path | None, report: Path | None) -> None:
    """Refuse places that cannot be written to before anything is run."""
    if out is not None:
        there = next(each for each in (out, *out.absolute().parents) if each.exists())
        if not (there.is_dir() and access(there, W_OK)):
            raise ConfigError(f"cannot write to {out}; choose another folder with --out")
    if report is not None and (
        report.is_dir() or not report.parent.is_dir() or not access(report.parent, W_OK)
    ):
        raise ConfigError(
            f"cannot write the report {report}; choose a file with --report, in a folder that is "
            "there"
        )


def _beside(path: str, opened: ProbedModel | None) -> Path:
    """The default output folder: a published checkpoint is not ours to write into."""
    from moestro.checkpoints.folders import is_pretrained

    if opened is not None and not is_pretrained(opened.folder):
        return opened.home / "probe"
    return Path(f"probe-{Path(path).name.removesuffix(TRACE)}")


def _made(folder: Path) -> Path:
    """The folder, made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoestroError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder with --out"
        ) from None
    return folder


def _steps(opened: ProbedModel) -> dict[int, Path]:
    """The folders of the run's checkpoints by step: two or more."""
    from moestro.checkpoints.folders import step_folders

    folders = step_folders(opened.home)
    if len(folders) < 2:
        raise ConfigError(
            f"{opened.home} is not a run with several checkpoints, which --checkpoints compares; "
            "train with train.keep at 2 or more, or leave it out"
        )
    return folders


def _saturation(study: Study, opened: ProbedModel, seed: int) -> Saturation:
    """How much of the final routing each checkpoint of the run has, on the same text."""
    folders = _steps(opened)
    models = (open_shown(folder).model for folder in folders.values())
    return study.saturation(models, list(folders), seed)


def _compare(
    paths: tuple[str, str], how: Recording, out: Path | None, as_json: bool, seed: int
) -> None:
    """Compare two models or traces; print the table, and write compare.json with --out."""
    from rich.console import Console

    from moestro.probe.measures.measure import to_json
    from moestro.probe.measures.versus import compare
    from moestro.probe.report.table import save_text

    first, second = _both(*paths, how)
    found = compare(first.read, second.read, seed=seed)
    text = json.dumps({"paths": list(paths), **to_json(found)}, indent=1)
    file = None if out is None else _made(out) / "compare.json"
    if file is not None:
        save_text(file, text + "\n", f"the comparison {file}")
    if as_json:
        typer.echo(text)
        return
    console = Console(highlight=False)
    for letter, path in zip("AB", paths, strict=True):
        console.print(f"{letter}: {path}", markup=False, soft_wrap=True)
    print_comparison(console, found, f"the {found.documents} documents that both read", "A", "B")
    for path, left in zip(paths, found.left_out, strict=True):
        if left:
            console.print(f"{left} documents that only {path} has are left out.", markup=False)
    if file is not None:
        console.print(f"written to {file}", markup=False, soft_wrap=True)


def _both(path: str, other: str, how: Recording) -> tuple[Study, Study]:
    """Studies of both: of documents of the same sources, or of the first one's passages."""
    from moestro.probe.study import same_tokens

    files = [_is_trace(each) for each in (path, other)]
    # What was given of text and of running is for the one that is run, if there is one.
    first_how, second_how = (Recording() if file and not all(files) else how for file in files)
    first = _study(path, None if files[0] else _open(path, how), first_how, Questions())
    if how.sources or any(files):
        opened = None if files[1] else _open(other, how)
        return first, _study(other, opened, second_how, Questions())
    second = _record(_open(other, how), how, first.passages)
    if not same_tokens(first.require_tokenizer(), second.require_tokenizer()):
        raise ConfigError(
            f"{path} and {other} have different tokenizers, so the tokens that one held out mean "
            "nothing to the other; give text for both with --source"
        )
    return first, second
