"""How fast training is, what part of the device's peak that makes, and the memory it takes."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from vaetrain.distributed.processes import max_over_processes
from vaetrain.model.autoencoder import VAE

T = TypeVar("T")

PEAK_FLOPS = {  # dense, per second, from the vendors' data sheets: (fp32 outside tensor cores, bf16 and fp16)
    "H200": (67e12, 989e12),
    "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
    "L40S": (91.6e12, 362e12),
    "L4": (30.3e12, 121e12),
    "V100": (15.7e12, 125e12),
    "T4": (8.1e12, 65e12),
}


class Stopwatch:
    """Wall-clock time between training records, less pauses, and the part of it spent waiting for data."""

    def __init__(self, images_seen: int) -> None:
        self.images_seen = images_seen
        self.started = time.perf_counter()
        self.data_wait = 0.0

    def timing(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, the time until each counted as waiting for data."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.data_wait += time.perf_counter() - start
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: validation, pictures and checkpoints are no training."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def lap(self, accelerator: Accelerator, images_seen: int) -> dict[str, float]:
        """Speed and memory since the last lap, over all processes; start the next. A collective."""
        elapsed = time.perf_counter() - self.started
        images_per_s = (images_seen - self.images_seen) / elapsed
        memory = torch.cuda.max_memory_allocated() / 2**30 if accelerator.device.type == "cuda" else peak_rss_gib()
        # The slowest process sets the pace of all: its wait is the one that counts.
        wait, memory = max_over_processes(accelerator, [self.data_wait / elapsed, memory])
        self.images_seen, self.started, self.data_wait = images_seen, time.perf_counter(), 0.0
        return {"perf/images_per_s": images_per_s, "perf/data_wait_frac": wait, "perf/peak_memory_gib": memory}


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, on Linux since `forget_peak_rss`, in GiB."""
    status = Path("/proc/self/status")
    # Linux's ru_maxrss would count what the process was before it became this program, too.
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    import resource  # not on Windows, where nobody trains on the CPU in earnest

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def forget_peak_rss() -> bool:
    """Give free memory back to the system and let `peak_rss_gib` count from here; False where a process cannot (not Linux)."""
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it: elsewhere the peak is a little higher
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense operations per second of the device, None where we have no data sheet (any CPU, an unknown GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, (fp32, half) in PEAK_FLOPS.items():
        if key in name.replace("-", " ").split():
            return fp32 if precision == "fp32" else half
    return None


def training_flops_per_image(vae: VAE) -> float:
    """Floating-point operations of one image's forward and backward pass, matrix products and convolutions only."""
    with torch.device("meta"):
        model = VAE(vae.config)
        config = vae.config
        x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        noise = torch.empty(1, *config.latent_shape)
    with FlopCounterMode(display=False) as counter:
        terms = model(x, noise)
        (terms.distortion + terms.kl.sum()).sum().backward()
    return float(counter.get_total_flops())
