"""The note that a finished shard leaves in OUT/.partial: what a rerun need not make again, and what a merge puts together."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from vaetrain.data.format.manifest import Shard
from vaetrain.data.sharding.task import DeepPixels, MoreFrames, Rejected, ShardTask
from vaetrain.files import replace_file, sha256_of_file
from vaetrain.strict_json import from_json

PARTIAL_NAME = ".partial"


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is whole, with its rows of the index."""

    plan: str
    """Digest of the plan it belongs to."""
    shard: Shard | None
    """None: not one of its originals can be read."""
    offset: tuple[int, ...]
    num_bytes: tuple[int, ...]
    label: tuple[int, ...]
    rejected: tuple[Rejected, ...]
    """Originals that are not in it."""
    likeness: str
    """What each of its images looks like: an array of LIKENESS in base64."""
    more_frames: tuple[MoreFrames, ...]
    """Originals of which not all pictures are in it."""
    deep: DeepPixels

    def write(self, task: ShardTask, aside: Path) -> None:
        """Leave the note of `task`, by way of a file in the folder `aside`, which is this process's own."""
        file = _file(task)
        replace_file(aside / file.name, json.dumps(dataclasses.asdict(self)).encode())
        (aside / file.name).replace(file)

    @classmethod
    def of(cls, task: ShardTask, full: bool) -> FinishedShard | None:
        """The note of `task` if its shard is there and whole (`full`: by its SHA-256, not only its size).

        Raises ValueError when the note is damaged.
        """
        try:
            content = _file(task).read_text()
        except FileNotFoundError:
            return None
        try:
            absent = {"more_frames": [], "deep": dataclasses.asdict(DeepPixels())}  # in notes of vaetrain 0.2
            note: FinishedShard = from_json(cls, absent | json.loads(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{_file(task)} is damaged: {error}; delete {task.out} and start again") from error
        return note if note.plan == task.plan and note._is_whole(task.out, full) else None

    def _is_whole(self, out: Path, full: bool) -> bool:
        if self.shard is None:
            return True
        file = out / self.shard.name
        if not file.exists() or file.stat().st_size != self.shard.num_bytes:
            return False
        return not full or sha256_of_file(file) == self.shard.sha256


def _file(task: ShardTask) -> Path:
    return task.out / PARTIAL_NAME / f"{task.name}.json"
