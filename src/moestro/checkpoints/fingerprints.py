"""What tells a checkpoint from another at little cost, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from moestro.checkpoints.folders import CONFIG, MANIFEST, is_pretrained
from moestro.checkpoints.gguf.folder import files_of
from moestro.checkpoints.tensor_files import SINGLE

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def fingerprint(folder: Path) -> dict[str, str]:
    """What identifies a checkpoint: a SHA-256 for each file that holds its weights.

    Of a large file only its size and 16 pieces of 64 KiB count, so that a start stays quick. Our
    own layout has a manifest with the sums of all files, which is taken: it is verified when a
    checkpoint is found, unlike that of a folder in Hugging Face's layout, which others write to.
    """
    manifest, single = folder / MANIFEST, folder / SINGLE
    if manifest.is_file() and not is_pretrained(folder):
        wanted = [manifest]
    else:  # of a folder with one file of weights, others beside it are not read
        wanted = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    files = [*wanted, folder / CONFIG, *files_of(folder)]
    return {path.name: _sampled(path) for path in files if path.is_file()}


def digest(folder: Path) -> str:
    """One SHA-256 of the `fingerprint`, without the settings that were made of a GGUF file."""
    found = fingerprint(folder)
    if files_of(folder):
        found.pop(CONFIG, None)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    sums = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            sums.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                sums.update(file.read(_SAMPLE_BYTES))
    return sums.hexdigest()
