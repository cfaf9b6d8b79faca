"""A script as a user starts it, and the names of the native threads that are left when the interpreter ends.

python tests/exit_scenario.py FOLDER SCRIPT OPTIONS_OF_SCRIPT …
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from pathlib import Path


def write_thread_names(file: Path) -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    file.write_text("\n".join(names))


if __name__ == "__main__":
    atexit.register(write_thread_names, Path(sys.argv[1]) / f"threads-{os.environ['RANK']}")
    del sys.argv[:2]  # the script finds its own name and options
    runpy.run_path(sys.argv[0], run_name="__main__")
