"""One process trains in a run directory at a time: a lock that ends with the process that holds it.

RUN/.lock stays when the run has ended; what counts is whether a living process has it locked (flock), which the kernel
knows. Reading a run (sample, evaluate, export, resuming elsewhere) takes no lock: files there appear whole or not at all.
Without importing torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from vaetrain.files import inside

_held: set[int] = set()


def _forget_in_child() -> None:
    # A lock lasts until the last copy of its descriptor is closed, and a forked child has one. (Those that start another
    # program, as the fork server of the readers' workers does, lose it by themselves.)
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def hold(file: Path) -> Iterator[None]:
    """Hold the lock `file`, made with its folder if need be.

    Raises ValueError, which names the process that already does, and for a link.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    inside(file.parent, file.name)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file} is no plain file; delete it")
    _held.add(descriptor)
    try:
        _lock(descriptor, file)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = f"process {os.getpid()} on {platform.node()}, started {started}: {shlex.join(sys.argv)}\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, file: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "a process that is just starting"
        raise ValueError(
            f"{file.parent} is in use by {owner}. Two processes must not write one run: stop that one, or choose another "
            "--run-dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(
            f"warning: the file system of {file.parent} has no locks ({error.strerror}); nothing keeps a second process from "
            "writing the same run",
            file=sys.stderr,
        )
