"""Finds the folder that a name means: one on this machine, or a model of the Hugging Face hub.

The network is used for a name of the form `org/model` only, and only where no folder has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from moestro.errors import CheckpointError
from moestro.models.checkpoint import newest_checkpoint
from moestro.models.pretrained import is_pretrained

_REMOTE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, settings, tokenizers and chat templates. Subfolders and "consolidated" files hold the
# same weights again, in their makers' own layouts.
WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model", "spiece.model"]
UNWANTED = ["*/*.safetensors", "*/*.json", "consolidated*"]
INSTALL = "pip install 'moestro[hf]'"


def find_checkpoint(name: str | Path, known: Callable[[Path], bool] | None = None) -> Path:
    """The checkpoint's folder that a name means, in either layout.

    Args:
        name: a folder of Hugging Face's layout, a run's (its newest good checkpoint is taken), a
            checkpoint's, or `org/model`.
        known: whether a checkpoint of ours is known to be good, so that it is not read through.

    Raises:
        CheckpointError: there is none, or it is damaged; see also `find_model`.
    """
    folder = find_model(name)
    return folder if is_pretrained(folder) else newest_checkpoint(folder, known)


def find_model(name: str | Path) -> Path:
    """The folder or file that a name means; what is on this machine comes first.

    Args:
        name: a path, or `org/model`: that is fetched into huggingface_hub's cache, or taken from
            there.

    Raises:
        CheckpointError: there is no such path or model, huggingface_hub is not installed, or the
            hub cannot be reached and the cache does not have it.
    """
    path = Path(name)
    if path.exists():
        return path
    # Where the first part is a folder here, a run in it is meant, and misspelt.
    if not _REMOTE.fullmatch(str(name)) or path.parts[0] in (".", "..") or path.parent.exists():
        raise CheckpointError(
            f"{name} does not exist; give a run's folder, a checkpoint's, or the name of a model "
            "on the Hugging Face hub as org/model"
        )
    return _fetch(str(name))


def _fetch(name: str) -> Path:
    """The folder of a model of the hub, in huggingface_hub's cache."""
    try:
        import huggingface_hub.errors
    except ImportError:
        raise CheckpointError(
            f"{name} is no folder here; to fetch a model of that name from the Hugging Face hub, "
            f"install huggingface_hub: {INSTALL}"
        ) from None
    errors = huggingface_hub.errors
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is open only to those who accept its terms: do so on "
            f"https://huggingface.co/{name}, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a folder here nor a model on the Hugging Face hub; check the "
            "name, or log in with `hf auth login` if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name} is no folder here, the Hugging Face hub cannot be reached (or HF_HUB_OFFLINE "
            f"is set), and its cache does not have the whole model: {_first_line(error)}"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot fetch {name}: {_first_line(error)}") from None
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{name} has no safetensors file in the Hugging Face hub's main branch; weights in "
            "pickle files are not read. transformers can write them anew as safetensors"
        )
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].strip()
