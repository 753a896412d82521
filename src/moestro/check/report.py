"""What checks found: one Finding each, and the Report of them all as text, JSON or JUnit XML."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

# skipped: does not apply here, or was not asked for; unchecked: could not be done.
Outcome = Literal["ok", "wrong", "skipped", "unchecked"]
_WORDS: tuple[tuple[Outcome, str], ...] = (
    ("wrong", "wrong"), ("unchecked", "could not be done"), ("ok", "right"),
    ("skipped", "not applicable"),
)  # fmt: skip


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        outcome: see there.
        words: of wrong: where the largest difference is; else why.
        difference: relative, see `compare`; None: not a matter of a difference.
        allowed: the tolerance.
    """

    outcome: Outcome
    words: str = ""
    difference: float | None = None
    allowed: float | None = None


OK = Finding("ok")


def wrong(words: str) -> Finding:
    """A defect that is not a matter of a difference."""
    return Finding("wrong", words)


def skipped(words: str) -> Finding:
    """Why a check does not apply."""
    return Finding("skipped", words)


class Explained(NamedTuple):
    """A finding with its check: the name, what is checked, which published defects look like it."""

    check: str
    finding: Finding
    meaning: str
    looks_like: str

    def sentence(self) -> str:
        """Of what is wrong: where, what should hold, and which defects look like that."""
        looks_like = f" Looks like: {self.looks_like}." if self.looks_like else ""
        return f"{self.finding.words}. What should hold: {self.meaning}{looks_like}"


class Report(NamedTuple):
    """What was found in one subject."""

    title: str
    found: tuple[Explained, ...]
    seed: int

    @property
    def wrong(self) -> list[str]:
        """Names of the checks that failed."""
        return [each.check for each in self.found if each.finding.outcome == "wrong"]

    @property
    def unchecked(self) -> list[str]:
        """Names of the checks that could not be done."""
        return [each.check for each in self.found if each.finding.outcome == "unchecked"]

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and nothing was left unchecked."""
        return not self.exit_code

    @property
    def exit_code(self) -> int:
        """1: something is wrong; 3: nothing is, but something could not be checked; else 0."""
        if self.wrong:
            return 1
        return 3 if self.unchecked else 0

    def reasons(self) -> dict[str, list[str]]:
        """Why checks were skipped: the reason, and the names of those that it kept from running."""
        found: dict[str, list[str]] = {}
        for each in self.found:
            if each.finding.outcome == "skipped":
                found.setdefault(each.finding.words, []).append(each.check)
        return found

    def summary(self) -> str:
        """How many checks came to what."""
        outcomes = [each.finding.outcome for each in self.found]
        counts = ((outcomes.count(outcome), words) for outcome, words in _WORDS)
        return ", ".join(f"{count} {words}" for count, words in counts if count)

    def text(self) -> str:
        """How many are wrong and unchecked, and one line for each of them."""
        counts = f"{len(self.wrong)} wrong"
        if self.unchecked:
            counts += f", {len(self.unchecked)} could not be done"
        lines = [
            f"{each.check}: {each.sentence()}"
            for each in self.found
            if each.finding.outcome == "wrong"
        ]
        lines += [
            f"{each.check} could not be done: {each.finding.words}"
            for each in self.found
            if each.finding.outcome == "unchecked"
        ]
        return "\n".join([f"{self.title}: {counts}", *lines])

    def as_json(self) -> dict[str, Any]:
        """Names and plain values; a difference that is infinite becomes null."""
        rows = []
        for each in self.found:
            row = each.finding._asdict()
            if row["difference"] == float("inf"):
                row["difference"] = None
            rows.append(
                {"check": each.check, **row, "meaning": each.meaning, "looks_like": each.looks_like}
            )
        return {"title": self.title, "seed": self.seed, "ok": self.ok, "checks": rows}


def joined(reports: list[Report]) -> Report:
    """One report of several subjects; what is found in each is said with its title."""
    if len(reports) == 1:
        return reports[0]
    found = [
        each._replace(finding=each.finding._replace(words=f"{report.title}: {each.finding.words}"))
        for report in reports
        for each in report.found
    ]
    return Report("; ".join(each.title for each in reports), tuple(found), reports[0].seed)


def junit(reports: list[Report]) -> str:
    """JUnit XML: a suite for each subject, a case for each check."""
    root = ElementTree.Element("testsuites")
    for report in reports:
        outcomes = [each.finding.outcome for each in report.found]
        suite = ElementTree.SubElement(
            root, "testsuite", name=report.title, tests=str(len(outcomes)),
            failures=str(outcomes.count("wrong")), skipped=str(outcomes.count("skipped")),
            errors=str(outcomes.count("unchecked")),
        )  # fmt: skip
        for each in report.found:
            case = ElementTree.SubElement(
                suite, "testcase", classname=report.title, name=each.check
            )
            if each.finding.outcome == "wrong":
                ElementTree.SubElement(case, "failure", message=each.sentence())
            elif each.finding.outcome != "ok":
                tag = "skipped" if each.finding.outcome == "skipped" else "error"
                ElementTree.SubElement(case, tag, message=each.finding.words)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
