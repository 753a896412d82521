"""Opening a model: from a name to its weights, for the command line, a server or a notebook.

`open_checkpoint` finds the folder (hub.py) and reads it in one of three ways:

    plain    reading.read_model: settings, headers and fit are checked, then tensors are loaded
    packed   quantize.read_packed: the same, module by module
    mapped   packed_files.load: a packed form that an earlier start kept; with a memory budget
             streamed.load_within, which leaves experts in the file

A format of files is a mapping key → `tensor_files.Source` (shape, dtype, load) and a `Family` whose
rules say what its keys are of ours; `reading.open_unread` takes safetensors' or GGUF's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moestro.checkpoints import packed_files, packed_header, streamed
from moestro.checkpoints.adapters import load_own, own_settings
from moestro.checkpoints.families import family_of, text_part
from moestro.checkpoints.fingerprints import fingerprint
from moestro.checkpoints.folders import is_pretrained, read_json
from moestro.checkpoints.gguf.folder import headers_of
from moestro.checkpoints.hub import find_checkpoint
from moestro.checkpoints.peft import read_peft
from moestro.checkpoints.peft_settings import PEFT_CONFIG
from moestro.checkpoints.quantised.methods import in_blocks as kept_in_blocks
from moestro.checkpoints.quantize import AS_IS, AS_STORED, blank_packed, format_of, read_packed
from moestro.checkpoints.reading import origin, read_model, stream_model
from moestro.checkpoints.streamed import Within
from moestro.checkpoints.tensor_files import LeftOut
from moestro.checkpoints.transfer import Progress
from moestro.checkpoints.writing import only_family
from moestro.config import LoraConfig
from moestro.errors import CheckpointError, ConfigError
from moestro.kernels import native_cpu
from moestro.kernels.packing import Format
from moestro.models.adapters import freeze, merge, shared
from moestro.models.budget import fit, smallest
from moestro.models.build import Model
from moestro.moe.packed import Packed

_DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


class Opened(NamedTuple):
    """A model in evaluation mode, and where it came from.

    Attributes:
        model: with its weights.
        folder: of its checkpoint, with its tokenizer.
        hf_config: the config.json of Hugging Face's layout that the weights came with, if any; of a
            model of text and images, its text part.
    """

    model: Model
    folder: Path
    hf_config: dict[str, Any] | None

    @property
    def family(self) -> str | None:
        """The model_type that the weights came with."""
        return None if self.hf_config is None else self.hf_config.get("model_type")


def open_checkpoint(
    name: str | Path,
    *,
    weights: str = AS_IS,
    packed: Path | None = None,
    keep: bool = True,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    backend: str = "auto",
    accept_fields: Collection[str] = (),
    progress: Progress | None = None,
    verified: bool = False,
    adapter: str | Path | None = None,
    within: Within | None = None,
) -> Opened:
    """Open a checkpoint of any layout.

    Args:
        name: a folder of Hugging Face's layout, a run's (its newest good checkpoint is taken), a
            checkpoint's, a GGUF file, or `org/model`.
        weights: as-is (integers stay so, packed), fp32, bf16, int8, int8-64, int4, int4-64.
        packed: where the packed form is kept; None: see `packed_files.default_path`.
        keep: map a packed form that was kept, or keep a new one for the next start.
        dtype: of weights that are not packed; None: that of the checkpoint's embedding.
        device: auto, cpu, cuda or cuda:N.
        backend: a kernel's name, or "auto".
        accept_fields: see `reading.read_settings`.
        progress: called with (bytes read so far, bytes in all).
        verified: `name` is a folder from `find_checkpoint`, whose files are not hashed again.
        adapter: see `use_adapter`. A run of adapters is opened as its base with its adapters.
        within: the memory to take; other experts are read as they are wanted.

    Raises:
        ConfigError: options do not go together, or see `reading.read_settings`.
        CheckpointError: the checkpoint or the kept packed form cannot be used; says why.
        BackendError: there is no native library to pack for; says why.

    Warns:
        UserWarning: the packed form cannot be kept, or see `reading.read_model`.
    """
    format = _checked_format(weights, packed, dtype, device)
    folder = Path(name) if verified else find_checkpoint(name, kept_as(weights, packed))
    if (own := own_settings(folder)) is not None:
        _check_single(folder, adapter)
        return open_checkpoint(
            own.base, weights=weights, packed=packed, keep=keep, dtype=dtype, device=device,
            backend=backend, accept_fields=own.accept_fields, progress=progress, adapter=folder,
            within=within)._replace(folder=folder)  # fmt: skip
    if format is None and dtype is None and pick_device(device) == "cpu" and in_blocks(folder):
        format = AS_STORED
    _check_budget(format, adapter, within)
    told: Any = {"progress": progress, "accept_fields": accept_fields}
    if format is None:
        told |= {"dtype": pick_dtype(dtype), "device": pick_device(device), "backend": backend}
        model = read_model(folder, **told)
    elif keep or within is not None:
        model = _mapped_or_packed(folder, format, packed, within, **told)
    else:
        model = read_packed(folder, format, **told)
    return use_adapter(Opened(model, folder, _came_with(folder)), adapter)


def open_streamed(
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    accept_fields: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[Opened, Callable[[str], Tensor]]:
    """Open a checkpoint whose tensors are to be read one by one: see `reading.stream_model`.

    Args:
        folder: from `find_checkpoint`; not a run of adapters.
        dtype: of the parameters; None: that of the checkpoint's embedding.
        accept_fields: see `reading.read_settings`.
        progress: called with (bytes read so far, bytes in all).

    Raises:
        ConfigError, CheckpointError: see `open_checkpoint`.
    """
    model, read = stream_model(
        folder, dtype=pick_dtype(dtype), accept_fields=accept_fields, progress=progress
    )
    return Opened(model, folder, _came_with(folder)), read


def _check_budget(format: Format | None, adapter: str | Path | None, within: Within | None) -> None:
    """Refuse what cannot be read an expert at a time."""
    if within is None:
        return
    if format is None:
        raise ConfigError(
            "a memory budget needs packed weights, which can be read an expert at a time; add "
            "--weights int8 or --weights int4"
        )
    if adapter is not None:
        raise ConfigError(f"adapters need all experts in memory: leave out --memory, or {adapter}")


def check_budgets(
    folder: Path, ways: Sequence[tuple[str, Within]], accept_fields: Collection[str] = ()
) -> None:
    """Refuse an amount that is too small for one of several ways to open a checkpoint.

    Args:
        folder: from `find_checkpoint`.
        ways: weights, and what they are opened within; of one amount.
        accept_fields: see `reading.read_settings`.

    Raises:
        ConfigError: it is too small; says what is enough for all. See also `open_checkpoint`.
    """
    adapter, found = folder if own_settings(folder) is not None else None, []
    for weights, within in ways:
        format = format_of(weights) or (AS_STORED if in_blocks(folder) else None)
        _check_budget(format, adapter, within)
        assert format is not None
        path = packed_files.default_path(folder, format)
        if path.exists():
            found.append(streamed.needs_of(path, within))
        else:
            model = blank_packed(folder, format, accept_fields)
            found.append(within.needs_of_packing(model, packed_header.make(model, format, {})[1]))
    fit(max(found, key=smallest), ways[0][1].memory)


def _checked_format(
    weights: str, packed: Path | None, dtype: str | torch.dtype | None, device: str
) -> Format | None:
    """What `weights` names, with options that go together with it."""
    format = format_of(weights)
    if format is None and packed is not None:
        raise ConfigError("--packed names the file of packed weights; add --weights")
    if format is not None and dtype is not None:
        raise ConfigError(f"--weights {weights} and --dtype {dtype} both choose; leave one out")
    if format is not None and device not in ("auto", "cpu"):
        raise ConfigError(f"packed weights compute on the CPU; leave out --device {device}")
    return format


def _check_single(folder: Path, adapter: str | Path | None) -> None:
    if adapter is not None:
        raise ConfigError(
            f"{folder} is a run of adapters of its own; give its base, or leave {adapter} out"
        )


def use_adapter(opened: Opened, adapter: str | Path | None) -> Opened:
    """Give a model adapters, in place: added to its weights, or beside those that are packed.

    Args:
        opened: The model, with plain weights or packed ones.
        adapter: A run of adapters or its checkpoint, or a folder of PEFT's; None: no adapters.

    Raises:
        CheckpointError: they belong to another model, or to one that has changed since, or cannot
            be read.
        ConfigError: they are of a kind that is not read.

    Warns:
        UserWarning: a run's were trained over another checkpoint, of maybe the same weights.
    """
    model = opened.model
    if adapter is None:
        return opened
    _read_adapter(model, opened, adapter)
    if not any(isinstance(module, Packed) for module in model.modules()):
        merge(model)
    return opened


def adapted(opened: Opened, adapter: str | Path) -> Model:
    """The model with adapters beside its weights, which both share; the model stays as it is.

    Args:
        opened: The model, with plain weights or packed ones, all of them in memory.
        adapter: As for `use_adapter`, which says what is raised.
    """
    if own_settings(opened.folder) is not None:
        _check_single(opened.folder, adapter)
    model = shared(opened.model)
    _read_adapter(model, opened, adapter)
    return model


def _read_adapter(model: Model, opened: Opened, adapter: str | Path) -> None:
    folder = Path(adapter)
    if (folder / PEFT_CONFIG).is_file():
        name = opened.family or only_family(model.cfg)
        read_peft(model, family_of(name, str(folder)), folder)
    else:
        folder = find_checkpoint(str(adapter))
        settings = own_settings(folder)
        if settings is None:
            raise CheckpointError(f"{folder} holds a whole model and no adapter; open it by itself")
        load_own(model, settings, folder, opened.folder)
    freeze(model)
    model.eval()


def open_adapted(
    checkpoint: Path, lora: LoraConfig, dtype: torch.dtype, device: str, backend: str = "auto"
) -> Model:
    """The model of a run of adapters as it is trained: frozen, in the dtype computed in or packed.

    Args:
        checkpoint: The run's, whose adapters are attached.
        lora: The run's settings.
        dtype: float32 or bfloat16.
        device: Where it goes.
        backend: A kernel's name, or "auto".

    Raises:
        CheckpointError: the base cannot be opened, or is not the one trained over.
        ConfigError: see `open_checkpoint`.
    """
    packed = lora.weights != AS_IS
    opened = open_checkpoint(
        lora.base, weights=lora.weights, keep=False, dtype=None if packed else dtype,
        device=device, backend=backend, accept_fields=lora.accept_fields,
    )  # fmt: skip
    load_own(opened.model, lora, checkpoint, opened.folder)
    return opened.model


def _came_with(folder: Path) -> dict[str, Any] | None:
    """See `Opened.hf_config`."""
    place = origin(folder)
    return text_part(read_json(place, finite=False)) if place.is_file() else None


def in_blocks(folder: Path) -> bool:
    """Whether a checkpoint's weights, or a run of adapters' base's, are integers kept as they are.

    Packed weights do that; see `quantize.AS_STORED`.
    """
    if native_cpu.available() is not None:
        return False
    if (own := own_settings(folder)) is not None:
        folder = find_checkpoint(own.base, known=lambda _: True)  # it is read through when opened
    headers = headers_of(folder)
    if headers is not None:
        return any(info.kind.length > 1 for header in headers for info in header.tensors)
    return kept_in_blocks(_came_with(folder) or {}) if is_pretrained(folder) else False


def kept_as(weights: str, packed: Path | None = None) -> Callable[[Path], bool] | None:
    """What says for `find_checkpoint` that a checkpoint's packed form is kept.

    Such a checkpoint is not read through: what will be mapped was made from good files.

    Raises:
        ConfigError: there are no such weights.
    """
    format = format_of(weights)
    if format is None:
        return None
    return lambda folder: packed_files.is_of(
        packed or packed_files.default_path(folder, format), folder
    )


def pick_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The number type of a name.

    Raises:
        ConfigError: it is not known.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name} is not known; choose fp32, bf16 or fp16")
    return _DTYPES[name]


def pick_device(name: str) -> str:
    """The device of a name, tried out.

    Raises:
        ConfigError: it cannot be used here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable = torch.zeros(1, dtype=torch.float32, device=name).item() == 0
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ConfigError(
            f"--device {name} cannot be used here; choose auto, cpu, or cuda on a machine "
            "where `moestro doctor` shows a CUDA device"
        )
    return name


def _mapped_or_packed(
    folder: Path,
    format: Format,
    packed: Path | None,
    within: Within | None,
    progress: Progress | None,
    accept_fields: Collection[str],
) -> Model:
    """Map the packed form, or open it within a budget; make it and keep it there."""
    if within is not None:
        check = partial(streamed.refuse_too_small, within)
        given = (progress, accept_fields, check)
        path, source = packed_files.converted(folder, format, packed, *given)
        return streamed.load_within(path, within, source)
    path = packed or packed_files.default_path(folder, format)
    source = fingerprint(folder)
    if not path.exists():
        try:
            packed_files.convert(folder, path, format, source, progress, accept_fields)
        except packed_files.NotWritten as error:
            message = f"the packed form is not kept: {path}: {error}"
            warnings.warn(message, UserWarning, stacklevel=3)
    if not path.exists():  # outside of the handler, which keeps what was packed until then alive
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LeftOut)  # it is said already
            return read_packed(folder, format, progress, accept_fields)
    model = packed_files.load(path, source)
    packed_files.check_stored(path, format)
    return model
