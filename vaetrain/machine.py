"""What this machine offers."""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
from pathlib import Path


def num_cores() -> int:
    """Processor cores this process may use: a batch system may have given it fewer than there are."""
    # macOS cannot tell which cores a process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_space() -> str | None:
    """What two processes share if each can see whether the other exists: this boot of a machine and its process ids.

    None where the system has no word for it (not Linux).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def cpu_model() -> str | None:
    """The processor's name, such as "AMD EPYC 7763 64-Core Processor"; None where the system does not say."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or None


def available_memory() -> int | None:
    """Memory that may still be taken, in bytes: what the machine has left, at most the limit of its control group.

    None where the system does not say (not Linux).
    """
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        group = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return None
    if available is None:
        return None
    bounds = [int(available[1]) * 1024]
    if group:
        # The limit of a batch job is on one of the groups around its processes'.
        folder = Path("/sys/fs/cgroup") / group[1]
        limits = [place / "memory.max" for place in (folder, *folder.parents)]
        bounds += [int(text) for file in limits if file.is_file() and (text := file.read_text().strip()) != "max"]
    return min(bounds)
