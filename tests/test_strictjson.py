"""JSON of others: what is read is one meaning within bounds, and all else is one sentence."""

import json
import math
from pathlib import Path

import pytest

from moestro import strictjson
from moestro.errors import DataError
from moestro.strictjson import MOST_DEPTH, MOST_DIGITS, parse, read_object


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -7, 10**30, 0.1, 1e300, "", "é 漢字 😀", [], {}, {"a": [{"b": [1, "c"]}]}],
)
def test_what_json_spells_is_read(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert parse(text) == value
        assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"a": }', "Expecting value: line 1 column 7"),
        ("[1] [2]", "Extra data"),
        ('"a\nb"', "control character"),
        ("\ufeff[]", "BOM"),
        (b"\xff", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        ("[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2), f"more than {MOST_DEPTH} deep"),
        ('{"a":' * 500 + "1" + "}" * 500, f"more than {MOST_DEPTH} deep"),
        ("[" * 200_000, f"more than {MOST_DEPTH} deep"),
        ("9" * (MOST_DIGITS + 1), "a number of 301 digits"),
        ("-" + "9" * 5000, "digits"),
        ("0." + "9" * 5000, "digits"),
        ("1e999", "1e999, which is not finite"),
        ("[NaN]", "NaN, which is not finite"),
        ("-Infinity", "-Infinity, which is not finite"),
        (r'"\ud800"', "not UTF-8"),
        (r'{"\udfff": 1}', "not UTF-8"),
        ('{"a": 1, "b": 2, "a": 2}', "'a' comes twice with different values"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_bounds_are_not_in_the_way():
    deep = "[" * MOST_DEPTH + "1" + "]" * MOST_DEPTH
    assert json.dumps(parse(deep)) == deep
    assert float(parse("9" * MOST_DIGITS)) == float("1e300")
    assert parse('{"a": [1], "a": [1]}') == {"a": [1]}
    assert parse(r'{"\udce4": "\udce4"}', surrogates=True) == {"\udce4": "\udce4"}
    found = parse('{"a": Infinity, "b": NaN, "c": -1e999}', finite=False)
    assert found["a"] == math.inf
    assert math.isnan(found["b"])
    assert found["c"] == -math.inf


def test_a_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path, monkeypatch):
    path = tmp_path / "some.json"

    def read() -> dict:
        return read_object(path, DataError, "fetch it again")

    with pytest.raises(DataError, match=r"some\.json cannot be read \(No such file"):
        read()
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"\(it holds list instead of an object\); fetch it again$"):
        read()
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"some\.json cannot be read \(it is not UTF-8"):
        read()
    path.write_text('{"a": 1}')
    assert read() == {"a": 1}
    monkeypatch.setattr(strictjson, "MOST_BYTES", 7)
    with pytest.raises(DataError, match="more than 7 bytes"):
        read()
