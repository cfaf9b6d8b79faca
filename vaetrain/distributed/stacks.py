"""The Python stacks of this process, written where a dead disk or file server can neither fail nor block the writer."""

from __future__ import annotations

import faulthandler
import tempfile
import threading
from pathlib import Path

from vaetrain.files import replace_file

SECONDS_TO_WRITE = 5.0
"""After which a file server that does not answer is given up."""


def write_stacks(file: Path, within_s: float = SECONDS_TO_WRITE) -> str | None:
    """Write the stacks of all threads, if the file's folder exists; None, or why they could not be written in time.

    Never raises, and returns within `within_s`: what calls this is about to end the process and must get there.
    """
    problem: list[str] = [f"no answer for {within_s:g} s"]

    def write() -> None:
        try:
            with tempfile.TemporaryFile() as local:  # faulthandler keeps all threads waiting while it writes
                faulthandler.dump_traceback(local, all_threads=True)
                local.seek(0)
                stacks = local.read()
            if file.parent.is_dir():
                replace_file(file, stacks)
        except OSError as error:
            problem[0] = str(error)
        else:
            problem.clear()

    # A daemon: one that blocks for good ends with the process.
    writer = threading.Thread(target=write, name="stacks", daemon=True)
    writer.start()
    writer.join(within_s)
    return problem[0] if problem else None
