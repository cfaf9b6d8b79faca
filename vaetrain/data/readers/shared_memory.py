"""Memory that several processes map together, without importing torch.

It is in no file system: nothing is left behind however its processes end, and the size of /dev/shm (64 MB in many containers),
past which a write ends the process with SIGBUS, is no matter.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from jaxtyping import Shaped

from vaetrain.machine import process_space


class SharedMemory:
    """`num_bytes` zero bytes; pickled to a child process, it is the same memory there. OSError when there is not so much."""

    def __init__(self, num_bytes: int) -> None:
        self._map_file(_anonymous_file(num_bytes), num_bytes)

    @classmethod
    def of_process(cls, pid: int, fd: int, inode: int, num_bytes: int) -> SharedMemory:
        """Memory that another process of this user made and holds open; OSError when that process is out of reach."""
        file = io.FileIO(f"/proc/{pid}/fd/{fd}", "r+")
        found = os.fstat(file.fileno())
        if (found.st_ino, found.st_size) != (inode, num_bytes):
            raise FileNotFoundError(f"process {pid} is another one there than here")
        memory = cls.__new__(cls)
        memory._map_file(file, num_bytes)
        return memory

    def _map_file(self, file: io.FileIO, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._file = file
        weakref.finalize(self, file.close)  # found by the cycle collector, a file would warn that nobody closed it
        self._map = mmap.mmap(file.fileno(), num_bytes)

    @property
    def fd(self) -> int:
        """The open file descriptor, by which others of this user find the memory."""
        return self._file.fileno()

    @property
    def inode(self) -> int:
        """Tells this memory from another under the same descriptor."""
        return os.fstat(self.fd).st_ino

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Shaped[np.ndarray, "..."]:
        """Part of the memory, from byte `offset` on, as an array; the memory lives as long as the array."""
        return np.ndarray(shape, dtype, self._map, offset)

    def write(self, array: Shaped[np.ndarray, "..."], offset: int = 0) -> None:
        """Copy an array to byte `offset`.

        Of fresh memory, whose pages need not be made zero first, it takes half the time of assigning to `array`.
        """
        content = array.reshape(-1).view(np.uint8).data
        while content:
            written = os.pwrite(self.fd, content, offset)
            content, offset = content[written:], offset + written

    def __reduce__(self) -> tuple[Callable[..., SharedMemory], tuple[Any, int]]:
        """Hand over the file descriptor: to a process that is being started, or to one that takes it from a socket."""
        return _received, (DupFd(self.fd), self.num_bytes)


def _anonymous_file(num_bytes: int) -> io.FileIO:
    if hasattr(os, "memfd_create"):
        file = io.FileIO(os.memfd_create("vaetrain"), "r+")
    else:  # macOS
        with tempfile.TemporaryFile() as nameless:
            file = io.FileIO(os.dup(nameless.fileno()), "r+")
    file.truncate(num_bytes)
    return file


def _received(handle: Any, num_bytes: int) -> SharedMemory:
    memory = SharedMemory.__new__(SharedMemory)
    memory._map_file(io.FileIO(handle.detach(), "r+"), num_bytes)
    return memory


def memory_domain() -> int:
    """The same for processes that can reach each other's memory: on one machine, in one container. Below 2⁶³."""
    space = (
        process_space() or f"{os.uname().nodename} {os.getpid()}"
    )  # where one cannot know, every process is by itself
    return int.from_bytes(hashlib.sha256(space.encode()).digest()[:8]) >> 1
