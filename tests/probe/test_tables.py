import csv

import numpy as np
import pytest

from moestro.errors import MoestroError
from moestro.probe.measures.measure import measure
from moestro.probe.measures.saturation import saturation
from moestro.probe.report.table import PAGE, TERMINAL, View, grid, rows, save_csv, save_text
from moestro.probe.report.tables import tables

from .changed import make_ablations
from .traces import make_trace


@pytest.fixture(scope="module")
def findings():
    return measure(make_trace(domains=("=evil()", "prose"), vocabulary=4, by_token=3.0), draws=19)


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_number_of_the_findings_is_in_a_table(findings, tmp_path):
    paths = save_csv(tables(findings), tmp_path)
    rows = {path.stem: read(path) for path in paths}
    assert {name: len(each) for name, each in rows.items() if name != "tokens"} == {
        "layers": 2, "load": 2 * 4, "experts_by_domain": 2 * 2 * 4, "specialisation": 2 * 2,
        "explained": 2 * len(findings.explained.predictors), "repetition": 2 * 2,
        "caching": 3 * 2 * 4, "coactivation": 2 * 4 * 3, "overlap": 1,
    }  # fmt: skip
    load = findings.load
    for row in rows["load"]:
        at = int(row["layer"]), int(row["expert"])
        assert float(row["share"]) == pytest.approx(load.share_LE[at], rel=1e-5)
        assert float(row["low"]) == pytest.approx(load.share_interval_LE2[at][0], rel=1e-5)
    table = np.array([float(row["share"]) for row in rows["experts_by_domain"]])
    np.testing.assert_allclose(table.reshape(2, 2, 4), findings.table_LME, rtol=1e-5)
    hits = np.array([float(row["rate"]) for row in rows["caching"] if row["policy"] == "lfu"])
    np.testing.assert_allclose(hits.reshape(2, 4), findings.caching.lfu.rate_LE, rtol=1e-5)


def test_text_is_no_formula_and_tokens_have_their_text(findings, tmp_path):
    paths = save_csv(tables(findings, name=lambda token: f"@{token}\n,"), tmp_path)
    by_name = {path.stem: read(path) for path in paths}
    assert by_name["repetition"][0]["domain"] == "'=evil()"
    for row in by_name["tokens"]:
        assert row["text"] == f"'@{row['token']}\n,"
    assert by_name["tokens"]


def test_ablations_have_a_table(findings, tmp_path):
    found = make_ablations(domains=("=evil()", "prose"))
    paths = save_csv(tables(findings, ablations=found), tmp_path)
    rows = read(next(path for path in paths if path.stem == "ablation"))
    assert [row["matters_more"] for row in rows] == ["yes", "no", "no"]
    assert [row["control"] for row in rows] == ["no", "no", "yes"]
    assert float(rows[0]["difference"]) == pytest.approx(0.45)
    assert float(rows[1]["change: prose"]) == pytest.approx(0.1)


def test_saturation_has_a_table(findings, tmp_path):
    early, late = make_trace(by_token=1.0), make_trace(by_token=3.0)
    found = saturation([early, late], [10, 20], draws=19)
    paths = save_csv(tables(findings, saturation=found), tmp_path)
    rows = read(next(path for path in paths if path.stem == "saturation"))
    assert [row["step"] for row in rows] == ["10", "10", "20", "20"]
    assert [row["share"] for row in rows[2:]] == ["1", "1"]


def test_what_there_is_not_stays_empty(tmp_path):
    single = measure(make_trace(documents=1), draws=19)
    rows = {path.stem: read(path) for path in save_csv(tables(single), tmp_path)}
    assert rows["experts_by_domain"][0]["low"] == ""
    choice = measure(make_trace(empty=0.5), draws=19)
    folder = tmp_path / "choice"
    folder.mkdir()
    assert not {"caching", "repetition"} & {path.stem for path in save_csv(tables(choice), folder)}


def test_files_are_written_whole_or_not_at_all(findings, tmp_path):
    with pytest.raises(MoestroError, match="cannot write the table"):
        save_csv(tables(findings), tmp_path / "missing")
    (tmp_path / "taken").mkdir()
    with pytest.raises(MoestroError, match="cannot write it"):
        save_text(tmp_path / "taken", "text", "it")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_view_is_the_same_rows_for_page_and_terminal():
    share = np.array([[0.25, 0.75], [0.5, np.nan]])
    shares = {"share": share, "low": share - 0.125, "high": share + 0.125, "sure": share > 0.6}
    axes = {"layer": [3, 7], "domain": ["a", "b\u202e"]}
    view = View(
        "title", "layer: {layer} | by {domain:name}: {share:.2f}{~:.3f}{sure:*}", by="layer"
    )
    shown = grid(rows(axes, **shares), view, PAGE)
    assert shown.headings == ["layer", "by a", "by b\u25ab"]
    assert shown.rows[0] == ["3", "0.25 (0.125 to 0.375) ", "0.75 (0.625 to 0.875)*"]
    assert shown.rows[1][2] == "? (no interval) "
    assert shown.repeated == 2
    terminal = grid(rows(axes, **shares), view, TERMINAL)
    assert terminal.rows[0][1] == "0.25 [0.125, 0.375] "
    assert terminal.rows[1][2] == "– "
    alone = view._replace(where=lambda row: row["layer"] == 7, most=1)
    assert [cells[0] for cells in grid(rows(axes, **shares), alone, PAGE).rows] == ["7"]


def test_a_table_without_rows_has_its_headings():
    view = View("title", "layer: {layer} | share: {share:.2f}")
    assert grid([], view, PAGE)[1:] == (["layer", "share"], [], 0)
