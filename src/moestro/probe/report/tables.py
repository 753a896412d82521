"""Findings as CSV files, one row a number with its noise, for spreadsheets and other programs.

Column names are those of the fields in probe.json, without their axes. A number that there is not
stays empty. Text that a spreadsheet would take for a formula gets an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moestro.errors import MoestroError
from moestro.files import write_whole
from moestro.probe.ablation.effects import Ablations
from moestro.probe.measures.bootstrap import Floats
from moestro.probe.measures.measure import Findings
from moestro.probe.measures.saturation import Saturation

Row = dict[str, Any]


def save_tables(
    findings: Findings,
    folder: Path,
    *,
    ablations: Ablations | None = None,
    saturation: Saturation | None = None,
    name: Callable[[int], str] | None = None,
) -> list[Path]:
    """Write a CSV file for each measure that the findings hold, and return the paths.

    Args:
        findings: From `moestro.probe.measure`.
        folder: Existing folder to write to.
        ablations: What changing single experts did.
        saturation: How early in training the routing was settled.
        name: Text of a token id, for a column of it; unset: ids only.

    Raises:
        MoestroError: a file cannot be written.
    """
    tables: dict[str, Iterator[Row]] = {
        "layers": _layers(findings),
        "load": _load(findings),
        "experts_by_domain": _experts_by_domain(findings),
        "tokens": _tokens(findings, name),
        "specialisation": _specialisation(findings),
        "explained": _explained(findings),
        "repetition": _repetition(findings),
        "caching": _caching(findings),
        "coactivation": _coactivation(findings),
        "overlap": _overlap(findings),
        "ablation": iter(()) if ablations is None else _ablation(ablations),
        "saturation": iter(()) if saturation is None else _saturation(saturation),
    }
    paths = []
    for table, rows in tables.items():
        text = _csv(rows)
        if text:
            path = folder / f"{table}.csv"
            save_text(path, text, f"the table {path}")
            paths.append(path)
    return paths


def save_text(path: Path, text: str, what: str) -> None:
    """Write a file whole or not at all, in UTF-8.

    Args:
        path: The file.
        text: Its content.
        what: What to call it in an error.

    Raises:
        MoestroError: it cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        reason = error.strerror or error
        raise MoestroError(f"cannot write {what}: {reason}; choose another place") from None


def _csv(rows: Iterator[Row]) -> str:
    """All rows under the names of the first; empty without any."""
    buffer, writer = io.StringIO(), None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(buffer, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """A value that means the same to every reader."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}" if np.isfinite(value) else ""
    if isinstance(value, str):
        return "'" + value if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return "" if value is None else value


def _between(interval_2: Floats, prefix: str = "") -> Row:
    return {f"{prefix}low": interval_2[0], f"{prefix}high": interval_2[1]}


def _layers(findings: Findings) -> Iterator[Row]:
    load, entropy, margin = findings.load, findings.entropy, findings.margin
    for at, layer in enumerate(findings.moe_layers):
        row: Row = {"layer": layer, "imbalance": load.imbalance_L[at]}
        row |= _between(load.imbalance_interval_L2[at], "imbalance_")
        row |= {"variation": load.variation_L[at]}
        row |= _between(load.variation_interval_L2[at], "variation_")
        row |= {"dead": len(load.dead_L[at]), "dropped": load.dropped_L[at]}
        row |= _between(load.dropped_interval_L2[at], "dropped_")
        if entropy is not None:
            row |= {"balance": entropy.balance_L[at]}
            row |= _between(entropy.balance_interval_L2[at], "balance_")
            row |= {"spread": entropy.spread_L[at]}
            row |= _between(entropy.spread_interval_L2[at], "spread_")
        if margin is not None:
            row |= {"margin": margin.mean_L[at]} | _between(margin.interval_L2[at], "margin_")
        yield row


def _load(findings: Findings) -> Iterator[Row]:
    load = findings.load
    for at, expert in np.ndindex(load.share_LE.shape):
        yield {
            "layer": findings.moe_layers[at],
            "expert": expert,
            "share": load.share_LE[at, expert],
            **_between(load.share_interval_LE2[at, expert]),
            "equal_share": 1 / findings.num_experts,
        }


def _experts_by_domain(findings: Findings) -> Iterator[Row]:
    for at in np.ndindex(findings.table_LME.shape):
        yield {
            "layer": findings.moe_layers[at[0]],
            "domain": findings.domains[at[1]],
            "expert": at[2],
            "share": findings.table_LME[at],
            **_between(findings.table_interval_LME2[at]),
            "equal_share": 1 / findings.num_experts,
            "p_value": findings.table_p_value_LME[at],
            "supported": findings.table_supported_LME[at],
        }


def _tokens(findings: Findings, name: Callable[[int], str] | None) -> Iterator[Row]:
    found = findings.tokens
    for at in np.ndindex(found.token_LEX.shape):
        token = int(found.token_LEX[at])
        if token < 0:
            continue
        yield {
            "layer": findings.moe_layers[at[0]],
            "expert": at[1],
            "token": token,
            **({} if name is None else {"text": name(token)}),
            "count": found.count_LEX[at],
            "rate": found.rate_LEX[at],
            "lift": found.lift_LEX[at],
            "low": found.low_LEX[at],
            "supported": found.supported_LEX[at],
        }


def _specialisation(findings: Findings) -> Iterator[Row]:
    for found in findings.specialisation:
        beyond = found.beyond
        for at in np.ndindex(found.distance_LM.shape):
            layer, label = at
            yield {
                "grouping": found.grouping,
                "layer": findings.moe_layers[layer],
                "label": found.labels[label],
                "documents": found.documents_M[label],
                "distance": found.distance_LM[at],
                **_between(found.interval_LM2[at]),
                "chance": found.chance_LM[at],
                "chance_high": found.chance_high_LM[at],
                "layer_mean": found.mean_L[layer],
                "layer_chance": found.mean_chance_L[layer],
                "layer_p_value": found.p_value_L[layer],
                "layer_supported": found.supported_L[layer],
                "shared_tokens": beyond.shared_M[label],
                "shared_distance": beyond.distance_LM[at],
                "tokens_alone": beyond.tokens_LM[at],
                **_between(beyond.tokens_interval_LM2[at], "tokens_alone_"),
                "excess": beyond.excess_LM[at],
                **_between(beyond.interval_LM2[at], "excess_"),
                "excess_chance": beyond.chance_LM[at],
                "excess_chance_high": beyond.chance_high_LM[at],
                "excess_layer_mean": beyond.mean_L[layer],
                "excess_layer_chance": beyond.mean_chance_L[layer],
                "excess_layer_p_value": beyond.p_value_L[layer],
                "excess_layer_supported": beyond.supported_L[layer],
            }


def _explained(findings: Findings) -> Iterator[Row]:
    found = findings.explained
    if found is None:
        return
    for layer, which in np.ndindex(found.accuracy_LJ.shape):
        yield {
            "layer": findings.moe_layers[layer],
            "predictor": found.predictors[which],
            "accuracy": found.accuracy_LJ[layer, which],
            **_between(found.accuracy_interval_LJ2[layer, which]),
            "majority": found.majority_L[layer],
            **_between(found.majority_interval_L2[layer], "majority_"),
            "explained": found.explained_LJ[layer, which],
            **_between(found.explained_interval_LJ2[layer, which], "explained_"),
            "unseen": found.unseen_J[which],
        }


def _repetition(findings: Findings) -> Iterator[Row]:
    found = findings.repetition
    if found is None:
        return
    for at in np.ndindex(found.first_LM.shape):
        yield {
            "layer": findings.moe_layers[at[0]],
            "domain": findings.domains[at[1]],
            "first": found.first_LM[at],
            "first_error": found.first_error_LM[at],
            "first_shuffled": found.first_shuffled_LM[at],
            "first_uniform": found.first_uniform,
            "any": found.any_LM[at],
            "any_error": found.any_error_LM[at],
            "any_shuffled": found.any_shuffled_LM[at],
            "any_uniform": found.any_uniform,
        }


def _caching(findings: Findings) -> Iterator[Row]:
    found = findings.caching
    if found is None:
        return
    for policy in ("lru", "lfu", "oracle"):
        rates = getattr(found, policy)
        for at in np.ndindex(rates.rate_LE.shape):
            yield {
                "policy": policy,
                "layer": findings.moe_layers[at[0]],
                "size": at[1] + 1,
                "rate": rates.rate_LE[at],
                **_between(rates.interval_LE2[at]),
                "shuffled": rates.shuffled_LE[at],
                "uniform": rates.uniform_E[at[1]],
                "mean_over_layers": rates.mean_E[at[1]],
                **_between(rates.mean_interval_E2[at[1]], "mean_"),
            }


def _coactivation(findings: Findings) -> Iterator[Row]:
    found = findings.coactivation
    if found is None:
        return
    for at in np.ndindex(found.given_LEE.shape):
        layer, first, second = at
        if first == second:
            continue
        yield {
            "layer": findings.moe_layers[layer],
            "expert": first,
            "other": second,
            "given": found.given_LEE[at],
            "independent": found.independent_LEE[at],
            "ratio": found.ratio_LEE[at],
            **_between(found.ratio_interval_LEE2[at], "ratio_"),
            "p_value": found.p_value_LEE[at],
        }


def _overlap(findings: Findings) -> Iterator[Row]:
    found = findings.overlap
    if found is None:
        return
    for at, information in enumerate(found.information_L):
        yield {
            "layer": findings.moe_layers[at],
            "next_layer": findings.moe_layers[at + 1],
            "information": information,
            **_between(found.interval_L2[at]),
            "chance": found.chance_L[at],
        }


def _ablation(found: Ablations) -> Iterator[Row]:
    for row in found.rows:
        yield {
            "mode": found.mode,
            "unit": found.unit,
            "layer": row.layer,
            "expert": row.expert,
            "other": row.other,
            "domain": row.domain,
            "control": row.control,
            "own": row.own,
            "elsewhere": row.elsewhere,
            **_between(row.elsewhere_interval_2, "elsewhere_"),
            "difference": row.difference,
            **_between(row.difference_interval_2, "difference_"),
            "p_own": row.p_own,
            "p_elsewhere": row.p_elsewhere,
            "p_more": row.p_more,
            "verdict": row.verdict,
            "tokens_verdict": row.tokens_verdict,
            "matters_more": row.matters_more,
            **{f"change: {name}": row.change_M[at] for at, name in enumerate(found.domains)},
        }


def _saturation(found: Saturation) -> Iterator[Row]:
    for at in np.ndindex(found.share_JL.shape):
        yield {
            "step": found.steps_J[at[0]],
            "layer": found.moe_layers[at[1]],
            "share": found.share_JL[at],
            **_between(found.interval_JL2[at]),
            "chance_at_loads": found.loads_JL[at],
            "chance": found.random,
            "mean_over_layers": found.mean_J[at[0]],
            **_between(found.mean_interval_J2[at[0]], "mean_"),
        }
