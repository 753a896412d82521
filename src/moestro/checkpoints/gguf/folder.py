"""A GGUF file as a checkpoint's folder: settings, tokenizer and template beside it, weights in it.

Everything here that opens a model opens a folder. So a file FILE.gguf gets one, FILE.gguf.moestro,
with what Hugging Face's layout would have beside the weights, a note of the file they are in, and
later their packed form.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moestro.checkpoints.folders import CONFIG, read_json
from moestro.checkpoints.gguf import settings
from moestro.checkpoints.gguf.header import SPLIT, Header, is_gguf, parts_of, read_parts
from moestro.checkpoints.gguf.tokenizer import tokenizer_files
from moestro.errors import CheckpointError
from moestro.files import cache_folder, write_json, write_whole
from moestro.text import HF_FILE

NOTE = "gguf.json"
ENDING = ".moestro"
_VERSION = 1


def find(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only model of a folder; None: no GGUF.

    Raises:
        CheckpointError: a folder has several.
    """
    if path.is_file():
        return path if is_gguf(path) else None
    found = sorted(path.glob("*.gguf"))
    first = [each for each in found if (m := SPLIT.fullmatch(each.name)) is None or int(m[2]) == 1]
    if len(first) > 1:
        raise CheckpointError(
            f"{path} holds {len(first)} models in GGUF; give one of the files: "
            f"{', '.join(each.name for each in first[:8])}"
        )
    return first[0] if first else None


def folder_of(file: Path) -> Path:
    """The checkpoint's folder of a GGUF file, made or brought up to date; no tensor is read.

    It lies beside the file, or in ~/.cache/moestro where nothing can be written there. A
    tokenizer.json that was put into it is kept.

    Raises:
        CheckpointError: the file cannot be read; see `header.read`.
        ConfigError: its network or tokenizer is not read.
        OSError: there is no place for the folder.
    """
    paths = parts_of(file)
    folder = _place(paths[0])
    own = (folder / HF_FILE).is_file() and not (folder / NOTE).is_file()
    old = read_json(folder / NOTE) if (folder / NOTE).is_file() else {}
    own = own or old.get("own_tokenizer") is True
    files = [_identity(path) for path in paths]
    note = {"version": _VERSION, "files": files, "own_tokenizer": own}
    if old == note:
        return folder
    headers = read_parts(file)
    made: dict[str, Any] = {CONFIG: settings.config_json(headers[0])}
    if not own:
        made |= tokenizer_files(headers[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        write_whole(folder / name, text)
    write_json(folder / NOTE, note)  # last: what a kill leaves is made again
    return folder


def files_of(folder: Path) -> list[Path]:
    """The GGUF files that a folder stands for; none of another checkpoint's."""
    note = read_json(folder / NOTE) if (folder / NOTE).is_file() else {"files": []}
    return [Path(each["path"]) for each in note["files"]]


def given_path(folder: Path) -> Path:
    """The file that was given for a folder: the first GGUF file it stands for, else the folder."""
    return next(iter(files_of(folder)), folder)


def headers_of(folder: Path) -> list[Header] | None:
    """The headers of the files that a folder stands for, without the tokenizer's texts.

    None: it is another checkpoint's.

    Raises:
        CheckpointError: a file is gone or has changed; see also `header.read`.
    """
    if not (folder / NOTE).is_file():
        return None
    note = read_json(folder / NOTE)
    paths = [Path(each["path"]) for each in note["files"]]
    headers = read_parts(paths[0], texts=False)
    if [_identity(header.file) for header in headers] != note["files"]:
        raise CheckpointError(f"{paths[0]} has changed since it was opened; open it again")
    return headers


def _identity(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"path": str(file.absolute()), "bytes": stat.st_size, "changed": stat.st_mtime_ns}


def _place(file: Path) -> Path:
    beside = file.with_name(file.name + ENDING)
    if beside.is_dir() or (os.access(file.parent, os.W_OK) and not file.is_symlink()):
        return beside
    return cache_folder(str(file.absolute()))
