"""A tiny feature extractor as a user would bring one: a TorchScript file from uint8 images to 8 numbers each."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class TinyExtractor(nn.Module):
    """Mean of eight random convolutions' responses, squared."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_features, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.float() / 255).square().mean((2, 3))


def write_torchscript_extractor(path: Path, num_features: int = 8) -> Path:
    """Write the module and return the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated in PyTorch
        torch.jit.trace(TinyExtractor(num_features), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).save(str(path))
    return path
