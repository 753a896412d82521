"""Packed models on disk: one file, mapped into memory instead of read.

The file is a line that says what it is, the length of a JSON header, the header, and every tensor
on a page of its own: packed weights as the kernels stream them, other parameters as they are. The
header holds the model's settings, the place of each tensor, and the checkpoint's fingerprint.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from moestro.checkpoints import packed_header
from moestro.checkpoints.direct_files import DirectFile
from moestro.checkpoints.fingerprints import fingerprint
from moestro.checkpoints.hub import name_in_hub
from moestro.checkpoints.packed_header import Section
from moestro.checkpoints.quantize import AS_STORED, read_packed
from moestro.checkpoints.transfer import Progress
from moestro.errors import CheckpointError
from moestro.files import cache_folder, whole_file
from moestro.kernels.packing import QUANTISED, Format
from moestro.machine import free_bytes
from moestro.models.build import Model
from moestro.moe.packed import Packed

# Refuses what is about to be written.
Check = Callable[[Model, dict[str, Section]], object]


class NotWritten(OSError):
    """The place of a packed form is full or cannot be written; says why."""


def default_path(folder: Path, format: Format) -> Path:
    """Where the packed form of a checkpoint is kept: beside its weights.

    Or, where that is a folder of the Hugging Face hub's cache or cannot be written, in a cache of
    our own: $XDG_CACHE_HOME/moestro, or ~/.cache/moestro, under the checkpoint's fingerprint.
    """
    group = f"-{format.group}" if format.kind in QUANTISED else ""
    name = f"packed-{format.kind}{group}.moestro"
    ours = name_in_hub(folder) is None and os.access(folder, os.W_OK)
    if ours or (folder / name).exists():
        return folder / name
    return cache_folder(json.dumps(fingerprint(folder))) / name


def is_of(path: Path, folder: Path) -> bool:
    """Whether a file is the packed form of this very checkpoint, as far as its header says."""
    try:
        return path.is_file() and packed_header.read(path)[0]["source"] == fingerprint(folder)
    except (CheckpointError, OSError):
        return False


def save(model: Model, path: Path, format: Format, source: dict[str, str]) -> None:
    """Write a packed model and its checkpoint's `fingerprint`, whole or not at all.

    Raises:
        ShapeError: its parameters have several dtypes.
        OSError: the disk is full or the place cannot be written.
    """
    layout = packed_header.make(model, format, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file, closing(Writer(file, *layout)) as writer:
        writer.put(packed_header.tensors(model))


class Writer:
    """Puts tensors where the header of their file says; see `packed_header.make`."""

    def __init__(
        self, file: IO[bytes], start: bytes, sections: dict[str, Section], length: int
    ) -> None:
        self._sections, self._begin = sections, len(start)
        file.write(start)
        file.truncate(len(start) + length)
        self._file = DirectFile(file)

    def close(self) -> None:
        """Let go of what was opened beside the file, which stays open."""
        self._file.close()

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Write tensors of these names."""
        for name, tensor in tensors.items():
            _write(self._file, tensor, self._begin + self._sections[name].offset)


def convert(
    folder: Path,
    path: Path,
    format: Format,
    source: dict[str, str],
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
    check: Check | None = None,
    overlapped: bool = True,
) -> None:
    """Write a checkpoint's packed form, module by module, the source of one in memory at a time.

    `check` is called with the model without memory, and where its tensors will be, before any is
    read. `overlapped`: a packed module is written while the next is packed, so that two of them are
    in memory, else one.

    Raises:
        CheckpointError, ConfigError, ShapeError, BackendError: see `quantize.read_packed`.
        NotWritten: there is not so much room, or see `save`.
    """
    with ExitStack() as whole, ThreadPoolExecutor(1) as writing:
        with _written():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = whole.enter_context(whole_file(path))
        writer: Writer | None = None
        before: Future[None] | None = None

        def begin(blank: Model) -> Callable[[str, Packed], None]:
            nonlocal writer
            start, sections, length = packed_header.make(blank, format, source)
            if check is not None:
                check(blank, sections)
            with _written():
                _check_room(path.parent, len(start) + length)
                writer = whole.enter_context(closing(Writer(file, start, sections, length)))
            return put

        def put(name: str, module: Packed) -> None:
            nonlocal before
            assert writer is not None
            parts = module.parts()
            named = {f"{name}.{part}": tensor for part, tensor in parts.items()}
            with _written():
                if before is not None:
                    before.result()
                before = writing.submit(writer.put, named)
                if not overlapped:
                    before.result()
            module.use({part: tensor.to("meta") for part, tensor in parts.items()})

        model = read_packed(folder, format, progress, accept_fields, begin)
        assert writer is not None
        with _written():
            if before is not None:
                before.result()
            writer.put(dict((*model.named_parameters(), *model.named_buffers())))
            whole.close()


@contextmanager
def _written() -> Iterator[None]:
    """Tell what is wrong with the file from errors of everything else."""
    try:
        yield
    except OSError as error:
        raise NotWritten(error.strerror or str(error)) from error


def _check_room(folder: Path, size: int) -> None:
    total, _, free = shutil.disk_usage(folder)
    if total and size > free:  # some file systems do not say
        raise OSError(f"it takes {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free")


def converted(
    folder: Path,
    format: Format,
    packed: Path | None = None,
    progress: Progress | None = None,
    accept_fields: Collection[str] = (),
    check: Check | None = None,
) -> tuple[Path, dict[str, str]]:
    """The file of a checkpoint's packed form, written if it is missing, and its fingerprint.

    One packed module, and the source of one, are in memory at a time.

    Raises:
        CheckpointError: the place cannot be written, or holds another form; see also `convert`.
    """
    path, source = packed or default_path(folder, format), fingerprint(folder)
    if not path.exists():
        try:
            convert(folder, path, format, source, progress, accept_fields, check, overlapped=False)
        except NotWritten as error:
            raise CheckpointError(
                f"a memory budget needs the packed form in a file, and {path} cannot be written: "
                f"{error}; give another --packed"
            ) from None
    check_stored(path, format)
    return path, source


def check_stored(path: Path, format: Format) -> None:
    """Refuse a file whose weights are packed in another form."""
    if stored_format(path) != format:
        wanted = "as stored" if format == AS_STORED else f"{format.kind} of {format.group}"
        raise CheckpointError(
            f"{path} holds weights that are packed in another form than {wanted}; give "
            "another --packed, or remove the file"
        )


def load(path: Path, source: dict[str, str] | None = None) -> Model:
    """Map a packed model; the system reads all of it ahead of its use, if there is room for it.

    Args:
        path: from `save`. It must not be written to while the model lives.
        source: the `fingerprint` of the checkpoint that it must be of; None: any.

    Raises:
        CheckpointError: it is missing, truncated, not a packed model, or of a different version of
            this program or checkpoint.
    """
    header, begin = checked(path, source)
    try:
        with path.open("rb") as file:
            # Private: a write to a parameter stays in this process instead of ending it.
            memory = mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    model, sections = packed_header.unfilled(path, header, len(memory) - begin)
    free = free_bytes()
    if free is None or len(memory) <= free:
        with suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_WILLNEED)
    fill(model, {name: at(memory, begin + each.offset, each) for name, each in sections.items()})
    return model


def checked(path: Path, source: dict[str, str] | None) -> tuple[dict[str, Any], int]:
    """A file's header, and where its tensors begin; raises as `load` does."""
    header, begin = packed_header.read(path)
    if source is not None and header["source"] != source:
        raise CheckpointError(
            f"{path} is the packed form of a different checkpoint, or the one beside it "
            "has changed; remove the file to pack it again"
        )
    return header, begin


def stored_format(path: Path) -> Format:
    """The format that a file's weights are packed in.

    Raises:
        CheckpointError: see `load`.
    """
    return packed_header.format_of(path, packed_header.read(path)[0])


def fill(model: Model, tensors: dict[str, Tensor]) -> None:
    """Put tensors where the model has such without memory."""
    made: dict[Tensor, Tensor] = {old: tensors[name] for name, old in model.named_buffers()}
    for name, parameter in model.named_parameters():
        made[parameter] = nn.Parameter(tensors[name], requires_grad=False)
    for path, module in model.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, old in own:
            setattr(module, name, made[old])
        if isinstance(module, Packed):
            module.use({part: tensors[f"{path}.{part}"] for part in module.parts()})


def at(memory: mmap.mmap, place: int, section: Section) -> Tensor:
    """The tensor of a section whose bytes are at some place."""
    like = section.tensor
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=place)
    return flat.view(like.shape)


def _write(file: DirectFile, tensor: Tensor, place: int) -> None:
    file.put(tensor.contiguous(), place)
