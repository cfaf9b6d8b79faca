"""Which arithmetic `--train.precision auto` means on this machine: bf16 where the device computes it natively, else fp32.

A CPU without bf16 instructions emulates them, twelve times slower than fp32 on one, and nothing that it says of itself tells
reliably: so a convolution and a matrix product are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vaetrain.config import PrecisionName, TrainingConfig
from vaetrain.distributed import processes
from vaetrain.distributed.arithmetic import TF32_CAPABILITY
from vaetrain.distributed.exchange import TIMEOUT_S, gather_objects
from vaetrain.distributed.processes import in_use
from vaetrain.machine import cpu_model

C = TypeVar("C", bound=TrainingConfig)

BF16_CAPABILITY = (8, 0)
"""CUDA compute capability from which on tensor cores multiply bf16 (Ampere)."""

WORTHWHILE = 1.1
"""bf16 must be so many times as fast as fp32 on a CPU: it has two digits, and the measurement an error."""

ROUNDS = 3
"""In which the two take turns; the fastest of each counts, since other work only ever slows them down."""


def start(
    asked: PrecisionName,
    *,
    kept: PrecisionName | None = None,
    timeout_s: float = TIMEOUT_S,
    timeout_option: str = "",
    **options: Any,
) -> Accelerator:
    """`processes.start` in the arithmetic that was asked for.

    auto becomes `kept`, that of the run that goes on, or what fits the devices of all processes; the main process says which.
    """
    main = processes.join(timeout_s, timeout_option).is_main_process
    choice = choose(asked, kept=kept)
    if choice is not None and main:
        print(f"precision {choice.name}: {choice.reason}", flush=True)
    name = asked if choice is None else choice.name
    assert name != "auto"
    return processes.start(name, timeout_s=timeout_s, timeout_option=timeout_option, **options)


@dataclass(frozen=True)
class Choice:
    """An arithmetic and why."""

    name: PrecisionName
    reason: str


def choose(asked: PrecisionName, *, kept: PrecisionName | None = None) -> Choice | None:
    """The arithmetic to compute in, the same on every process; None where what was asked for needs no comment. A collective.

    `asked` may be auto: then that of the run that is resumed, `kept`, or the one that fits the devices of all processes. Raises
    ValueError for fp16 or tf32 without a GPU that has it.
    """
    if asked == "fp16" and not torch.cuda.is_available():
        raise ValueError("--train.precision fp16 needs a GPU and there is none; use auto, fp32 or bf16")
    if asked == "tf32" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= TF32_CAPABILITY):
        raise ValueError("--train.precision tf32 needs a GPU of compute capability 8.0 or more; use auto, fp32 or bf16")
    named = asked if asked != "auto" else gather_objects([kept], "all processes to start")[0] or "auto"
    goes_on = asked == "auto" and named != "auto"
    why = "as the run that goes on has it" if goes_on else "as asked for"
    if named in ("fp32", "tf32", "fp16"):
        return Choice(named, why) if goes_on else None
    # On a node of several kinds of GPU, or processors, all follow the least of them.
    devices = gather_objects([computes_bf16_natively()], "all processes to try their device")
    natively = all(native for native, _ in devices)
    reason = next(reason for native, reason in devices if native == natively)
    if named == "auto":
        return Choice("bf16" if natively else "fp32", reason)
    if not natively:
        return Choice("bf16", f"{why}, though {reason}: fp32 would be faster")
    return Choice("bf16", why) if goes_on else None


def computes_bf16_natively() -> tuple[bool, str]:
    """Whether this process's device is faster in bf16 than in fp32, and how that is known."""
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        said = f"{name} has compute capability {capability[0]}.{capability[1]}"
        if capability >= BF16_CAPABILITY:
            return True, f"{said}, which computes bf16 natively"
        return False, f"{said}, and bf16 needs {BF16_CAPABILITY[0]}.{BF16_CAPABILITY[1]}"
    ratio = cpu_speedup()
    compared = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
    return ratio >= WORTHWHILE, f"bf16 was measured {compared} than fp32 on {cpu_model() or 'this CPU'}"


@cache
def cpu_speedup() -> float:
    """Time in fp32 over time in bf16 of a convolution and a matrix product, forward and backward on this CPU; takes some 0.4 s."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 32, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(32, 32, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    matrix = torch.randn(256, 256, generator=generator)
    best: dict[torch.dtype, list[float]] = {}
    with torch.enable_grad():
        for round_number in range(ROUNDS + 1):
            for dtype in (torch.float32, torch.bfloat16):
                x, weight, a = (tensor.to(dtype).requires_grad_() for tensor in (image, kernel, matrix))
                times = [seconds(partial(F.conv2d, x, weight, padding=1)), seconds(partial(torch.matmul, a, a))]
                if round_number > 0:  # the first prepares kernels and memory
                    before = best.get(dtype, times)
                    best[dtype] = [min(pair) for pair in zip(before, times, strict=True)]
    return sum(best[torch.float32]) / sum(best[torch.bfloat16])


def seconds(compute: Callable[[], Tensor]) -> float:
    """That a computation and its backward pass take."""
    start = time.perf_counter()
    compute().sum().backward()
    return time.perf_counter() - start


def resolved(config: C, accelerator: Accelerator) -> C:
    """The config with the arithmetic that the accelerator computes in, where it says auto."""
    if config.train.precision != "auto":
        return config
    return replace(config, train=replace(config.train, precision=in_use(accelerator)))  # type: ignore[type-var]
