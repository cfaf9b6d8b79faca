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

A stop takes up to two steps, a validation that is under way, and a checkpoint: TORCH_ELASTIC_SHUTDOWN_TIMEOUT should be
longer. With `torchrun --max-restarts` signal torchrun: processes that exit with 75 it would start again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed as dist

from vaetrain.distributed.processes import TIMEOUT_S, control_group, launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether the processes were told to stop, asked once a step and answered the same on all of them."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """A collective. Whoever waits for an answer longer than `timeout_s` raises RuntimeError."""
        self.reason: str | None = None
        """Why this process should stop: a signal it was sent, or that it is an orphan."""
        self.agreed = False
        """All processes know, and stop before their next step."""
        self._launcher = launcher()
        self._group = control_group(timeout_s)
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def agree(self) -> bool:
        """Whether any process had been told to stop when it last called this; alone, when it calls. A collective.

        The answer to one step's question is fetched at the next, so that it travels while the devices compute, and
        it travels between CPUs, so that nobody waits for a device.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.reason = "the end of its launcher"
        if self._group is None:
            self.agreed = self.reason is not None
        elif not self.agreed:
            if self._asked is not None:
                work, flag = self._asked
                work.wait()
                self.agreed = bool(flag.item())
            if not self.agreed:
                flag = torch.tensor([self.reason is not None], dtype=torch.uint8)
                self._asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
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
