"""The page: one HTML file with its style, script and data inside, that loads nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from moestro.errors import DataError
from moestro.probe.ablation.effects import Ablations
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.saturation import Saturation
from moestro.probe.recording.traces import Trace
from moestro.probe.report.summary import summary
from moestro.probe.report.table import PAGE, Grid, grid, save_text
from moestro.probe.report.tables import tables
from moestro.probe.report.token_text import TokenText, visible
from moestro.probe.report.view import view
from moestro.text import Tokenizer

LARGEST = 3_000_000  # bytes of a page
SCRIPTS = ("page.js", "heat.js", "chart.js", "experts.js", "reading.js")
_SMALLEST_DETAIL = 0.02


class Facts(NamedTuple):
    """What is known of the model apart from its routing."""

    total: int | None = None  # all its parameters
    active: int | None = None  # those that one token passes
    layers: int | None = None  # all its layers, with and without experts
    more: Sequence[tuple[str, str]] = ()  # other names and values, such as the command


def build(
    findings: Findings,
    trace: Trace,
    tokenizer: Tokenizer,
    *,
    title: str = "",
    facts: Facts | None = None,
    ablations: Ablations | None = None,
    saturation: Saturation | None = None,
) -> str:
    """The whole page.

    Text of documents and names never become markup: in the page's body they are escaped, in its
    data no `<` is left, and its script only makes text nodes of them; in addition, the page's own
    policy lets no other script run and nothing be loaded.

    Args:
        findings: All measures of the trace.
        trace: What they are of.
        tokenizer: The model's, to turn tokens into text.
        title: Heading; unset: the model's name.
        facts: Other facts about the model.
        ablations: What changing single experts did.
        saturation: How early in training the routing was settled.

    Raises:
        DataError: the findings are not of this trace, or the trace holds no token.
    """
    _check(findings, trace)
    token_text, detail = TokenText(tokenizer, trace.tokens_T), 1.0
    fixed = {
        "title": visible(title or findings.model, 120),
        "findings": findings,
        "facts": facts or Facts(),
        "said": summary(findings, ablations),
        "ablations": ablations,
        "saturation": saturation,
        "tables": _grids(findings, ablations, saturation),
    }
    while True:
        shown = view(findings, trace, token_text, saturation, detail)
        page = _render(fixed, shown)
        if len(page.encode()) <= LARGEST or detail < _SMALLEST_DETAIL:
            return page
        detail /= 2


def write_report(path: Path, page: str) -> None:
    """Write a page whole or not at all.

    Raises:
        MoestroError: the file cannot be written.
    """
    save_text(path, page, f"the report {path}")


def _grids(
    findings: Findings, ablations: Ablations | None, saturation: Saturation | None
) -> dict[str, list[Grid]]:
    """What the page shows of the tables, by name; one of specialisation for each grouping."""
    grids: dict[str, list[Grid]] = {}
    for table in tables(findings, ablations, saturation):
        if table.page is not None:
            grids.setdefault(table.name, []).append(grid(table.rows, table.page, PAGE))
    return grids


def _check(findings: Findings, trace: Trace) -> None:
    """Refuse what does not belong together."""
    if not len(trace.tokens_T):
        raise DataError("the trace holds no token, so there is nothing to report; record some text")
    of_trace = trace.subject.moe_layers, trace.subject.num_experts, trace.domains
    if (findings.moe_layers, findings.num_experts, findings.domains) != of_trace:
        raise DataError(
            f"the findings are of {findings.model} and domains {', '.join(findings.domains)}, the "
            f"trace of {trace.subject.name} and {', '.join(trace.domains)}; measure this trace"
        )


def _render(fixed: dict[str, Any], shown: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = _count
    environment.filters["spaced"] = _spaced
    script = "\n" + "\n".join(_read(name) for name in SCRIPTS)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.from_string(_read("page.html")).render(
        **fixed,
        view=shown,
        charts=shown["charts"],
        style=_read("colours.css", "moestro") + _read("style.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        data=_embedded(shown),
    )


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element: without a sign that could end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(name: str, package: str = __package__) -> str:
    return (files(package) / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _count(value: int) -> str:
    """A large number as people say it: 47.3 million."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,}"


def _spaced(text: str) -> str:
    """Percent signs at one distance from their numbers, on the same line."""
    return re.sub(r"(?<=\d) ?%", "\u00a0%", text)
