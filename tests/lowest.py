"""Prints the lowest versions that pyproject.toml promises, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(text: str) -> list[str]:
    """`name==version` for each requirement `name>=version…` of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = [
        re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", each) for group in groups for each in group
    ]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound is not None]


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"))))
