"""How a device multiplies fp32 numbers, and whether it gives the same bits every time: settings of the whole process.

PyTorch lets cuDNN's convolutions round fp32 to TF32 (10 bits of mantissa) unless told otherwise. Here fp32 means IEEE; TF32 is an
arithmetic of its own, by name. A CPU has no TF32, and gives the same bits every time on the same number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TF32_CAPABILITY = (8, 0)
"""CUDA compute capability from which on tensor cores multiply TF32 (Ampere)."""


def set_tf32(allowed: bool) -> None:
    """Let CUDA round the factors of fp32 convolutions and matrix products to TF32, or not, from now on."""
    # One way of saying so for both: PyTorch refuses to read what was said in a mixture of its old and new ways (2.15).
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def tf32_is_set() -> bool:
    """Whether fp32 matrix products are rounded to TF32 on CUDA."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def ieee_fp32(device: torch.device) -> Iterator[None]:
    """Inside, fp32 is IEEE and convolutions give the same bits every time, whatever the process has set: for scores."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"),
        ):
            yield
    finally:
        matmul.fp32_precision = before


def be_deterministic() -> None:
    """Only algorithms that give the same bits every time, from now on; call before CUDA is used.

    An operation that has none raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for, and reads once
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it, and it costs
