"""An install today and an install next year are the same: everything is pinned, within bounds."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from . import lowest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    if not line.startswith("#")
)


def requirements() -> list[Requirement]:
    groups = [
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
    ]
    return [Requirement(text) for group in groups for text in group]


def test_every_requirement_is_pinned_within_its_bounds():
    for each in requirements():
        pin = PINS[each.name.lower().replace("_", "-")]
        assert each.specifier.contains(pin), f"{each} but {pin} in constraints.txt"


def test_every_requirement_has_a_lowest_version():
    tested = [name.split("==")[0] for name in lowest.lowest((ROOT / "pyproject.toml").read_text())]
    named = [each.name for each in requirements() if each.name != "scikit-build-core"]
    assert tested == named


def test_the_makefile_installs_from_the_pins():
    makefile = (ROOT / "Makefile").read_text()
    assert "PIP_CONSTRAINT=constraints.txt" in makefile
    installs = re.findall(r"^.*\$\(BIN\)/python \$\(INSTALL\).*$", makefile, re.MULTILINE)
    assert installs
    assert all("$(PINNED)" in line for line in installs)
