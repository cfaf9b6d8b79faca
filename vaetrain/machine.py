"""What this machine offers."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Processor cores this process may use: a batch system may have given it fewer than there are."""
    # macOS cannot tell which cores a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
