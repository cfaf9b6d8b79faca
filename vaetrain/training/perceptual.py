"""The perceptual term of the loss: LPIPS between each training image and its reconstruction.

    params ──likelihood.raw_mean──> recon in the pixel range, not clamped ──to [0, 1], enlarged if asked──> LPIPS

The network is a constant: frozen, in eval mode, outside DDP and the checkpoints. Its gradient goes to the VAE through `recon`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from vaetrain.config import Config
from vaetrain.metrics.lpips_config import PERCEPTUAL, LpipsConfig, check_perceptual
from vaetrain.metrics.perceptual_distance import PerceptualDistance
from vaetrain.model.autoencoder import ElboTerms
from vaetrain.model.likelihood import Likelihood
from vaetrain.objective.config import PerceptualConfig


class PerceptualTerm:
    """LPIPS of each image, in fp32 whatever the network's arithmetic (a `LossTerm`)."""

    name = "perceptual"
    names = ("lpips",)

    def __init__(self, config: PerceptualConfig, likelihood: Likelihood, device: torch.device) -> None:
        """Load the two files; raises FileNotFoundError or ValueError if one is missing or holds something else."""
        self.weight = config.weight
        self.resize = config.resize
        self.likelihood = likelihood
        files = LpipsConfig(config.net, config.backbone, config.heads)
        self.distance = PerceptualDistance(files, PERCEPTUAL).to(device)
        self.made_of: Mapping[str, str] = {
            "backbone_sha256": self.distance.backbone_sha256, "heads_sha256": self.distance.heads_sha256,
        }  # fmt: skip

    def __call__(self, x: Float[Tensor, "b c h w"], terms: ElboTerms) -> Float32[Tensor, " b"]:
        """LPIPS of each image, whose gradient reaches pixels beyond the range, too."""
        low, high = self.likelihood.pixel_range
        recon, image = ((each - low) / (high - low) for each in (self.likelihood.raw_mean(terms.params), x))
        return self.lpips(recon, image)

    def compare(self, recon: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"]) -> tuple[Float32[Tensor, " b"]]:
        """LPIPS, for validation (a `Comparison`)."""
        return (self.lpips(recon, image),)

    def lpips(self, recon: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"]) -> Float32[Tensor, " b"]:
        """LPIPS of images on the [0, 1] scale, enlarged to `resize`."""
        if self.resize is not None:
            recon, image = (
                F.interpolate(each.float(), size=(self.resize,) * 2, mode="bilinear") for each in (recon, image)
            )
        distance: Tensor = self.distance(recon, image)
        return distance


def loss_terms(config: Config, likelihood: Likelihood, device: torch.device) -> tuple[PerceptualTerm, ...]:
    """The terms beyond the ELBO whose weight is not 0; raises what `check_perceptual` and `PerceptualTerm` do."""
    perceptual = config.objective.perceptual
    check_perceptual(perceptual, config.model.image_size)
    return (PerceptualTerm(perceptual, likelihood, device),) if perceptual.weight else ()
