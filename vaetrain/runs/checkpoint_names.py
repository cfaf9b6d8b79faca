"""Which folders are checkpoints, by their names alone, without importing torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vaetrain.files import inside

NONE_YET = ".none-yet"
"""A file among the checkpoints of a run that has had none, so that one killed before its first may begin again."""


def list_checkpoints(folder: Path) -> list[Path]:
    """What has a checkpoint's name in a folder, oldest first; one that lacks its checksums is damaged, and among them.

    Raises ValueError for a link of such a name.
    """
    named = [path.name for path in folder.glob("step-*") if has_checkpoint_name(path)]
    return sorted((inside(folder, name) for name in named), key=step_of)


def has_checkpoint_name(path: Path) -> bool:
    """Whether a path is named after a step."""
    return re.fullmatch(r"step-\d{8,18}", path.name) is not None


def has_checksums(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, as one that has its name always was."""
    return (checkpoint / "checksums.json").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, and not a run directory."""
    return (path / "state.json").is_file()


def require_checkpoint(path: Path) -> None:
    """Raise FileNotFoundError unless `path` is a checkpoint, or a run directory that has one; damaged ones count."""
    if not is_checkpoint(path) and not list_checkpoints(path / "checkpoints"):
        raise no_good_checkpoint(path)


def no_good_checkpoint(path: Path, damaged: Sequence[str] = ()) -> FileNotFoundError:
    """The error that says so, and what is wrong with those there are."""
    return FileNotFoundError("; ".join([f"{path} is neither a checkpoint nor a run that has a good one", *damaged]))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))
