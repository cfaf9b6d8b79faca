"""What it costs to average gradients over processes: a model of a ring, and its two numbers measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import distributed as dist

from vaetrain.distributed.processes import max_over_processes

ROUNDS = 7
SMALL_BYTES, LARGE_BYTES = 1024, 32 << 20


@dataclass(frozen=True)
class Interconnect:
    """The connection between processes, as an all-reduce sees it."""

    bytes_per_s: float
    """Of each process, in each direction."""
    latency_s: float
    """Of one of the ring's 2 (n − 1) messages."""
    source: str
    """Where the numbers are from."""

    def all_reduce_s(self, num_bytes: float, num_processes: int) -> float:
        """Seconds for a ring all-reduce: 2 (n − 1) messages of 1/n of the bytes each (Patarasuk & Yuan 2009)."""
        messages = 2 * (num_processes - 1)
        return messages * (num_bytes / num_processes / self.bytes_per_s + self.latency_s)

    @classmethod
    def measure(cls, accelerator: Accelerator) -> Interconnect:
        """Time a small and a large all-reduce between the running processes, of which there are several. A collective."""
        small, large = (_median_s(accelerator, num_bytes) for num_bytes in (SMALL_BYTES, LARGE_BYTES))
        n = accelerator.num_processes
        messages = 2 * (n - 1)
        latency_s = small / messages
        bytes_per_s = messages * LARGE_BYTES / n / max(large - small, 1e-9)
        return cls(bytes_per_s, latency_s, f"measured between {n} processes ({dist.get_backend()})")


def _median_s(accelerator: Accelerator, num_bytes: int) -> float:
    buffer = torch.zeros(num_bytes // 4, device=accelerator.device)
    times = []
    for _ in range(ROUNDS + 1):
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        if buffer.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return max_over_processes(accelerator, [statistics.median(times[1:])])[0]  # the first makes connections
