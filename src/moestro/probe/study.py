"""A study of one model: its trace on labelled text, the questions asked of both, and the files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from moestro.errors import DataError, MoestroError
from moestro.models.decoder import Decoder
from moestro.probe.ablation.ablate import ablate
from moestro.probe.ablation.effects import Ablations
from moestro.probe.ablation.targets import require_token_choice, targets
from moestro.probe.measures.measure import Findings, measure, to_json
from moestro.probe.measures.saturation import Saturation, saturation
from moestro.probe.measures.specialise import Grouping
from moestro.probe.measures.versus import Comparison, compare
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.reader import reader_of
from moestro.probe.recording.record import Progress, record, record_batches
from moestro.probe.recording.tracefile import read_trace, write_parts
from moestro.probe.recording.traces import Trace, join
from moestro.probe.report.figures import save_figures
from moestro.probe.report.page import Facts, build, write_report
from moestro.probe.report.summary import summary
from moestro.probe.report.table import save_csv, save_text
from moestro.probe.report.tables import tables
from moestro.probe.report.token_text import TokenText
from moestro.text import Tokenizer, load_tokenizer


class Answers(NamedTuple):
    """What was measured of a model.

    Attributes:
        findings: what its trace says of the text that it was given.
        written: how routing differs where it wrote itself; None where it did not.
        ablations: the effect of silencing experts, if requested.
        saturation: how early in its training the routing was settled, likewise.
    """

    findings: Findings
    written: Comparison | None = None
    ablations: Ablations | None = None
    saturation: Saturation | None = None

    @property
    def summary(self) -> list[str]:
        """What the findings support, in sentences."""
        return [said.text for said in summary(self.findings, self.ablations)]


class Study(NamedTuple):
    """A trace, and its model if available.

    Attributes:
        trace: every decision.
        tokenizer: the model's; None where it cannot be found.
        model: None where the trace was read from a file, and nothing more can be run.
        passages: the text that the model read; of a trace's file unknown.
    """

    trace: Trace
    tokenizer: Tokenizer | None
    model: nn.Module | None = None
    passages: Sequence[Passage] = ()

    @property
    def read(self) -> Trace:
        """The decisions on what the model was given; what it wrote itself is left out."""
        written_T = self.trace.generated_T
        return self.trace.choose_tokens(~written_T) if written_T.any() else self.trace

    def measure(self, groupings: Sequence[Grouping] = (), seed: int = 0) -> Answers:
        """All that the trace says.

        Raises:
            DataError, MoestroError: see `moestro.probe.measure`.
        """
        findings = measure(self.read, groupings=groupings, seed=seed)
        written_T = self.trace.generated_T
        if not written_T.any():
            return Answers(findings)
        return Answers(findings, compare(self.read, self.trace.choose_tokens(written_T), seed=seed))

    def ablate(self, most: int, seed: int = 0, progress: Progress | None = None) -> Ablations:
        """Silence experts that look special in one half of the documents, measured on the other.

        At most so many, and as many controls beside them.

        Raises:
            MoestroError: the study has no model, or see `moestro.probe.ablate`.
            DataError: fewer than two domains have two documents.
        """
        if self.model is None:
            raise MoestroError(
                "this study was read from a trace; to run the model, record it again"
            )
        trace = self.read
        first, second = halves(trace)
        in_first_P = np.array([name in first for name in trace.documents])
        chosen = targets(trace.choose(in_first_P[trace.document_N]), most, seed=seed)
        passages = [each for each in self.passages if each.document in second]
        return ablate(
            self.model, passages, chosen, tokenizer=self.tokenizer, seed=seed, progress=progress
        )

    def saturation(
        self, models: Iterable[nn.Module], steps: Sequence[int], seed: int = 0
    ) -> Saturation:
        """How much of the final routing each checkpoint of a run has, on the same text."""
        traces = [record(model, self.passages, tokenizer=self.tokenizer) for model in models]
        return saturation(traces, steps, seed=seed)

    def save(
        self,
        answers: Answers,
        folder: Path,
        *,
        layer: int | None = None,
        sources: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """Write figures (PNG and SVG), tables (CSV) and probe.json to a folder; the files' names.

        Args:
            answers: what was measured.
            folder: an existing one.
            layer: layer number whose experts the figure by domain shows; None: of all.
            sources: of the text, noted in probe.json; none: what the run held out.
            seed: of the draws, likewise.

        Raises:
            MoestroError: a file cannot be written.
        """
        trace, (findings, written, ablations, saturated) = self.trace, answers
        figures = [file.name for file in save_figures(findings, folder, layer, ablations)]
        name = None if self.tokenizer is None else TokenText(self.tokenizer, trace.tokens_T).name
        files = save_csv(tables(findings, ablations, saturated, name), folder)
        content = {
            "fingerprint": trace.subject.fingerprint,
            "sources": list(sources) or None,
            "tokens_recorded": len(trace.tokens_T),
            "tokens_generated": int(trace.generated_T.sum()),
            "seed": seed,
            "summary": answers.summary,
            "figures": figures,
            **to_json(findings),
            "ablations": to_json(ablations),
            "saturation": to_json(saturated),
            "written": to_json(written),
        }
        path = folder / "probe.json"
        save_text(path, json.dumps(content, indent=1) + "\n", f"the findings {path}")
        return [*figures, *(file.name for file in files), path.name]

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, which a page needs to show text.

        Raises:
            DataError: it cannot be found.
        """
        if self.tokenizer is None:
            raise DataError(
                "a page shows text, and the tokenizer of this trace's model, "
                f"{self.trace.subject.name}, is not there; probe the model itself"
            )
        return self.tokenizer

    def write_page(self, answers: Answers, path: Path) -> None:
        """Write the page to read in a browser.

        Raises:
            DataError: the model's tokenizer cannot be found.
            MoestroError: the file cannot be written.
        """
        findings, _, ablations, saturated = answers
        page = build(
            findings,
            self.trace,
            self.require_tokenizer(),
            facts=None if self.model is None else Facts(*reader_of(self.model).size()),
            ablations=ablations,
            saturation=saturated,
        )
        write_report(path, page)


def record_study(
    model: nn.Module,
    tokenizer: Tokenizer,
    passages: Sequence[Passage],
    *,
    name: str,
    generate: int = 0,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Study:
    """Record a model on its text, as `moestro.probe.record` does; `keep`: a file for the trace."""
    batches = record_batches(
        model, passages, tokenizer=tokenizer, name=name, generate=generate, progress=progress
    )
    if keep is None:
        return Study(join(list(batches)), tokenizer, model, passages)
    write_parts(keep, batches)
    return Study(read_trace(keep), tokenizer, model, passages)


def read_study(path: Path) -> Study:
    """A trace from its file, with the tokenizer of its model if it is still there."""
    trace, tokenizer = read_trace(path), None
    with suppress(DataError):
        tokenizer = load_tokenizer(Path(trace.subject.name))
    return Study(trace, tokenizer)


def require_ablatable(model: nn.Module, passages: Iterable[Passage]) -> None:
    """Refuse a model or its text for `Study.ablate` before anything is recorded.

    Raises:
        MoestroError: the model's experts choose the tokens.
        DataError: as `halves`; every passage is expected to name its document.
    """
    moe = model.cfg.moe if isinstance(model, Decoder) else None
    if moe is not None:
        require_token_choice(moe.router.kind != "expert_choice")
    _require_halves((each.domain, each.document) for each in passages)


def _require_halves(names: Iterable[tuple[str, str]]) -> None:
    """Refuse text, by the names of domains and documents, that has too few to be halved."""
    sizes = Counter(domain for domain, _ in set(names))
    if sum(size > 1 for size in sizes.values()) < 2:
        raise DataError(
            "ablation chooses experts on some documents and measures them on others: it needs two "
            "domains of at least two documents each; give more text"
        )


def halves(trace: Trace) -> tuple[set[str], set[str]]:
    """Names of every other document of each domain, and of the others; lone ones are left out.

    Raises:
        DataError: fewer than two domains have two documents.
    """
    _require_halves(trace.names_N)
    pairs = sorted(set(zip(trace.domain_N.tolist(), trace.document_N.tolist(), strict=True)))
    sizes = Counter(domain for domain, _ in pairs)
    sides: tuple[set[str], set[str]] = (set(), set())
    turn: Counter[int] = Counter()
    for domain, document in pairs:
        if sizes[domain] > 1:
            sides[turn[domain] % 2].add(trace.documents[document])
            turn[domain] += 1
    return sides


def same_tokens(here: Tokenizer, there: Tokenizer) -> bool:
    """Whether both give every id the same text."""
    size = here.vocab_size
    if size != there.vocab_size:
        return False
    return all(here.decode([token]) == there.decode([token]) for token in range(size))
