"""Weights read as tensors and nothing else, with the hash that goes into a score's record."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vaetrain.metrics.lpips_config import require_file

OF_DAMAGED_PICKLES = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError, struct.error,
)  # fmt: skip
"""What torch.load raises for them, besides."""


def read_weights(path: Path | None, option: str, remedy: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .pth or .safetensors file by name, on the CPU, and the file's SHA-256.

    `option` is how the user named the file and `remedy` says where to get it, for the message. Raises FileNotFoundError or
    ValueError if the file is not given, missing or is anything but a dictionary of tensors.
    """
    path = require_file(path, option, remedy)
    content = path.read_bytes()  # once, so that the hash is that of the weights in use
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, *OF_DAMAGED_PICKLES) as error:
        raise ValueError(
            f"{option} {path} cannot be read as tensors alone and is refused: it is damaged, a TorchScript "
            f"archive, or holds Python objects, which could run code. {remedy}"
        ) from error
    if not (isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())):
        raise ValueError(f"{option} {path} holds no dictionary of tensors. {remedy}")
    return state, hashlib.sha256(content).hexdigest()
