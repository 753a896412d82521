"""docs/models.md and `moestro plan --list` against the tables that load and decode."""

import json
import re
from pathlib import Path

from moestro.checkpoints.families import FAMILIES, TEXT_PARTS
from moestro.cli.main import main
from moestro.config import ModelConfig
from moestro.models.budget import lacks
from moestro.plan.presets import names, preset

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ROW = re.compile(r"^\| ([^|]+) \| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|$", re.M)


def ways(family):
    """How the presets of a family decode."""
    found = [preset(name) for name in names() if preset(name).family == family]
    return {
        "native" if isinstance(s.cfg, ModelConfig) and lacks(s.cfg) is None else "Python"
        for s in found
    }


def test_the_page_names_every_family():
    text = PAGE.read_text()
    rows = {kind: row[1] for row in ROW.finditer(text) for kind in re.findall(r"`(\w+)`", row[2])}
    del rows["model_type"]
    assert rows.keys() == FAMILIES.keys() | TEXT_PARTS.keys()
    assert all(len(ways(kind)) == 1 for kind in FAMILIES)
    (sentence,) = re.findall(r"All but (\w.+?) decode in native code\.", " ".join(text.split()))
    said = re.split(r", | and ", sentence)
    python = {rows[kind] for kind in FAMILIES if ways(kind) == {"Python"}}
    native = {rows[kind] for kind in FAMILIES} - python
    assert all(any(name in row for name in said) for row in python)
    assert all(any(name in row for row in python) for name in said)
    assert not any(name in row for name in said for row in native)


def test_the_list_says_what_loads_decodes_and_trains(capsys):
    assert main(["plan", "--list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["presets"]}
    for name, entry in listed.items():
        subject = preset(name)
        assert entry["loads_as"] == (subject.family if subject.family in FAMILIES else None)
        assert entry["trains"] == (subject.cfg is not None)
        if subject.cfg is None:
            assert entry["decodes"] is None
        elif subject.family in FAMILIES:
            assert {entry["decodes"]} == ways(subject.family)
    assert listed["mixtral-8x7b"]["decodes"] == "native"
    assert listed["lfm2-8b-a1b"]["decodes"] == "Python"
    assert "short convolutions" in listed["lfm2-8b-a1b"]["why"]
    assert listed["switch-base-8"]["decodes"] == "Python"
    assert listed["dbrx"]["loads_as"] is None
