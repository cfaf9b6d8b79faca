"""From the host to the device without waiting for it: the way of every batch, index and noise in training and scoring."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; itself where it is there already.

    From the host to a GPU by way of pinned memory: the copy takes its turn among the work of the device and the host goes on,
    where a copy from other memory would make it wait for all that is queued. PyTorch keeps the pinned memory until it is copied.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
