"""A file is there whole or not at all."""

import errno
import os
from contextlib import suppress

import pytest

from moestro.files import UNFINISHED, whole_file, write_json, write_whole


def test_it_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "\\u00fc"\n}\n'
    write_whole(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_on_the_way_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")
    with suppress(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"

    def full(number):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        write_whole(tmp_path / "missing" / "b", "text")


def test_a_kill_leaves_a_name_that_says_what_it_is(tmp_path):
    child = os.fork()
    if child == 0:
        with whole_file(tmp_path / "a") as file:
            file.write(b"half")
            os._exit(9)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f"{UNFINISHED}a-")
