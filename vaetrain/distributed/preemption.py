"""Stopping on request: told by a signal to any process, all stop at the same step, save, and can be started again.

SIGTERM and SIGUSR1 do this; a second signal changes nothing. The training process exits with 75 (EX_TEMPFAIL of
sysexits.h: "try again later"), and the same command goes on from there. What a launcher makes of it (measured):

| signal to | | the training | the launcher exits with |
|---|---|---|---|
| `python vaetrain/train.py` | either | stops | – (itself: 75) |
| all training processes, or one of them | either | stops | 1 |
| torchrun, `accelerate launch` of several | SIGTERM | is told, killed after TORCH_ELASTIC_SHUTDOWN_TIMEOUT (30 s) | 1 |
| torchrun, `accelerate launch` of several | SIGUSR1 | stops when it finds its launcher gone | 138 (died) |
| `accelerate launch` of one | either | stops when it finds its launcher gone | 143, 138 (died) |

A stop takes up to two steps, with many processes LONGEST_PAUSE_S more, a validation that is under way, and a checkpoint:
TORCH_ELASTIC_SHUTDOWN_TIMEOUT should be longer. With `torchrun --max-restarts` signal torchrun: processes that exit with 75 it
would start again.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed as dist

from vaetrain.distributed.exchange import TIMEOUT_S
from vaetrain.distributed.launcher import launcher
from vaetrain.distributed.processes import control_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

PAUSE_PER_PROCESS_S = 0.01
"""Between two questions, for each process but one: a hundred times what its two messages of a ring all-reduce take (50 µs each)."""
LONGEST_PAUSE_S = 5.0
"""Between two questions, however many processes: batch systems give 30 s and more from the signal to the end."""


class StopRequest:
    """Whether the processes were told to stop, asked at the same steps on all of them and answered the same.

    With few processes, or long steps, that is at each step; else at every k-th, k from the time of the slowest's steps.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """A collective. Whoever waits for an answer longer than `timeout_s` raises RuntimeError."""
        self.reason: str | None = None
        """Why this process should stop: a signal it was sent, or that it is an orphan."""
        self.agreed = False
        """All processes know, and stop before their next step."""
        self._launcher = launcher()
        self._group = control_group(timeout_s)
        self.pause_s = 0.0 if self._group is None else pause_s(self._group.size())
        """Seconds that may pass between two questions."""
        self._asked: tuple[dist.Work, torch.Tensor] | None = None
        self._steps_to_question = 0
        self._step_s = math.inf  # unknown: ask at each
        self._measured_at: tuple[int, float] | None = None

    def measure(self, step: int) -> None:
        """Call now and then when the device has done `step` steps, from which the time of a step is taken."""
        now = time.monotonic()
        if self._measured_at is not None and step > self._measured_at[0]:
            self._step_s = (now - self._measured_at[1]) / (step - self._measured_at[0])
        self._measured_at = step, now

    def agree(self) -> bool:
        """Call once a step: whether any process had been told to stop at the last question; alone, when it calls. A collective.

        The answer to a question is fetched at the next step, so that it travels while the devices compute, and
        it travels between CPUs, so that nobody waits for a device.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.reason = "the end of its launcher"
        if self._group is None:
            self.agreed = self.reason is not None
        elif not self.agreed:
            if self._asked is not None:
                (work, answer), self._asked = self._asked, None
                work.wait()
                told, slowest_step_s = answer.tolist()
                self.agreed = bool(told)
                self._steps_to_question = steps_between(self.pause_s, slowest_step_s) - 1
            if self._steps_to_question > 0:
                self._steps_to_question -= 1
            elif not self.agreed:
                question = torch.tensor([self.reason is not None, self._step_s], dtype=torch.float64)
                self._asked = dist.all_reduce(question, dist.ReduceOp.MAX, self._group, async_op=True), question
        return self.agreed

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGUSR1 ask for a stop instead of ending the process; for its main thread."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing more: the next signal may come while a checkpoint is being written.
        self.reason = signal.Signals(number).name


def pause_s(num_processes: int) -> float:
    """Seconds between two questions, so that the processes spend at most a hundredth of their time on them."""
    return min(LONGEST_PAUSE_S, PAUSE_PER_PROCESS_S * (num_processes - 1))


def steps_between(pause_s: float, step_s: float) -> int:
    """Steps from one question to the next; 1 where a step's time is not known yet (infinite)."""
    return max(1, int(pause_s / max(step_s, 1e-6)))
