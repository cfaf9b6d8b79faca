"""What is done to training images and not to validation images."""

from __future__ import annotations

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def flip(pixels: UInt8[Tensor, "b c h w"], mirrored: Bool[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    """Each image that is `mirrored`, left for right."""
    return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
