"""The network that tells reconstructions from images, patch by patch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vaetrain.config import PrecisionName
from vaetrain.model.blocks import GroupNorm
from vaetrain.objective.config import AdversarialConfig

SLOPE = 0.2
"""Of the leaky ReLUs below 0."""
INITIAL_STD = 0.02
"""Of its first weights (Isola et al. 2017)."""


class PatchGAN(nn.Sequential):
    """(b, c, h, w) → (b, h', w'), a logit for each of many overlapping patches, above 0 for "an image" (Isola et al. 2017).

    4×4 convolutions: `layers` of stride 2, then two of stride 1. The normalisation knows no batch, so that processes and
    micro-batches cannot change what an image is thought of.
    """

    def __init__(self, config: AdversarialConfig, in_channels: int) -> None:
        widths = [config.channels * min(2**number, 8) for number in range(config.layers + 1)]
        strides = [2] * config.layers + [1]
        modules: list[nn.Module] = []
        for number, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            before = widths[number - 1] if number else in_channels
            modules.append(nn.Conv2d(before, width, 4, stride=stride, padding=1))
            if number and config.norm == "group":
                modules.append(GroupNorm(width))
            modules.append(nn.LeakyReLU(SLOPE))
        modules += [nn.Conv2d(widths[-1], 1, 4, padding=1), nn.Flatten(1, 2)]
        super().__init__(*modules)
        for convolution in (module for module in self if isinstance(module, nn.Conv2d)):
            nn.init.normal_(convolution.weight, std=INITIAL_STD)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            if config.norm == "spectral":
                spectral_norm(convolution)
        super().train(False)  # a forward pass in train mode would move the singular vectors

    def train(self, mode: bool = True) -> PatchGAN:
        """Stays in eval mode, so that singular vectors move once a step, however many forward passes that has."""
        return self

    @torch.no_grad()
    def follow_weights(self) -> None:
        """One power iteration of each singular vector; to be called once after each update, on every process."""
        for module in self:
            if nn.utils.parametrize.is_parametrized(module):
                module.train()
                module.weight  # noqa: B018 - computed when it is asked for, and the vectors with it
                module.eval()


class Opinion(NamedTuple):
    """What the discriminator thinks of images and of their reconstructions."""

    of_images: Float[Tensor, "b h w"]
    """Logits."""
    of_recons: Float[Tensor, "b h w"]
    penalty: Float[Tensor, " b"]
    """|gradient of the image's mean logit by its pixels|², 0 where it is not asked for."""


class Discriminator(nn.Module):
    """A PatchGAN on pairs of image and reconstruction, in the arithmetic of the training, fp32 where that is fp16.

    (fp16 needs its losses scaled, and those of two models by one factor overflow or vanish.)
    """

    def __init__(self, config: AdversarialConfig, in_channels: int, precision: PrecisionName) -> None:
        super().__init__()
        self.net = PatchGAN(config, in_channels)
        self.penalised = config.r1 > 0
        self.in_bf16 = precision == "bf16"

    def forward(self, images: Float[Tensor, "b c h w"], recons: Float[Tensor, "b c h w"]) -> Opinion:
        """Logits in float32 of both, pixels about in [-1, 1]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.in_bf16):
            pixels = images.detach().requires_grad_(self.penalised)
            of_images, of_recons = self.net(pixels).float(), self.net(recons).float()
            penalty = torch.zeros(len(images), device=images.device)
            if self.penalised:
                means = of_images.mean((1, 2)).sum()
                (gradient,) = torch.autograd.grad(means, pixels, create_graph=True)
                penalty = gradient.float().square().sum((1, 2, 3))
        return Opinion(of_images, of_recons, penalty)
