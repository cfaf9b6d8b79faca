"""The importance-weighted bound on log p(x) (Burda et al. 2016), streamed in bounded memory.

log p(x) ≥ L_k(x) = E[log 1/k Σ_j w_j],  w_j = p(x|z_j) p(z_j) / q(z_j|x),  z_j ~ q(z|x)   (Burda et al. 2016, Eq. 8)

L_1 is the ELBO, L_k never falls as k grows, and it reaches log p(x) in the limit, at once where q(z|x) is p(z|x). An image
is encoded once; its weights are never kept, only log Σ w and log Σ w².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.randomness import mixed_seed, noise_of_images
from vaetrain.metrics.estimate import Estimate
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.subset import choose_images, subset_batches
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian
from vaetrain.progress_bar import counted
from vaetrain.upload import upload

BLOCK = 50
"""Latents of an image whose noise is drawn at once: sample j is row j mod BLOCK of block j // BLOCK, however many are decoded
at a time. Seeding a generator for every sample would cost more than decoding it on a GPU."""

IMPORTANCE = 1
"""What the noise is for; the ELBO's own draws (seed, image)."""


@dataclass(frozen=True)
class ImportanceBound:
    """Means over images; nats per image."""

    bounds: dict[int, Estimate]
    """k → L_k, all from the same samples."""
    elbo: Estimate
    """The mean of log w over all samples: the ELBO of the same images, with less noise than one sample has."""
    gain: Estimate
    """L_k − ELBO at the largest k. Images differ far more in L_k than in this, so −(ELBO of the whole split + gain) is a
    sharper estimate of the split's negative log-likelihood than that of few images alone."""
    effective_samples: Estimate
    """(Σ w)² / Σ w² at the largest k, between 1 and k. Near 1 a single latent decides and the bound is loose."""

    @property
    def num_samples(self) -> int:
        """The largest k."""
        return max(self.bounds)

    @property
    def log_prob(self) -> Estimate:
        """L_k at the largest k."""
        return self.bounds[self.num_samples]


@torch.no_grad()
def importance_bound(vae: VAE, reader: Reader, accelerator: Accelerator, config: LikelihoodConfig) -> ImportanceBound:
    """Bound log p(x) of the chosen images of the reader's split; the same for any number of processes. A collective.

    Every process reads the split and takes an equal part of the choice: reading is nothing beside the decoder's work.
    Raises ValueError for a deterministic autoencoder, whose posterior has no density.
    """
    chosen = choose_images(reader.num_images, config.num_images, config.seed)
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    images_at_a_time = max(1, config.batch_size // BLOCK)
    columns = len(config.sample_counts) + 2
    scores = [torch.empty(0, columns, dtype=torch.float64, device=accelerator.device)]
    batches = subset_batches(reader, mine, images_at_a_time)
    quiet = not accelerator.is_main_process
    for batch in counted("bound on log p(x)", batches, len(mine), size=lambda each: len(each.indices), quiet=quiet):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            scores.append(image_scores(vae, x, batch.indices.tolist(), config))
    *bounds, elbo, effective_samples = torch.cat(scores).unbind(1)
    return ImportanceBound(
        bounds={
            k: Estimate.of(bound, accelerator) for k, bound in zip(config.sample_counts, bounds, strict=True)
        },
        elbo=Estimate.of(elbo, accelerator),
        gain=Estimate.of(bounds[-1] - elbo, accelerator),
        effective_samples=Estimate.of(effective_samples, accelerator),
    )  # fmt: skip


def image_scores(
    vae: VAE, x: Float[Tensor, "b c h w"], indices: Sequence[int], config: LikelihoodConfig
) -> Float64[Tensor, "b columns"]:
    """Per image: L_k in nats for each of `config.sample_counts`, the mean of log w in nats, the effective samples."""
    posterior = vae.encode(x)
    if not isinstance(posterior, DiagonalGaussian):
        raise ValueError("a deterministic autoencoder (--model.variational False) bounds no likelihood")
    log_sum = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    log_sum_of_squares, total = log_sum.clone(), torch.zeros_like(log_sum)
    bounds: list[Tensor] = []
    for start in range(0, config.num_samples, BLOCK):
        noise = noise_of_images(
            mixed_seed(config.seed, start // BLOCK, IMPORTANCE), indices, (BLOCK, *vae.config.latent_shape)
        )
        noise = upload(noise[:, : config.num_samples - start], x.device)
        log_w = log_weights(vae, x, posterior, noise, config.batch_size)
        running = torch.cat([log_sum[:, None], log_w], dim=1).logcumsumexp(dim=1)
        bounds += [
            running[:, k - start] - math.log(k) for k in config.sample_counts if start < k <= start + log_w.shape[1]
        ]
        log_sum = running[:, -1]
        log_sum_of_squares = log_sum_of_squares.logaddexp((2 * log_w).logsumexp(dim=1))
        total += log_w.sum(dim=1)
    effective_samples = (2 * log_sum - log_sum_of_squares).exp()
    return torch.stack([*bounds, total / config.num_samples, effective_samples], dim=1)


def log_weights(
    vae: VAE,
    x: Float[Tensor, "b c h w"],
    posterior: DiagonalGaussian,
    noise: Float[Tensor, "b m *latent"],
    batch_size: int,
) -> Float64[Tensor, "b m"]:
    """log p(x|z) + log p(z) − log q(z|x) in nats at z = mean + σ·noise, `batch_size` latents decoded at a time."""
    mean, logvar = posterior.mean.unsqueeze(1), posterior.logvar.unsqueeze(1)
    z = mean + (0.5 * logvar).exp() * noise
    # Two densities of z whose normalising constants cancel, in float64: each is a sum over thousands of dimensions.
    log_ratio = 0.5 * (noise.double().square() + logvar - z.double().square()).flatten(2).sum(dim=2)
    image_of_latent = repeat(torch.arange(len(x), device=x.device), "b -> (b m)", m=noise.shape[1])
    latents = rearrange(z, "b m ... -> (b m) ...")
    log_likelihoods = [
        vae.likelihood.log_prob(vae.decoder(some), x[images])
        for some, images in zip(latents.split(batch_size), image_of_latent.split(batch_size), strict=True)
    ]
    return log_ratio + torch.cat(log_likelihoods).double().view_as(log_ratio)
