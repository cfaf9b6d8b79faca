"""LPIPS weight files drawn at random: every step runs, and no number that comes out is an LPIPS."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import nn

from vaetrain.metrics.lpips_config import BACKBONES, LpipsConfig


def write_random_lpips_weights(folder: Path, net: Literal["alex", "vgg"]) -> LpipsConfig:
    """Write a backbone's convolutions, as torchvision names them, and five heads; returns the config that names them."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        features = getattr(torchvision.models, BACKBONES[net].name)(weights=None).features
    features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, std=0.1, generator=generator)
    heads = {
        f"lin{number}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for number, channels in enumerate(BACKBONES[net].channels)
    }
    config = LpipsConfig(net, folder / f"{net}-backbone.pth", folder / f"{net}-heads.pth")
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, config.backbone)
    torch.save(heads, config.heads)
    return config
