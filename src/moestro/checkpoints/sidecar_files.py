"""The files that travel with weights: tokenizer, chat template, what the makers state about them.

They are copied byte for byte from folder to folder: out of a checkpoint that someone published,
through a run that starts from it, into what is written back.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from moestro.checkpoints.reading import HF_CONFIG, origin
from moestro.text import HF_FILE, NOTE_FILE, load_tokenizer

# Layout of Hugging Face's tokenizers, old and new; the templates in a folder come last.
NAMES = (
    HF_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "generation_config.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"


def copy_sidecar_files(source: Path, target: Path) -> list[str]:
    """Copy what is there of them into an existing folder of Hugging Face's layout.

    Returns:
        The names of what was copied.

    Raises:
        OSError: a file cannot be read or written.
    """
    names = [name for name in (*NAMES, NOTE_FILE) if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
        names.append(TEMPLATES)
    return names


def keep_sidecar_files(source: Path, target: Path) -> list[str]:
    """Copy them into an existing folder of this project's layout, and the config they came with.

    A folder of Hugging Face's layout gives its config.json, as hf_config.json, and a note on its
    tokenizer, whose ends of text are stated in files that are not read in this layout. More chat
    templates than one stay behind: a checkpoint of this project has no folders in it.

    Returns:
        The names of what was written.

    Raises:
        DataError: the tokenizer cannot be read.
        OSError: a file cannot be read or written.
    """
    with_tokenizer = any((source / name).is_file() for name in (NOTE_FILE, HF_FILE))
    if with_tokenizer:
        load_tokenizer(source).save(target)
    names = [name for name in NAMES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    if origin(source).is_file():
        shutil.copyfile(origin(source), target / HF_CONFIG)
        names.append(HF_CONFIG)
    return [*names, *([NOTE_FILE] if with_tokenizer else [])]
