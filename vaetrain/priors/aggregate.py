"""The aggregate posterior q(z) = mean over training images of q(z|x), gathered in one pass that all processes share.

Exact, to the bit, for any number of processes: the posteriors of the chosen images, the ranges of the codes, hence every
prior fitted to those. Up to the rounding of float64 sums: mean and covariance over all images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from tqdm import tqdm

from vaetrain import distributed
from vaetrain.data.reader import Reader
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian
from vaetrain.priors.config import PriorFitConfig
from vaetrain.randomness import mixed_seed

MAX_COVARIANCE_DIMS = 4096
"""Latent dimensions up to which a full covariance is kept: 128 MiB in float64 and some 20 s for its eigenvectors."""

MAX_CODE_NUMBERS = 2**27
"""Latent numbers kept of the chosen images, 512 MiB for means and as much for deviations: larger latents, fewer images."""

BATCH_SIZE = 64
"""Fixed, because a convolution may round differently in another batch."""


SELECTION, HELD_OUT = 21, 22  # what the randomness is for


@dataclass(frozen=True)
class Posteriors:
    """q(z|x) of some images: diagonal Gaussians, latents flattened; a point mass has deviation 0."""

    mean: Float[Tensor, "n d"]
    std: Float[Tensor, "n d"]

    def sample(self, seed: int) -> Float[Tensor, "n d"]:
        """One latent z ~ q(z|x) per image; the images' order matters."""
        noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(seed))
        return self.mean + self.std * noise

    def every_other(self, first: int) -> Posteriors:
        """Those at `first`, `first` + 2, …"""
        return Posteriors(self.mean[first::2], self.std[first::2])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.mean)


@dataclass(frozen=True)
class AggregatePosterior:
    """What priors are fitted to. Latents are flattened to d numbers."""

    latent_shape: tuple[int, ...]
    num_images: int
    """Training images, all of which enter the four statistics below."""
    mean: Float64[Tensor, " d"]
    """Mean of q(z)."""
    covariance_of_means: Float64[Tensor, "d d"] | None
    """Covariance of the posterior means (n − 1); None beyond MAX_COVARIANCE_DIMS."""
    mean_variance: Float64[Tensor, " d"]
    """Mean posterior variance. Added to the diagonal above it gives the covariance of q(z)."""
    low: Float[Tensor, " d"]
    """Smallest posterior mean in each dimension."""
    high: Float[Tensor, " d"]
    """Largest posterior mean in each dimension."""
    train: Posteriors
    """Of the chosen training images."""
    val: Posteriors
    """Of the chosen validation images; nothing is fitted to them."""

    def selection_codes(self, seed: int) -> Float[Tensor, "m d"]:
        """Latents of every other validation image, by which sizes are chosen and training is stopped."""
        return self.val.every_other(0).sample(mixed_seed(seed, SELECTION))

    def heldout_codes(self, seed: int) -> Float[Tensor, "m d"]:
        """Latents of the other half, which no fit has seen: the reported likelihood is theirs."""
        return self.val.every_other(1).sample(mixed_seed(seed, HELD_OUT))


class CodeStatistics:
    """Sums of posterior moments over this process's images, float64; what `AggregatePosterior` says of all images."""

    def __init__(self, num_dims: int, device: torch.device) -> None:
        side = num_dims if num_dims <= MAX_COVARIANCE_DIMS else 0
        self.sum = torch.zeros(num_dims, dtype=torch.float64, device=device)
        self.sum_of_variances = torch.zeros_like(self.sum)
        self.outer = torch.zeros(side, side, dtype=torch.float64, device=device)
        self.low = torch.full_like(self.sum, math.inf)
        self.high = torch.full_like(self.sum, -math.inf)

    def update(self, mean: Float[Tensor, "b d"], std: Float[Tensor, "b d"]) -> None:
        """Add a batch."""
        m = mean.double()
        self.sum += m.sum(0)
        self.sum_of_variances += std.double().square().sum(0)
        if self.outer.numel():
            self.outer.addmm_(m.T, m)
        self.low = torch.minimum(self.low, m.amin(0))
        self.high = torch.maximum(self.high, m.amax(0))

    def reduce(self, accelerator: Accelerator) -> None:
        """Make them those of all processes; a collective."""
        for name in ("sum", "sum_of_variances", "outer"):
            setattr(self, name, distributed.sum_over_processes(accelerator, getattr(self, name)))
        extremes = distributed.max_over_processes(accelerator, torch.cat([self.high, -self.low]).tolist())
        self.high, lowest = torch.tensor(extremes, dtype=torch.float64).chunk(2)
        self.low = -lowest


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
    statistics = CodeStatistics(math.prod(vae.config.latent_shape), accelerator.device)
    train = encode(vae, train_reader, accelerator, config, statistics, what="encoding training images")
    val = encode(vae, val_reader, accelerator, config, what="encoding validation images")
    statistics.reduce(accelerator)
    n = train_reader.num_images
    mean = statistics.sum / n
    covariance = (statistics.outer - n * mean.outer(mean)) / (n - 1) if statistics.outer.numel() else None
    return AggregatePosterior(
        latent_shape=vae.config.latent_shape,
        num_images=n,
        mean=mean.cpu(),
        covariance_of_means=None if covariance is None else covariance.cpu(),
        mean_variance=(statistics.sum_of_variances / n).cpu(),
        low=statistics.low.float(),
        high=statistics.high.float(),
        train=train,
        val=val,
    )


def encode(
    vae: VAE,
    reader: Reader,
    accelerator: Accelerator,
    config: PriorFitConfig,
    statistics: CodeStatistics | None = None,
    *,
    what: str,
) -> Posteriors:
    """Posteriors of at most `num_codes` images of a split, drawn by the seed, in the split's order. A collective."""
    num_dims = math.prod(vae.config.latent_shape)
    num_kept = min(reader.num_images, config.num_codes, max(2, MAX_CODE_NUMBERS // num_dims))
    kept = np.zeros(reader.num_images, dtype=bool)
    kept[np.random.default_rng(config.seed).choice(reader.num_images, num_kept, replace=False)] = True
    wanted = torch.from_numpy(kept)
    indices = [torch.empty(0, dtype=torch.int64)]
    moments = [torch.empty(0, 2, num_dims)]
    batches = reader.eval_batches(BATCH_SIZE, accelerator.process_index, accelerator.num_processes)
    num_batches = -(-reader.num_images // (BATCH_SIZE * accelerator.num_processes))
    for batch in tqdm(
        batches, desc=what, total=num_batches, unit="batch", disable=None if accelerator.is_main_process else True
    ):
        mean, std = posterior_moments(vae, batch.images.to(accelerator.device))
        if statistics is not None:
            statistics.update(mean, std)
        chosen = batch.indices.cpu()[wanted[batch.indices.cpu()]]
        indices.append(chosen)
        moments.append(torch.stack([mean, std], dim=1).cpu()[wanted[batch.indices.cpu()]])
    everyones = distributed.gather_by_index(accelerator, torch.cat(indices), torch.cat(moments))
    return Posteriors(everyones[:, 0].contiguous(), everyones[:, 1].contiguous())


def posterior_moments(vae: VAE, images: UInt8[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """Mean and standard deviation of q(z|x), flattened; a deterministic autoencoder's deviation is 0."""
    x = vae.from_uint8(images).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(x)
    mean = posterior.mean.flatten(1)
    if isinstance(posterior, DiagonalGaussian):
        return mean, (0.5 * posterior.logvar).exp().flatten(1)
    return mean, torch.zeros_like(mean)
