"""Stopping in order before the time is up that a batch system gives: `--train.max-hours`.

The processes stop as if told by a signal (preemption.py), at the same step, with a checkpoint, and exit with 75: the same
command goes on from there, with as many hours again.
"""

from __future__ import annotations

import time


class TimeLimit:
    """How much of the time is left, and whether that is too little for another turn of the loop and for saving.

    It runs from when this is made: the seconds that a process takes to import everything are not counted.
    """

    def __init__(self, max_hours: float | None) -> None:
        self.max_hours = max_hours
        self.reason = f"--train.max-hours {max_hours:g}" if max_hours else ""
        """What to tell a StopRequest."""
        self._ends = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._turn_began: float | None = None
        self._longest_turn_s = self._last_turn_s = 0.0
        self._forecast = False

    @property
    def seconds_left(self) -> float:
        """Until the time is up; infinite without a limit."""
        return self._ends - time.monotonic()

    def is_near(self, longest_save_s: float) -> bool:
        """Ask at the beginning of each turn of the loop: whether to stop now.

        Processes that agree take two turns more, one of which may have a validation and figures, and then save. Room is
        left for the longest turn and the longest save seen so far.
        """
        now = time.monotonic()
        if self._turn_began is not None:
            self._last_turn_s = now - self._turn_began
            self._longest_turn_s = max(self._longest_turn_s, self._last_turn_s)
        self._turn_began = now
        return self.seconds_left < self._longest_turn_s + self._last_turn_s + longest_save_s

    def forecast(self, images_left: int, images_per_s: float) -> str | None:
        """Once, when the speed is first known: what to say if training will not end in time. Validations come on top."""
        seconds, forecast_before, self._forecast = images_left / images_per_s, self._forecast, True
        if forecast_before or seconds <= self.seconds_left:
            return None
        return (
            f"note: at this speed training takes {seconds / 3600:.2g} hours more and {self.reason} leaves "
            f"{self.seconds_left / 3600:.2g}: it will save and stop before, and the same command goes on from there"
        )
