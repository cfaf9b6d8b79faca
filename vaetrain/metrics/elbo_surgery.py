"""ELBO surgery (Hoffman & Johnson 2016): what the rate is spent on.

average rate = I_q(x; z) + KL(q(z) ‖ p(z)),   q(z) = 1/N Σ_i q(z|x_i)        (Hoffman & Johnson 2016, Eq. 6)

The first part is what a latent tells about which of the N images it came from, at most log N; the second is the distance
of the aggregate posterior from the prior, the hole that samples from the prior fall into. It splits once more, into the
KL of every dimension's own aggregate, Σ_d KL(q(z_d) ‖ p(z_d)), and the total correlation (Chen et al. 2018, Eq. 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float64, Int64
from torch import Tensor

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.distributed.randomness import mixed_seed, noise_of_images
from vaetrain.metrics.estimate import Estimate
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.subset import choose_images, subset_batches
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian
from vaetrain.objective.elbo import rate
from vaetrain.progress_bar import counted
from vaetrain.upload import upload

BLOCK = 1024
"""Latents, and posteriors, met at a time: a float64 table of BLOCK × BLOCK and two of BLOCK × 2·dimensions."""

MAX_DIMENSION_LATENTS = 1000
"""Latents at which the dimensions' own aggregates are evaluated: each costs one exponential per image and dimension."""

SURGERY = 2
"""What the noise is for; see `importance_bound.IMPORTANCE`."""

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class ElboSurgery:
    """Means over the N images of the aggregate posterior; nats per image."""

    rate: Estimate
    """KL(q(z|x) ‖ p(z)) in closed form: the sum of the next two, exactly."""
    mutual_information: Estimate
    """I_q(x; z) between the number of an image and its latent."""
    marginal_kl: Estimate
    """KL(q(z) ‖ p(z)) of the mixture of these images' posteriors."""
    dimension_kl_sum: Estimate
    """Σ_d KL(q(z_d) ‖ p(z_d)), over at most `MAX_DIMENSION_LATENTS` latents."""
    dimension_kl: Float64[Tensor, " d"]
    """Its terms, for every dimension of the flattened latent; on the CPU."""

    @property
    def limit(self) -> float:
        """log N, which the mutual information cannot exceed.

        Near it N images do not suffice to measure: for all images of this kind the mutual information is then larger than
        stated, and the marginal KL smaller.
        """
        return math.log(self.rate.num_images)

    @property
    def total_correlation(self) -> float:
        """KL(q(z) ‖ Π_d q(z_d)), what of the marginal KL no single dimension shows; too large where that is."""
        return self.marginal_kl.mean - self.dimension_kl_sum.mean


@torch.no_grad()
def elbo_surgery(
    vae: VAE, reader: Reader, accelerator: Accelerator, config: LikelihoodConfig, batch_size: int
) -> ElboSurgery:
    """Split the average rate over the reader's split; the same for any number of processes. A collective.

    Every process keeps the moments of all N images, 8·N·d bytes for d latent dimensions, and takes an equal part of the
    latents; together 2·N²·d float64 multiply-adds. Raises ValueError for a deterministic autoencoder.
    """
    chosen = choose_images(reader.num_images, config.num_posteriors, config.seed)
    posteriors = gather_posteriors(vae, reader, accelerator, chosen, batch_size)
    mine = np.arange(accelerator.process_index, len(chosen), accelerator.num_processes)
    # Evenly spaced, because neighbours in a split may be of one class.
    spaced = np.linspace(0, len(chosen) - 1, min(len(chosen), MAX_DIMENSION_LATENTS)).round()
    num_dimensions = posteriors.mean.shape[1]
    device = posteriors.mean.device
    rates = torch.zeros(len(mine), dtype=torch.float64, device=device)
    information = torch.zeros_like(rates)
    judged = [torch.zeros(0, num_dimensions, dtype=torch.float64, device=device)]
    # In blocks: noise and latents are float64, and of all images they would outweigh the moments.
    starts = range(0, len(mine), BLOCK)
    for start in counted("mutual information", starts, len(starts), "blocks", quiet=not accelerator.is_main_process):
        rows = mine[start : start + BLOCK]
        block = slice(start, start + len(rows))
        on_device = upload(torch.from_numpy(rows), device)
        own = DiagonalGaussian(posteriors.mean[on_device], posteriors.logvar[on_device])
        rates[block] = rate(own.kl().double())
        for draw in range(config.latents_per_image):
            seed = mixed_seed(config.seed, draw, SURGERY)
            noise = noise_of_images(seed, chosen[rows].tolist(), vae.config.latent_shape).flatten(1)
            noise = upload(noise, device).double()
            z = own.mean + (0.5 * own.logvar.double()).exp() * noise
            log_own = -0.5 * (noise.square() + own.logvar + LOG_2PI).sum(1)
            information[block] += (log_own - log_aggregate(z, posteriors)) / config.latents_per_image
            if draw == 0:
                judged.append(z[upload(torch.from_numpy(np.flatnonzero(np.isin(rows, spaced))), device)])
    z = torch.cat(judged)
    kl = log_dimension_aggregates(z, posteriors) + 0.5 * (z.square() + LOG_2PI)
    return ElboSurgery(
        rate=Estimate.of(rates, accelerator),
        mutual_information=Estimate.of(information, accelerator),
        marginal_kl=Estimate.of(rates - information, accelerator),
        dimension_kl_sum=Estimate.of(kl.sum(1), accelerator),
        dimension_kl=sum_over_processes(accelerator, kl.sum(0) / len(spaced)).cpu(),
    )


def gather_posteriors(
    vae: VAE, reader: Reader, accelerator: Accelerator, chosen: Int64[np.ndarray, " n"], batch_size: int
) -> DiagonalGaussian:
    """q(z|x) of the chosen images in their order, latents flattened, on every process's device. A collective."""
    num_dimensions = math.prod(vae.config.latent_shape)
    moments = torch.zeros(2, len(chosen), num_dimensions, device=accelerator.device)
    for batch in subset_batches(reader, chosen, batch_size, accelerator.process_index, accelerator.num_processes):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            posterior = vae.encode(x)
        if not isinstance(posterior, DiagonalGaussian):
            raise ValueError("a deterministic autoencoder (--model.variational False) has no posterior density")
        rows = upload(torch.from_numpy(np.searchsorted(chosen, batch.indices.cpu().numpy())), accelerator.device)
        moments[:, rows] = torch.stack([posterior.mean.flatten(1), posterior.logvar.flatten(1)])
    # Each row is written by one process and zero in the others: the sum is exact, and in the order of the images.
    return DiagonalGaussian(*sum_over_processes(accelerator, moments))


def log_aggregate(z: Float64[Tensor, "m d"], posteriors: DiagonalGaussian) -> Float64[Tensor, " m"]:
    """log 1/N Σ_i q(z|x_i) in nats at each latent."""
    log_sum = torch.full((len(z),), -torch.inf, dtype=torch.float64, device=z.device)
    for mean, logvar in zip(posteriors.mean.split(BLOCK), posteriors.logvar.split(BLOCK), strict=True):
        # −½ Σ_d (z − μ)²/σ² as one matrix product: [z², z] · [−1/2σ², μ/σ²] and a constant for each posterior. In
        # float32 the three large terms of a narrow posterior would cancel to nothing.
        mean, logvar = mean.double(), logvar.double()
        precision = (-logvar).exp()
        weights = torch.cat([-0.5 * precision, mean * precision], dim=1).T
        constant = -0.5 * (mean.square() * precision + logvar + LOG_2PI).sum(1)
        for rows in torch.arange(len(z), device=z.device).split(BLOCK):
            log_density = torch.cat([z[rows].square(), z[rows]], dim=1) @ weights + constant
            log_sum[rows] = log_sum[rows].logaddexp(log_density.logsumexp(1))
    return log_sum - math.log(len(posteriors.mean))


def log_dimension_aggregates(z: Float64[Tensor, "m d"], posteriors: DiagonalGaussian) -> Float64[Tensor, "m d"]:
    """log 1/N Σ_i q(z_d|x_i) in nats for each dimension of each latent."""
    log_sum = torch.full_like(z, -torch.inf)
    num_posteriors, num_dimensions = posteriors.mean.shape
    # As many posteriors at a time as fill a table of BLOCK × BLOCK.
    at_a_time = max(1, BLOCK**2 // num_dimensions)
    for mean, logvar in zip(posteriors.mean.split(at_a_time), posteriors.logvar.split(at_a_time), strict=True):
        scale, constant = (-0.5 * logvar.double()).exp(), -0.5 * (logvar.double() + LOG_2PI)
        for row, latent in enumerate(z):
            log_density = constant - 0.5 * ((latent - mean) * scale).square()
            log_sum[row] = log_sum[row].logaddexp(log_density.logsumexp(0))
    return log_sum - math.log(num_posteriors)
