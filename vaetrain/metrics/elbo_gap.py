"""How much better a VAE bounds its training images than others: the ELBO's train-validation gap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int64

from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.randomness import noise_of_images
from vaetrain.metrics.estimate import Estimate
from vaetrain.metrics.subset import choose_images, subset_batches
from vaetrain.model.autoencoder import VAE
from vaetrain.objective.elbo import rate
from vaetrain.upload import upload


@dataclass(frozen=True)
class ElboGap:
    """The same estimate, one latent an image, on as many images of each split; nats per image."""

    train: Estimate
    """ELBO of the training images."""
    val: Estimate
    """ELBO of the validation images."""

    @property
    def gap(self) -> float:
        """ELBO of the training images less that of the validation images: above 0 as far as the model has learned them by heart.

        Several standard errors from 0 it may also say that the splits differ in kind.
        """
        return self.train.mean - self.val.mean

    @property
    def standard_error(self) -> float:
        """Of the gap, both sides being random images."""
        return math.hypot(self.train.standard_error, self.val.standard_error)


def elbo_gap(
    vae: VAE, train_reader: Reader, val_reader: Reader, accelerator: Accelerator, batch_size: int, seed: int
) -> ElboGap:
    """Score as many images of both splits as the smaller one has, drawn by `seed` from the larger. A collective.

    Training images are scored as they are stored, not mirrored. Raises ValueError for a deterministic autoencoder.
    """
    num_images = min(train_reader.num_images, val_reader.num_images)
    train, val = (
        mean_elbo(vae, reader, accelerator, choose_images(reader.num_images, num_images, seed), batch_size, seed)
        for reader in (train_reader, val_reader)
    )
    return ElboGap(train, val)


@torch.no_grad()
def mean_elbo(
    vae: VAE, reader: Reader, accelerator: Accelerator, chosen: Int64[np.ndarray, " n"], batch_size: int, seed: int
) -> Estimate:
    """−distortion − rate of the chosen images, with the noise of `metrics.validation`. A collective."""
    if not vae.config.variational:
        raise ValueError("a deterministic autoencoder (--model.variational False) has no ELBO")
    elbos = [torch.empty(0, dtype=torch.float64, device=accelerator.device)]
    for batch in subset_batches(reader, chosen, batch_size, accelerator.process_index, accelerator.num_processes):
        x = vae.from_uint8(upload(batch.images, accelerator.device)).contiguous(memory_format=torch.channels_last)
        noise = upload(noise_of_images(seed, batch.indices.tolist(), vae.config.latent_shape), x.device)
        with accelerator.autocast():
            terms = vae(x, noise)
        elbos.append(-(terms.distortion + rate(terms.kl)).double())
    return Estimate.of(torch.cat(elbos), accelerator)
