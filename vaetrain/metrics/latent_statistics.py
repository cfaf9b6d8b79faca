"""Mean and standard deviation of the latents of a split: what a second stage normalises them with.

Of z ~ q(z|x), not of its mean: E[z] = E[μ], Var z = E[μ² + σ²] − E[μ]², in closed form, so that nothing is drawn. Over every
image of the split and every position of a spatial latent, on all processes, in float64 (latent diffusion's 0.18215 is 1/σ of
one batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from einops import rearrange

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.metrics.split_pass import pass_over
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian
from vaetrain.upload import upload


@dataclass(frozen=True)
class LatentStatistics:
    """Of z ~ q(z|x) over a split."""

    num_images: int
    mean: float
    """Over channels, too."""
    std: float
    """About `mean`, over channels, too."""
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    """About each channel's own mean."""


@torch.no_grad()
def latent_statistics(vae: VAE, reader: Reader, accelerator: Accelerator, batch_size: int) -> LatentStatistics:
    """Statistics over the reader's split, each image once, the same for any number of processes to float64's rounding.

    A collective. The channels of a vector latent are its dimensions; a deterministic autoencoder's σ is 0.
    """
    # Per channel: Σ μ, Σ μ² + σ², and how many of them.
    sums = torch.zeros(3, vae.config.latent_channels, dtype=torch.float64, device=accelerator.device)
    for batch in pass_over("statistics of the latents", reader, accelerator, batch_size):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x)
        mean = rearrange(posterior.mean.double(), "b c ... -> c (b ...)")
        squares = mean.square()
        if isinstance(posterior, DiagonalGaussian):
            squares = squares + rearrange(posterior.logvar.double().exp(), "b c ... -> c (b ...)")
        sums += torch.stack([mean.sum(1), squares.sum(1), torch.full_like(mean[:, 0], mean.shape[1])])
    sums = sum_over_processes(accelerator, sums).cpu()
    first, second, count = sums
    channel_mean, square = first / count, second / count
    channel_std = (square - channel_mean.square()).clamp(min=0).sqrt()
    mean_of_all = channel_mean.mean()
    std_of_all = (square.mean() - mean_of_all.square()).clamp(min=0).sqrt()
    return LatentStatistics(
        num_images=reader.num_images,
        mean=float(mean_of_all),
        std=float(std_of_all),
        channel_mean=tuple(channel_mean.tolist()),
        channel_std=tuple(channel_std.tolist()),
    )
