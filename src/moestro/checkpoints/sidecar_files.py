"""The files that travel with weights: tokenizer, chat template, what the makers state about them.

They are copied byte for byte from folder to folder: out of a checkpoint that someone published,
through a run that starts from it, into what is written back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from moestro.checkpoints.reading import HF_CONFIG, origin
from moestro.text import HF_FILE, NOTE_FILE, load_tokenizer

# Hugging Face's tokenizers, old and new; the templates in a folder come last.
NAMES = (
    HF_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tiktoken.model", "spiece.model", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"


def copy_sidecar_files(source: Path, target: Path) -> None:
    """Copy those that are there into an existing folder of Hugging Face's layout.

    Raises:
        OSError: a file cannot be read or written.
    """
    _copy((*NAMES, NOTE_FILE), source, target)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)


def keep_sidecar_files(source: Path, target: Path) -> None:
    """Copy them into an existing folder of this project's layout, and the config they came with.

    A folder of Hugging Face's layout gives its config.json, as hf_config.json, and a note on its
    tokenizer, whose ends of text are stated in files that are not read in this layout. More chat
    templates than one stay behind: a checkpoint of this project has no folders in it.

    Raises:
        DataError: the tokenizer cannot be read.
        OSError: a file cannot be read or written.
    """
    if any((source / name).is_file() for name in (NOTE_FILE, HF_FILE)):
        load_tokenizer(source).save(target)
    _copy(NAMES, source, target)
    if origin(source).is_file():
        shutil.copyfile(origin(source), target / HF_CONFIG)


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
