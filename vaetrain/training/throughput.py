"""How fast training is, what part of the device's peak that makes, and the memory it takes."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from vaetrain.distributed.processes import Precision, max_over_processes
from vaetrain.model.autoencoder import VAE

T = TypeVar("T")


class Peak(NamedTuple):
    """A GPU's dense operations per second, from the vendor's data sheet (half of what it says with sparsity)."""

    fp32: float
    """IEEE, outside the tensor cores."""
    tf32: float | None
    """None: it has none."""
    half: float
    """bf16 and fp16, summed in fp32."""


PEAKS = {  # by the words of a product's name; the first that has them all
    "GB200": Peak(80e12, 1250e12, 2500e12),
    "B200": Peak(75e12, 1125e12, 2250e12),
    "GH200": Peak(67e12, 494e12, 989e12),
    "H200 NVL": Peak(60e12, 418e12, 835e12),
    "H200": Peak(67e12, 494e12, 989e12),
    "H100 NVL": Peak(60e12, 418e12, 835e12),
    "H100 PCIe": Peak(51e12, 378e12, 756e12),
    "H100": Peak(67e12, 494e12, 989e12),
    "H20": Peak(44e12, 74e12, 148e12),
    "A100": Peak(19.5e12, 156e12, 312e12),
    "A40": Peak(37.4e12, 74.8e12, 149.7e12),
    "A10": Peak(31.2e12, 62.5e12, 125e12),
    "L40S": Peak(91.6e12, 183e12, 362e12),
    "L4": Peak(30.3e12, 60e12, 121e12),
    "RTX 4090": Peak(82.6e12, 82.6e12, 165.2e12),
    "RTX 3090": Peak(35.6e12, 35.6e12, 71e12),
    "V100": Peak(15.7e12, None, 125e12),
    "T4": Peak(8.1e12, None, 65e12),
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


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Peak dense operations per second of the device in this arithmetic; None without a data sheet (any CPU, an unknown GPU)."""
    return peak_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_of(name: str, precision: Precision) -> float | None:
    """Peak dense operations per second of a GPU by its product name ("NVIDIA H100 PCIe"), None if we have no data sheet."""
    words = set(name.replace("-", " ").split())
    if words & {"MIG", "Laptop"}:  # a slice of a GPU, or a smaller one, has a part of the peak
        return None
    peak = next((peak for product, peak in PEAKS.items() if words >= set(product.split())), None)
    if peak is None:
        return None
    return {"fp32": peak.fp32, "tf32": peak.tf32}.get(precision, peak.half)


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
