"""The built-in corpus: text that every Python installation has, and generated arithmetic.

Three kinds, so that labelled domains exist with no download: code (the standard library without
its docstrings), English (those docstrings and the language's documentation topics), and worked
arithmetic. The first two depend on the interpreter only, the third on a seed only.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moestro.errors import DataError

ARITHMETIC_DOCUMENTS = 1500
ARITHMETIC_CHARACTERS = 1000
_TOPICS = Path("pydoc_data", "topics.py")
# Installed packages, tests, compiled files, and tables of character codes are not library text.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__",
    "turtledemo", "encodings", "pydoc_data", "lib-dynload",
}  # fmt: skip
_PROSE = (".txt", ".rst")
_OPENINGS = ('"', "'", "r'", 'r"', "R'", 'R"', "u'", 'u"', "U'", 'U"')
_SHORTEST_DOCSTRING = 40
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class LibraryText(NamedTuple):
    """One module or page of the standard library.

    Attributes:
        module: Path below the standard library, such as "asyncio/events.py".
        code: Source without docstrings; "" for a page of prose.
        english: Docstrings or prose; "" where there is none.
    """

    module: str
    code: str
    english: str


def library_files() -> list[Path]:
    """Every file that `library_texts` reads, sorted."""
    root = _library()
    found = [root / _TOPICS] if (root / _TOPICS).is_file() else []
    for folder, inner, names in os.walk(root):
        inner[:] = [n for n in inner if n not in _SKIPPED_FOLDERS and not n.startswith("config-")]
        # _sysconfigdata is a generated table of this machine's build settings.
        texts = (n for n in names if n.endswith((".py", *_PROSE)))
        found += [Path(folder, n) for n in texts if not n.startswith("_sysconfigdata")]
    if not any(path.suffix == ".py" and path != root / _TOPICS for path in found):
        raise DataError(
            f"this Python has no standard-library sources in {root}, so there is no built-in text; "
            "give data.sources files or folders of your own"
        )
    return sorted(found)


def library_texts() -> Iterator[LibraryText]:
    """The standard library's modules, then its documentation topics, in a fixed order."""
    root = _library()
    for path in library_files():
        module = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"{path} of this Python cannot be read ({error.strerror})") from None
        if path == root / _TOPICS:
            for topic, page in sorted(_topics(text).items()):
                yield LibraryText(f"{module}/{topic}", "", page)
        elif path.suffix == ".py":
            yield LibraryText(module, *split_docstrings(text))
        else:
            yield LibraryText(module, "", text)


def split_docstrings(source: str) -> tuple[str, str]:
    """Part a module's source into its code (comments stay) and its docstrings as prose.

    Source that does not parse is all code. Doctests and one-word docstrings are left out of the
    prose, and the code is for reading: a body that was only a docstring is gone. A docstring on
    the line of its `def` stays in the code too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other people's source
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return source, ""
    prose, spans = [], []
    for node in ast.walk(tree):
        if not isinstance(node, _DOCUMENTED) or not node.body:
            continue
        first = node.body[0]
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            spans.append((value.lineno, value.end_lineno or value.lineno))
            prose.append((value.lineno, _without_doctests(inspect.cleandoc(value.value))))
    return _without_lines(source, spans), "\n\n".join(
        text for _, text in sorted(prose) if len(text) >= _SHORTEST_DOCSTRING
    )


def arithmetic_texts(seed: int) -> Iterator[str]:
    """Worked sums, differences, products, comparisons and number words, about 1 kB a document."""
    kinds = (_addition, _subtraction, _product, _comparison, _words, _sequence)
    for number in range(ARITHMETIC_DOCUMENTS):
        source = random.Random(f"moestro arithmetic {seed} {number}")
        # Two kinds a document, so that the beginning predicts the rest.
        chosen = source.sample(kinds, 2)
        text = ""
        while len(text) < ARITHMETIC_CHARACTERS:
            text += source.choice(chosen)(source) + "\n"
        yield text


def number_words(number: int) -> str:
    """`number` in English, for 0 to 999 999."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        rest = number % 10
        return _TENS[number // 10] + (f"-{_ONES[rest]}" if rest else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % size
    joint = " and " if rest < 100 else " "
    return f"{number_words(number // size)} {name}" + (joint + number_words(rest) if rest else "")


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics(source: str) -> dict[str, str]:
    """The pages of pydoc_data/topics.py, read without running it."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(key): str(page) for key, page in ast.literal_eval(node.value).items()}
    return {}


def _without_doctests(text: str) -> str:
    kept, within = [], False
    for line in text.splitlines():
        within = line.lstrip().startswith(">>>") or (within and bool(line.strip()))
        if not within:
            kept.append(line.rstrip())
    return "\n".join(kept).strip()


def _without_lines(source: str, spans: list[tuple[int, int]]) -> str:
    """Drop the (first, last) lines, numbered from 1, and blank lines beyond two in a row."""
    # Not splitlines: the parser does not end a line at a form feed.
    lines: list[str | None] = [*source.replace("\r\n", "\n").split("\n")]
    for first, last in spans:
        if (lines[first - 1] or "").lstrip().startswith(_OPENINGS):
            lines[first - 1 : last] = [None] * (last - first + 1)
    kept: list[str] = []
    blanks = 0
    for line in lines:
        if line is None:
            continue
        blanks = 0 if line.strip() else blanks + 1
        if blanks <= 2:
            kept.append(line)
    return "\n".join(kept).strip() + "\n"


def _two(source: random.Random, digits: int) -> tuple[int, int]:
    low = 10 ** source.randint(0, digits - 1)
    return source.randrange(low, 10**digits), source.randrange(low, 10**digits)


def _addition(source: random.Random) -> str:
    a, b = _two(source, 4)
    steps, carry, rest_a, rest_b = [], 0, a, b
    while rest_a or rest_b:
        x, y = rest_a % 10, rest_b % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        steps.append(f"{x} + {y}{carried} = {total}")
        carry, rest_a, rest_b = total // 10, rest_a // 10, rest_b // 10
    return f"{a} + {b}: {', '.join(steps)}. So {a} + {b} = {a + b}."


def _subtraction(source: random.Random) -> str:
    b, a = sorted(_two(source, 4))
    return f"{a} - {b} = {a - b}, because {b} + {a - b} = {a}."


def _product(source: random.Random) -> str:
    a, b = source.randrange(11, 1000), source.randrange(2, 100)
    if b < 10:
        return f"{a} x {b} = {a * b}."
    tens, ones = b // 10 * 10, b % 10
    return (
        f"{a} x {b}: {a} x {tens} = {a * tens}, {a} x {ones} = {a * ones}, "
        f"{a * tens} + {a * ones} = {a * b}. So {a} x {b} = {a * b}."
    )


def _comparison(source: random.Random) -> str:
    a, b = _two(source, 5)
    if a == b:
        return f"{a} = {b}: they are equal."
    sign, word = ("<", "less") if a < b else (">", "greater")
    return f"{a} {sign} {b}: {a} is {word} than {b} by {abs(a - b)}."


def _words(source: random.Random) -> str:
    number = source.randrange(10 ** source.randint(1, 6))
    return f"{number} is {number_words(number)}."


def _sequence(source: random.Random) -> str:
    start, step = source.randrange(200), source.randrange(1, 30)
    terms = ", ".join(str(start + step * turn) for turn in range(8))
    return f"Count by {step} from {start}: {terms}."
