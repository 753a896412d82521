"""A file written past the page cache, where its file system can.

What is packed is written once and perhaps never read by this process, so a copy of it in the page
cache is memory that the system has to find first, which can take longer than packing does.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import IO

import torch
from torch import Tensor

from moestro.kernels.packing import PAGE

_LEAST_BYTES = 1 << 18  # below that, waiting for the disk takes longer than copying
_PIECE_BYTES = 1 << 26


class DirectFile:
    """Puts tensors into a file; whole pages of large ones go past the page cache.

    Args:
        file: to write; it has to stay open.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._direct = file, -1
        with suppress(OSError, AttributeError):  # no such flag here, or the file system refuses it
            self._direct = os.open(file.name, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)

    def close(self) -> None:
        """Let go of what was opened beside the file."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def put(self, tensor: Tensor, place: int) -> None:
        """Write a contiguous tensor on the CPU.

        Raises:
            OSError: the disk is full or the place cannot be written.
        """
        flat = tensor.detach().view(-1)
        if not flat.numel():
            return
        memory, past = flat.view(torch.uint8).numpy().data, 0
        pages = (flat.data_ptr() | place) % PAGE == 0
        if self._direct >= 0 and pages and len(memory) >= _LEAST_BYTES:
            past = len(memory) // PAGE * PAGE
            try:
                _put(self._direct, memory[:past], place)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.close()  # it takes the flag, and other sizes or addresses
                past = 0
        _put(self._file.fileno(), memory[past:], place + past)


def _put(descriptor: int, memory: memoryview, place: int) -> None:
    while memory:
        count = os.pwrite(descriptor, memory[:_PIECE_BYTES], place)
        memory, place = memory[count:], place + count
