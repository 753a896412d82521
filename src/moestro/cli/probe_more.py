"""What `moestro probe` does on request: ablation, saturation over a run, and the page."""

from __future__ import annotations

from collections import Counter
from os import W_OK, access
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.cli.opening import bar, open_shown
from moestro.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moestro.cli.probe import Looked, Wanted
    from moestro.probe.ablation.effects import Ablations
    from moestro.probe.measures.measure import Findings
    from moestro.probe.measures.saturation import Saturation
    from moestro.probe.measures.versus import Comparison
    from moestro.probe.recording.traces import Trace
    from moestro.text import Tokenizer


def ablate_halves(looked: Looked, most: int, seed: int) -> Ablations:
    """Silence experts that look special in one half of the documents; measure on the other half.

    Args:
        looked: the model and its trace.
        most: how many; as many controls are silenced beside them.
        seed: of the draws.

    Raises:
        DataError: fewer than two domains have two documents.
    """
    from moestro.probe.ablation.ablate import ablate
    from moestro.probe.ablation.targets import targets

    assert looked.probed is not None
    trace = looked.read
    first, second = halves(trace)
    passages = [each for each in looked.passages if each.document in second]
    chosen = targets(_of(trace, first), most, seed=seed)
    with bar("silencing experts") as progress:
        return ablate(
            looked.probed.model,
            passages,
            chosen,
            tokenizer=looked.probed.tokenizer,
            seed=seed,
            progress=progress,
        )


def halves(trace: Trace) -> tuple[set[str], set[str]]:
    """Names of every other document of each domain, and of the others; lone ones are left out.

    Raises:
        DataError: fewer than two domains have two documents.
    """
    pairs = sorted(set(zip(trace.domain_N.tolist(), trace.document_N.tolist(), strict=True)))
    sizes = Counter(domain for domain, _ in pairs)
    if sum(size > 1 for size in sizes.values()) < 2:
        raise DataError(
            "ablation chooses experts on some documents and measures them on others: it needs two "
            "domains of at least two documents each; give more text, or raise --tokens"
        )
    sides: tuple[set[str], set[str]] = (set(), set())
    turn: Counter[int] = Counter()
    for domain, document in pairs:
        if sizes[domain] > 1:
            sides[turn[domain] % 2].add(trace.documents[document])
            turn[domain] += 1
    return sides


def saturation_of_run(looked: Looked, seed: int) -> Saturation:
    """How much of the final routing each checkpoint of the run has, on the same text.

    Raises:
        ConfigError: it is no run with several checkpoints.
    """
    from moestro.checkpoints.folders import step_folders
    from moestro.checkpoints.hub import find_checkpoint
    from moestro.probe.measures.saturation import saturation
    from moestro.probe.recording.record import record

    home = None if looked.probed is None else looked.probed.home
    folders = {} if home is None else step_folders(home)
    if len(folders) < 2:
        raise ConfigError(
            f"{home or 'a trace'} is no run with several checkpoints, which --checkpoints "
            "compares; train with train.keep at 2 or more, or leave it out"
        )
    assert looked.probed is not None
    traces = []
    for folder in folders.values():
        model = open_shown(find_checkpoint(folder)).model
        traces.append(record(model, looked.passages, tokenizer=looked.probed.tokenizer))
    return saturation(traces, list(folders), seed=seed)


def content_of(
    trace: Trace,
    wanted: Wanted,
    findings: Findings,
    ablations: Ablations | None,
    saturation: Saturation | None,
    written: Comparison | None,
    figures: list[str],
) -> dict[str, Any]:
    """What probe.json holds."""
    from moestro.probe.measures.measure import to_json
    from moestro.probe.report.summary import summary

    return {
        "fingerprint": trace.subject.fingerprint,
        "sources": list(wanted.sources) or None,
        "tokens_recorded": len(trace.tokens_T),
        "tokens_generated": int(trace.generated_T.sum()),
        "seed": wanted.seed,
        "summary": [said.text for said in summary(findings, ablations)],
        "figures": figures,
        **to_json(findings),
        "ablations": to_json(ablations),
        "saturation": to_json(saturation),
        "written": to_json(written),
    }


def require_places(out: Path | None, report: Path | None) -> None:
    """Refuse places that cannot be written to before anything is run.

    Raises:
        ConfigError: names the option.
    """
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


def written_beside_read(looked: Looked, seed: int) -> Comparison | None:
    """How routing differs where the model wrote itself; None where it did not."""
    from moestro.probe.measures.versus import compare

    written_T = looked.trace.generated_T
    if not written_T.any():
        return None
    return compare(looked.read, looked.trace.choose_tokens(written_T), seed=seed)


def write_page(
    path: Path,
    findings: Findings,
    looked: Looked,
    tokenizer: Tokenizer,
    ablations: Ablations | None,
    saturation: Saturation | None,
) -> None:
    """The page to read in a browser.

    Raises:
        MoestroError: it cannot be written.
    """
    from moestro.models.count import count
    from moestro.models.decoder import Decoder
    from moestro.probe.report.page import Facts, build, write_report

    facts = None
    model = None if looked.probed is None else looked.probed.model
    if isinstance(model, Decoder):
        counted = count(model.cfg)
        facts = Facts(counted.total, counted.active, model.cfg.num_layers)
    elif model is not None:
        facts = Facts(sum(each.numel() for each in model.parameters()))
    page = build(
        findings,
        looked.trace,
        tokenizer,
        facts=facts,
        ablations=ablations,
        saturation=saturation,
    )
    write_report(path, page)


def _of(trace: Trace, documents: set[str]) -> Trace:
    """The sequences of these documents."""
    import numpy as np

    wanted_P = np.array([name in documents for name in trace.documents])
    return trace.choose(wanted_P[trace.document_N])


def tokenizer_of(looked: Looked, needed: bool) -> Tokenizer | None:
    """The model's tokenizer; of a trace that of its model, where that still lies there.

    Raises:
        DataError: it is needed and not there.
    """
    from moestro.text import load_tokenizer

    if looked.probed is not None:
        return looked.probed.tokenizer
    try:
        return load_tokenizer(Path(looked.trace.subject.name))
    except DataError:
        if not needed:
            return None
        raise DataError(
            "a page shows text, and the tokenizer of this trace's model, "
            f"{looked.trace.subject.name}, is not there; probe the model itself with --report"
        ) from None
