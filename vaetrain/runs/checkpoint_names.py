"""Which folders are checkpoints, by their names alone, without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if (path / "checksums.json").is_file()), key=step_of)


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
