"""What made a result: code, packages, machine, data and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vaetrain.distributed.launcher_environment import LauncherEnvironment
from vaetrain.machine import cpu_model, num_cores

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_PATCH_BYTES = 1 << 20
"""Of uncommitted changes that a run keeps."""


RECORDED_PACKAGES = (
    "vaetrain", "torch", "torchvision", "accelerate", "webdataset", "einops", "safetensors", "torch-fidelity", "numpy",
    "pillow", "simplejpeg", "scipy", "scikit-learn", "zuko", "wandb",
)  # fmt: skip


@runtime_checkable  # for the type checks of the tests
class DataSummary(Protocol):
    """What a manifest says of itself, for the record of a run."""

    @property
    def fingerprint(self) -> str:
        """Of the data."""
        ...

    def summary(self) -> dict[str, Any]:
        """Without its lists of files."""
        ...


def describe_dataset(train: DataSummary, val: DataSummary) -> dict[str, Any]:
    """What the training and validation data are, without their lists of shards."""
    return {"train": train.summary(), "val": val.summary()}


def provenance(accelerator: Accelerator | None, dataset_fingerprint: str | None) -> dict[str, Any]:
    """What is making this result: code revision, package versions, machine, processes, data, command and time (UTC).

    None in place of an accelerator: this process alone, on its CPU.
    """
    device, num_processes, precision = "cpu", 1, "fp32"
    if accelerator is not None:
        from vaetrain.distributed.processes import (  # here, since it brings torch, which --help does without
            device_name,
            in_use,
        )

        device, num_processes = device_name(accelerator.device), accelerator.num_processes
        precision = in_use(accelerator)
    revision, dirty = git_state(Path(__file__).parents[2])
    return {
        "git_revision": revision,
        "git_dirty": dirty,
        **({} if revision else {"git_note": "the code is not in a git checkout of vaetrain (installed, or copied)"}),
        "packages": {name: package_version(name) for name in RECORDED_PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "device": device,
        "precision": precision,
        "num_processes": num_processes,
        "processes_per_node": LauncherEnvironment.read().processes_per_node,
        "num_cores": num_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "dataset_fingerprint": dataset_fingerprint,
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_state(source: Path) -> tuple[str | None, bool | None]:
    """Revision of the checkout the code runs from and whether it has changes or new files; (None, None) outside git.

    Outside is, too, what another repository contains without tracking it: an environment in somebody's project.
    """
    try:
        require_tracked(source)
        revision = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            ["git", "-C", str(source), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        new = subprocess.run(
            ["git", "-C", str(source), "ls-files", "--others", "--exclude-standard", "--", "vaetrain"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None  # installed from a wheel, or no git here: provenance says so by null
    return revision.stdout.strip(), bool(status.stdout.strip() or new.stdout.strip())


def is_revision(text: str) -> bool:
    """Whether a recorded text has the form of git's revisions; whatever has not must reach neither git nor a shell."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def require_tracked(source: Path) -> None:
    """Raise CalledProcessError unless git tracks this very file in `source`."""
    command = ["git", "-C", str(source), "ls-files", "--error-unmatch", "vaetrain/runs/provenance.py"]
    subprocess.run(command, capture_output=True, check=True, timeout=10)


def uncommitted_changes(source: Path) -> bytes:
    """The difference of the checkout's tracked files to its revision; empty outside git, and for over MAX_PATCH_BYTES."""
    try:
        require_tracked(source)
        command = ["git", "-C", str(source), "diff", "HEAD", "--no-color", "--no-ext-diff"]
        patch = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return b""
    return patch if len(patch) <= MAX_PATCH_BYTES else b""


def package_version(name: str) -> str | None:
    """Installed version of a distribution, None when it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
