"""Active units (Burda et al. 2016): the latent dimensions that say something about the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float64, Int64
from torch import Tensor

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.metrics.split_pass import pass_over
from vaetrain.model.autoencoder import VAE
from vaetrain.upload import upload

THRESHOLD = 0.01
"""Variance of the posterior mean above which a dimension is active (Burda et al. 2016, App. C, who found the two groups
far apart)."""


@dataclass(frozen=True)
class LatentActivity:
    """One number for each dimension of the latent, in its shape; float64 on the CPU."""

    mean: Float64[Tensor, " *latent"]
    """Mean over images of the posterior mean."""
    variance: Float64[Tensor, " *latent"]
    """Variance over images of the posterior mean, unbiased."""
    kl: Float64[Tensor, " *latent"]
    """Mean over images of KL(q(z_d|x) ‖ p(z_d)) in nats; they sum to the average rate. Zeros for a deterministic autoencoder."""

    @property
    def active_units(self) -> int:
        """Dimensions whose variance exceeds `THRESHOLD`; in a spatial latent every channel of every position counts."""
        return int((self.variance > THRESHOLD).sum())

    def most_active(self, num_units: int) -> Int64[Tensor, " n"]:
        """Positions in the flattened latent of the dimensions of largest variance, largest first."""
        return self.variance.flatten().sort(descending=True, stable=True).indices[:num_units]


@torch.no_grad()
def latent_activity(vae: VAE, reader: Reader, accelerator: Accelerator, batch_size: int) -> LatentActivity:
    """Mean and variance of the posterior mean, and mean KL, over every image of the reader's split. A collective.

    The same for any number of processes. Raises ValueError for a split of fewer than 2 images.
    """
    count = 0
    mean, squares, kl = torch.zeros(
        3, math.prod(vae.config.latent_shape), dtype=torch.float64, device=accelerator.device
    )
    for batch in pass_over("active units", reader, accelerator, batch_size):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            posterior = vae.encode(x)
        kl += posterior.kl().flatten(1).double().sum(0)
        codes = posterior.mode().flatten(1).double()
        # Chan et al. 1979: batches merge by their means and squared deviations, so that no large sums cancel.
        batch_mean, distance = codes.mean(0), codes.mean(0) - mean
        squares += (codes - batch_mean).square().sum(0) + distance.square() * count * len(codes) / (count + len(codes))
        count += len(codes)
        mean += distance * len(codes) / count
    # The processes merge in the same way.
    sums = sum_over_processes(accelerator, torch.cat([mean * count, kl, mean.new_full((1,), count)]))
    num_images = int(sums[-1].item())
    if num_images < 2:
        raise ValueError(f"a variance over images needs at least 2 of them; the split has {num_images}")
    overall_mean, overall_kl = sums[:-1].view(2, -1) / num_images
    squares = sum_over_processes(accelerator, squares + count * (mean - overall_mean).square())
    shape = vae.config.latent_shape
    return LatentActivity(
        mean=overall_mean.view(shape).cpu(),
        variance=(squares / (num_images - 1)).view(shape).cpu(),
        kl=overall_kl.view(shape).cpu(),
    )
