"""LPIPS (Zhang et al. 2018): how far apart two images look, by the features of a network trained on ImageNet.

    d(x, y) = Σ_l mean over positions of w_l · (φ̂_l(x) − φ̂_l(y))²           (Zhang et al. 2018, Eq. 1)

φ̂_l are the features after a ReLU of layer l, scaled to length 1 at every position; w_l ≥ 0 were fitted to human judgements.
The backbone is torchvision's; both weight files are the user's, read as tensors and nothing else.

torch-fidelity's own LPIPS downloads its weights in its constructor and knows only VGG, torchmetrics' normalises features
otherwise than the authors' code, and that one has not been released since 2021; the distance itself is the few lines below.
"""

from __future__ import annotations

import torch
import torchvision
from accelerate import Accelerator
from jaxtyping import Float, Float32
from torch import Tensor, nn

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.arithmetic import ieee_fp32
from vaetrain.metrics.estimate import Estimate
from vaetrain.metrics.lpips_config import BACKBONES, LpipsConfig, how_to_get_weights
from vaetrain.metrics.split_pass import pass_over
from vaetrain.metrics.weights import read_weights
from vaetrain.model.autoencoder import VAE
from vaetrain.upload import upload

# ImageNet's mean and standard deviation of each channel for pixels in [-1, 1], in the digits of the authors' code.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

EPSILON = 1e-8
"""Added to the squared length of features, so that its root has a gradient at 0. VGG16's is hundreds and more: no score changes."""


class PerceptualDistance(nn.Module):
    """LPIPS of pairs of images; float32 whatever surrounds it. Its weights are constants; the images may have gradients.

    Attributes: `backbone_sha256` and `heads_sha256` of the files, for a score's record.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: LpipsConfig, options: str = "--lpips") -> None:
        """Build the network from the two files, which the user named as `options`.backbone and .heads.

        Raises FileNotFoundError or ValueError, saying which file to put where, if one is missing, holds anything but
        tensors, or belongs to another network.
        """
        super().__init__()
        self.backbone = BACKBONES[config.net]
        remedy = how_to_get_weights(config.net, options)
        with torch.device("meta"):  # the classifier that follows the features has 500 MB, and would be initialised
            features: nn.Sequential = getattr(torchvision.models, self.backbone.name)(weights=None).features
        state, self.backbone_sha256 = read_weights(config.backbone, f"{options}.backbone", remedy)
        weights = {
            name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")
        }
        try:
            features.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{config.backbone} does not hold torchvision's {self.backbone.name}. {remedy}") from error
        starts = (0, *self.backbone.ends)
        self.layers = nn.ModuleList(features[start:end] for start, end in zip(starts, self.backbone.ends, strict=False))

        state, self.heads_sha256 = read_weights(config.heads, f"{options}.heads", remedy)
        shapes = {
            f"lin{number}.model.1.weight": (1, channels, 1, 1) for number, channels in enumerate(self.backbone.channels)
        }
        if {name: tuple(value.shape) for name, value in state.items()} != shapes:
            raise ValueError(f"{config.heads} does not hold the LPIPS heads of {config.net}. {remedy}")
        self.heads = nn.ParameterList(state[name].float().view(1, -1, 1, 1) for name in shapes)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, recon: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"]) -> Float32[Tensor, " b"]:
        """LPIPS of each pair of [0, 1] images with 3 channels or, repeated to 3, one; at the images' own resolution.

        Raises ValueError for images that the backbone's strides leave nothing of.
        """
        if min(x.shape[-2:]) < self.backbone.min_size:
            raise ValueError(
                f"LPIPS through {self.backbone.name} needs images of at least {self.backbone.min_size} pixels a side and these "
                f"are {x.shape[-2]}×{x.shape[-1]}; use --lpips.net vgg from {BACKBONES['vgg'].min_size} pixels on"
            )
        distance = torch.zeros(len(x), device=x.device)
        # A distance is a difference of nearly equal features: neither bf16 nor TF32, which is cuDNN's default.
        with ieee_fp32(x.device):
            a, b = ((2 * image.float() - 1 - self.shift) / self.scale for image in (recon, x))
            for layer, head in zip(self.layers, self.heads, strict=True):
                a, b = layer(a), layer(b)
                distance = distance + (head * (unit_length(a) - unit_length(b)).square()).sum(1).mean((1, 2))
        return distance


def unit_length(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale the features of each position to length 1; all zeros stay so, with a finite gradient."""
    return features * (features.square().sum(1, keepdim=True) + EPSILON).rsqrt()


@torch.no_grad()
def reconstruction_lpips(
    vae: VAE, reader: Reader, accelerator: Accelerator, distance: PerceptualDistance, batch_size: int
) -> Estimate:
    """Mean LPIPS over every image of the reader's split, between image and decoded posterior mode. A collective."""
    distances = [torch.empty(0, dtype=torch.float64, device=accelerator.device)]
    for batch in pass_over("LPIPS", reader, accelerator, batch_size):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            recon = vae.reconstruct(x)
        distances.append(distance(vae.likelihood.to_unit(recon), vae.likelihood.to_unit(x)).double())
    return Estimate.of(torch.cat(distances), accelerator)
