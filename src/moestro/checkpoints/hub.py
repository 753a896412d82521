"""Finds the folder that a name means: one on this machine, or a model of the Hugging Face hub.

The network is used for a name of the form `org/model` only, and only where there is no folder
`org` here: else a misspelt path would be asked for. The hub's cache is looked into either way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moestro.checkpoints.folders import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    checkpoints,
    is_pretrained,
    newest_checkpoint,
    read_json,
    verify_folder,
)
from moestro.checkpoints.gguf import folder as gguf
from moestro.checkpoints.gguf.header import is_gguf
from moestro.checkpoints.tensor_files import INDEX, SINGLE
from moestro.errors import CheckpointError

_REMOTE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, settings, tokenizers and chat templates. Subfolders and "consolidated" files hold the
# same weights again, in their makers' own layouts.
WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "*.model"]
UNWANTED = ["*/*.safetensors", "*/*.json", "*/*.model", "consolidated*"]
_STORE = "models--"  # begins a model's folder in the hub's cache: models--org--name/snapshots/hash
INSTALL = "pip install 'moestro[hf]'"


def find_checkpoint(name: str | Path, known: Callable[[Path], bool] | None = None) -> Path:
    """The checkpoint's folder that a name means, in either layout.

    Args:
        name: a folder of Hugging Face's layout, a run's (its newest good checkpoint is taken), a
            checkpoint's, a GGUF file or a folder of one, or `org/model`.
        known: whether a checkpoint of ours is known to be good, so that it is not read through.

    Raises:
        CheckpointError: it does not exist, is damaged, or is another program's; see also
            `find_model`.
    """
    folder = find_model(name)
    if not _holds_weights(folder) and (file := gguf.find(folder)) is not None:
        return gguf.folder_of(file)
    check_kind(folder)
    try:
        published = is_pretrained(folder)
    except CheckpointError:
        if (folder / MANIFEST).is_file():
            verify_folder(folder)  # says more: which file was altered
        raise
    return folder if published else newest_checkpoint(folder, known)


def name_in_hub(folder: Path) -> str | None:
    """The `org/model` of a folder in the hub's cache; None: it is elsewhere."""
    inner = folder.absolute()
    store = inner.parent.parent.name
    if inner.parent.name != "snapshots" or not store.startswith(_STORE):
        return None
    return store.removeprefix(_STORE).replace("--", "/")


def given_name(folder: Path) -> str:
    """What a person calls a checkpoint: a folder's path, the GGUF file's, or `org/model`."""
    return name_in_hub(folder) or str(gguf.given_path(folder))


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
    folder = _fetch(str(name), WANTED)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name} has no safetensors file in the Hugging Face hub's main branch, or in its "
            "cache; weights in pickle files are not read, which transformers can write anew as "
            f"safetensors. Of GGUF, fetch one file and give its path: hf download {name} FILE.gguf"
        )
    return folder


def find_settings(name: str) -> Path:
    """The config.json of a model of the hub; nothing else of it is fetched.

    Raises:
        CheckpointError: see `find_model`; or there is no config.json.
    """
    path = _fetch(name, [CONFIG]) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{name} has no {CONFIG} on the Hugging Face hub")
    return path


def settings_of(path: Path) -> Path:
    """The file that says what model is at a path: a config.json, a .toml or GGUF.

    Args:
        path: the file itself, or a folder: a model's, or a run's, whose own settings or those of
            its newest checkpoint are taken.

    Raises:
        CheckpointError: there is none; or see `check_kind`.
    """
    if path.is_file():
        if path.suffix in (".json", ".toml") or is_gguf(path):
            return path
        raise CheckpointError(
            f"{path} is no file of settings; give a config.json, a .toml, a GGUF file, or the "
            "folder that it is in"
        )
    for place in (path, *reversed(checkpoints(path))):
        if (place / CONFIG).is_file():
            return place / CONFIG
    if (file := gguf.find(path)) is not None:
        return file
    check_kind(path)
    raise CheckpointError(f"{path} holds no {CONFIG}, no GGUF file and no checkpoints of a run")


def _holds_weights(path: Path) -> bool:
    """Whether a folder has weights in safetensors, or checkpoints."""
    return any((path / name).exists() for name in (SINGLE, INDEX, CHECKPOINTS))


def check_kind(path: Path) -> None:
    """Refuse an adapter by saying what it is, and what to do with it.

    Raises:
        CheckpointError: it is an adapter.
    """
    if _holds_weights(path):
        return
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        fields = read_json(adapter)
        base = fields.get("base_model_name_or_path") if isinstance(fields, dict) else None
        raise CheckpointError(
            f"{path} is an adapter for {base or 'a model'}, not a whole model. Merge the two with "
            f"peft and give the new folder: AutoPeftModelForCausalLM.from_pretrained('{path}')"
            ".merge_and_unload().save_pretrained(NEW_FOLDER)"
        )


def _fetch(name: str, wanted: Sequence[str]) -> Path:
    """The folder of a model of the hub, in huggingface_hub's cache."""
    if not _REMOTE.fullmatch(name):
        raise CheckpointError(
            f"{name} does not exist; give a run's folder, a checkpoint's, or the name of a model "
            "on the Hugging Face hub as org/model"
        )
    here = Path(name).parent
    try:
        import huggingface_hub.errors
    except ImportError:
        raise CheckpointError(
            f"{name} is not a local folder; to fetch that model from the Hugging Face hub, "
            f"install huggingface_hub: {INSTALL}"
        ) from None
    errors = huggingface_hub.errors
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(wanted),
            ignore_patterns=UNWANTED,
            local_files_only=here.exists(),
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is open only to those who accept its terms: do so on "
            f"https://huggingface.co/{name}, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a local folder nor a model on the Hugging Face hub; check the "
            "name, or log in with `hf auth login` if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if here.exists():
            raise CheckpointError(
                f"{name} is neither in the folder {here} nor in the Hugging Face hub's cache; "
                f"check the path, or fetch the hub's model of that name: hf download {name}"
            ) from None
        raise CheckpointError(
            f"{name} is not a local folder, the Hugging Face hub cannot be reached (or "
            f"HF_HUB_OFFLINE is set), and its cache does not have the whole model: "
            f"{_first_line(error)}"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot fetch {name}: {_first_line(error)}") from None
    return Path(folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].strip()
