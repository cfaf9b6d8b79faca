"""A process ends with the launcher that started it, at whatever moment that dies, and meets no other launch's processes.

While a process imports, joins or waits for the store nobody agrees on a stop with it: there the system ends it (SIGTERM from
`prctl(PR_SET_PDEATHSIG)`, on Linux). In training the same signal asks for a stop (preemption.py), which saves; what has not
come to its end SECONDS_TO_STOP later is ended here. Without importing torch: entry points call this first of all.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vaetrain.machine import process_space

SECONDS_TO_STOP = 25.0
"""From the launcher's end until a process that has not ended by itself is ended."""
SECONDS_BETWEEN_LOOKS = 1.0

PR_SET_PDEATHSIG = 1  # prctl(2)
LAUNCHERS = re.compile(rb"accelerate|torchrun|torch[./]distributed")
"""In the command line of one."""


class PortHolder(NamedTuple):
    """A process that listens on a port."""

    pid: int
    command: str


def launcher() -> int | None:
    """Process id of the `accelerate launch` or torchrun that started this process, None if nothing of that kind did."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    return os.getppid() if launched else None


def end_with_launcher() -> None:
    """See that this process does not outlive its launcher; ends it at once where that is gone already. Nothing without one."""
    parent = launcher()
    if parent is None:
        return
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or not _may_be_launcher(parent):
        print("error: the launcher of this process is gone; start again", file=sys.stderr, flush=True)
        os._exit(1)
    threading.Thread(target=_outlive_by_little, args=(parent,), name="launcher", daemon=True).start()


def _outlive_by_little(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    time.sleep(SECONDS_TO_STOP)
    print(
        f"error: the launcher of process {os.getpid()} is gone, and it did not stop within {SECONDS_TO_STOP:g} s",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def _may_be_launcher(pid: int) -> bool:
    """Whether a parent looks like what starts trainings; a process whose parent has died gets init for one, or the like."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return pid != 1  # not Linux, or nobody may look
    if LAUNCHERS.search(command) or os.fsencode(Path(sys.argv[0]).name) in command:
        return True
    if pid == 1 or not command:  # a zombie has none
        return False
    with suppress(OSError):
        if os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe"):  # a launcher of somebody's own
            return True
    return os.getsid(pid) == os.getsid(0)  # a shell around the command


def launch_key() -> str:
    """What the processes that one launcher started on this machine have in common, and no others ever had."""
    parent = launcher()
    if parent is None:
        return "none"
    started = ""
    with suppress(OSError):  # not Linux
        # The name before it, in parentheses, may hold anything; starttime is the 22nd value, see proc_pid_stat(5).
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{process_space() or ''} {parent} {started}"


def holder_of_port(port: int) -> PortHolder | None:
    """Who listens on a TCP port of this machine; None where nobody does, or the system does not say who."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        with suppress(OSError):  # another user's, or gone
            if any(os.readlink(entry.path) in wanted for entry in os.scandir(process / "fd")):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return PortHolder(int(process.name), command)
    return None
