"""The aggregate posterior q(z) = mean over training images of q(z|x), gathered in one pass that all processes share.

Every process encodes its share of the chosen images; their posteriors come together in the split's order, and all that is
fitted is computed from those in one process. So a fit is the same to the bit for any number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed import processes
from vaetrain.distributed.randomness import mixed_seed
from vaetrain.metrics.split_pass import pass_over
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian
from vaetrain.priors.config import PriorFitConfig
from vaetrain.upload import upload

MAX_CODE_NUMBERS = 2**27
"""Latent numbers kept of a split, 512 MiB for means and as much for deviations: of larger latents fewer images."""

BATCH_SIZE = 64
"""Images read at a time; fixed, because a convolution may round differently in another batch."""

SELECTION, HELD_OUT = 21, 22  # what the randomness is for


@dataclass(frozen=True)
class Posteriors:
    """q(z|x) of some images: diagonal Gaussians, latents flattened; a point mass has deviation 0."""

    mean: Float[Tensor, "n d"]
    std: Float[Tensor, "n d"]

    def sample(self, seed: int) -> Float[Tensor, "n d"]:
        """One latent z ~ q(z|x) per image; the images' order matters. The same on every device."""
        noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(seed))
        return self.mean + self.std * noise.to(self.mean.device)

    def every_other(self, first: int) -> Posteriors:
        """Those at `first`, `first` + 2, …"""
        return Posteriors(self.mean[first::2], self.std[first::2])

    def to(self, device: torch.device) -> Posteriors:
        """The same on another device."""
        return Posteriors(self.mean.to(device), self.std.to(device))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.mean)


@dataclass(frozen=True)
class AggregatePosterior:
    """What priors are fitted to: posteriors of training images, and of validation images that choose and judge."""

    latent_shape: tuple[int, ...]
    train: Posteriors
    val: Posteriors

    def mean(self) -> Float64[Tensor, " d"]:
        """Mean of q(z)."""
        return self.train.mean.double().mean(0)

    def covariance_of_means(self) -> Float64[Tensor, "d d"]:
        """Covariance of the posterior means (n − 1)."""
        return torch.cov(self.train.mean.double().T).reshape(*2 * self.train.mean.shape[1:])

    def mean_variances(self) -> Float64[Tensor, " d"]:
        """Mean posterior variance of each dimension."""
        return self.train.std.double().square().mean(0)

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Covariance of q(z): that of the means, and on the diagonal the mean posterior variances."""
        return self.covariance_of_means() + self.mean_variances().diag()

    def to(self, device: torch.device) -> AggregatePosterior:
        """The same on another device, where priors are then fitted."""
        return AggregatePosterior(self.latent_shape, self.train.to(device), self.val.to(device))

    def selection_codes(self, seed: int) -> Float[Tensor, "m d"]:
        """Latents of every other validation image, by which sizes are chosen and training is stopped."""
        return self.val.every_other(0).sample(mixed_seed(seed, SELECTION))

    def heldout_codes(self, seed: int) -> Float[Tensor, "m d"]:
        """Latents of the other half, which no fit has seen: the reported likelihood is theirs."""
        return self.val.every_other(1).sample(mixed_seed(seed, HELD_OUT))


@torch.no_grad()
def gather_aggregate(
    vae: VAE, train_reader: Reader, val_reader: Reader, accelerator: Accelerator, config: PriorFitConfig
) -> AggregatePosterior:
    """Encode both splits once, in fp32 and unmirrored. A collective; every process gets the whole result.

    Raises ValueError when a split has fewer than two images.
    """
    for reader, split in ((train_reader, "train"), (val_reader, "val")):
        if reader.num_images < 2:
            raise ValueError(f"the {split} split has {reader.num_images} image(s); fitting a prior takes at least 2")
    return AggregatePosterior(
        latent_shape=vae.config.latent_shape,
        train=encode(vae, train_reader, accelerator, config, what="encoding training images"),
        val=encode(vae, val_reader, accelerator, config, what="encoding validation images"),
    )


def encode(vae: VAE, reader: Reader, accelerator: Accelerator, config: PriorFitConfig, *, what: str) -> Posteriors:
    """Posteriors of at most `num_codes` images of a split, drawn by the seed, in the split's order. A collective."""
    num_dims = math.prod(vae.config.latent_shape)
    num_kept = min(reader.num_images, config.num_codes, max(2, MAX_CODE_NUMBERS // num_dims))
    wanted = torch.zeros(reader.num_images, dtype=torch.bool)
    rng = np.random.default_rng(config.seed)
    wanted[torch.from_numpy(rng.choice(reader.num_images, num_kept, replace=False))] = True
    indices = [torch.empty(0, dtype=torch.int64)]
    moments = [torch.empty(0, 2, num_dims)]
    for batch in pass_over(what, reader, accelerator, BATCH_SIZE):
        chosen = wanted[batch.indices.cpu()]
        if chosen.any():
            indices.append(batch.indices.cpu()[chosen])
            rows = upload(chosen.nonzero().flatten(), batch.images.device)
            moments.append(posterior_moments(vae, upload(batch.images[rows], accelerator.device)))
    everyones = processes.gather_by_index(accelerator, torch.cat(indices), torch.cat(moments))
    return Posteriors(everyones[:, 0].contiguous(), everyones[:, 1].contiguous())


def posterior_moments(vae: VAE, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 2 d"]:
    """Mean and standard deviation of q(z|x), flattened, on the CPU; a deterministic autoencoder's deviation is 0."""
    posterior = vae.encode(vae.from_uint8(images).contiguous(memory_format=torch.channels_last))
    mean = posterior.mean.flatten(1)
    if isinstance(posterior, DiagonalGaussian):
        return torch.stack([mean, (0.5 * posterior.logvar).exp().flatten(1)], dim=1).cpu()
    return torch.stack([mean, torch.zeros_like(mean)], dim=1).cpu()
