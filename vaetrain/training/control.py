"""What decides from outside the loop whether it goes on, and what is told where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from vaetrain.config import TrainingConfig
from vaetrain.distributed.preemption import StopRequest
from vaetrain.distributed.watchdog import Heartbeat
from vaetrain.training.time_limit import TimeLimit

T = TypeVar("T")


@dataclass
class Control:
    """The heartbeat that the watchdog listens to, requests to stop, and the time limit, as one thing for the loop."""

    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    stop: StopRequest = field(default_factory=StopRequest)
    time_limit: TimeLimit = field(default_factory=lambda: TimeLimit(None))

    @classmethod
    def of(cls, config: TrainingConfig) -> Control:
        """That of a training which nobody watches. A collective."""
        return cls(time_limit=TimeLimit(config.train.max_hours))

    def begin(self, step: int) -> None:
        """A new turn of the loop, after `step` optimizer steps."""
        self.heartbeat.begin(step)

    def enter(self, phase: str) -> None:
        """What comes next, such as "forward"."""
        self.heartbeat.enter(phase)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each a sign of life."""
        return self.heartbeat.each(items)

    def should_stop(self, longest_save_s: float) -> bool:
        """Asked once a turn: whether all are to save and stop now, told by a signal or near the end of the time. A collective."""
        if self.time_limit.is_near(longest_save_s + self.stop.pause_s):
            self.stop.reason = self.time_limit.reason
        return self.stop.agree()

    def forecast(self, images_left: int, images_per_s: float, say: Callable[[str], None]) -> None:
        """Call when the device has done all steps so far. Says, once, if training will not end in time."""
        self.stop.measure(self.heartbeat.place.step + 1)
        if note := self.time_limit.forecast(images_left, images_per_s):
            say(note)

    @property
    def why_stopped(self) -> str | None:
        """None where training came to its end."""
        return (self.stop.reason or "a signal to another process") if self.stop.agreed else None
