"""evaluation.json while it is being made: written after each group of scores, so that a later failure discards none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from vaetrain.documents import read_json
from vaetrain.runs.directory import write_json


class ScoresFile:
    """What stood there before, finished, waits beside it under another name until the new scores are finished, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous = path.with_suffix(".previous.json")
        self._has_begun = False

    def write(self, record: dict[str, Any]) -> None:
        """Write the scores so far; those to come stand under `unfinished`."""
        if not self._has_begun and self._is_finished():
            self.path.replace(self.previous)
        self._has_begun = True
        write_json(self.path, record)

    def finish(self) -> None:
        """Let go of what stood there before."""
        self.previous.unlink(missing_ok=True)

    def give_up(self) -> None:
        """Nothing was measured: what stood there before stands there again."""
        if not self._has_begun:
            return
        if self.previous.is_file():
            self.previous.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def _is_finished(self) -> bool:
        with suppress(OSError, ValueError):
            return "unfinished" not in read_json(self.path, remedy="", nulls=True)
        return False
