"""The built-in corpus: what is parted, what is generated, and that it is always the same."""

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data import builtin
from moestro.data.builtin import (
    arithmetic_texts,
    library_files,
    library_texts,
    number_words,
    split_docstrings,
)
from moestro.errors import DataError

SOURCE = '''"""A module of some length, so that its docstring counts.

>>> 1 + 1
2

More prose.
"""
import os  # kept


class A:
    """A class whose docstring is long enough to be prose."""

    text = """not a docstring"""

    def f(self):
        r"""Short."""
        return "x"
'''


@pytest.fixture(scope="module")
def library() -> list[builtin.LibraryText]:
    return list(library_texts())


def test_split_docstrings() -> None:
    code, english = split_docstrings(SOURCE)
    assert english == (
        "A module of some length, so that its docstring counts.\n\n\nMore prose.\n\n"
        "A class whose docstring is long enough to be prose."
    )
    assert "import os  # kept" in code
    assert "not a docstring" in code
    for gone in ("A module", "A class", "Short"):
        assert gone not in code
    ast.parse(code)


def test_source_that_does_not_parse_is_all_code() -> None:
    for source in ("def (:\n", "a\0b", "print 'x'\n"):
        assert split_docstrings(source) == (source, "")


def test_a_docstring_beside_its_def_stays() -> None:
    assert "def f(): 'doc'" in split_docstrings("def f(): 'doc'\nx = 1\n")[0]


def test_form_feeds_and_windows_lines_do_not_shift_lines() -> None:
    source = 'x = 1\n\x0c\ndef f():\n    """Gone."""\n    return 2\n'
    for text in (source, source.replace("\n", "\r\n")):
        code = split_docstrings(text)[0]
        assert "Gone" not in code
        assert "return 2" in code


def test_library_is_big_parted_and_repeatable(library: list[builtin.LibraryText]) -> None:
    assert sum(len(text.code) for text in library) > 1_000_000
    assert sum(len(text.english) for text in library) > 200_000
    assert list(library_texts()) == library
    assert len({text.module for text in library}) == len(library)
    pattern = re.compile(r"site-packages|(^|/)tests?/|idle_test|__pycache__")
    assert not [text.module for text in library if pattern.search(text.module)]


def test_one_module(library: list[builtin.LibraryText]) -> None:
    (bisect,) = [text for text in library if text.module == "bisect.py"]
    assert "def bisect_left" in bisect.code
    assert "Insert item x in list a" not in bisect.code
    assert "Insert item x in list a" in bisect.english


def test_no_library_on_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no standard-library sources.*data\.sources"):
        library_files()


def test_arithmetic_is_right() -> None:
    checked = 0
    for text in list(arithmetic_texts(3))[:200]:
        assert 1000 <= len(text) < 1300
        for left, right in re.findall(r"(\d+ [-+x] \d+(?: \+ 1)?) = (\d+)", text):
            assert eval(left.replace("x", "*")) == int(right)
            checked += 1
        for a, sign, b in re.findall(r"(\d+) ([<>]) (\d+):", text):
            assert (int(a) < int(b)) == (sign == "<")
    assert checked > 1000


def test_arithmetic_depends_on_the_seed_only() -> None:
    texts = list(arithmetic_texts(1))
    assert texts == list(arithmetic_texts(1))
    assert texts != list(arithmetic_texts(2))
    assert 1_000_000 < sum(map(len, texts)) < 2_000_000


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (305, "three hundred and five"),
        (1_005, "one thousand and five"),
        (20_340, "twenty thousand three hundred and forty"),
        (999_999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)
def test_number_words(number: int, words: str) -> None:
    assert number_words(number) == words


@given(st.lists(st.integers(0, 999_999), min_size=2, max_size=2, unique=True))
def test_number_words_differ(pair: list[int]) -> None:
    assert number_words(pair[0]) != number_words(pair[1])
