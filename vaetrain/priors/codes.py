"""Latents made of training codes without fitting a density: what one tries first with a plain autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.distributed.randomness import noise_of_images


class MeanCode:
    """The mean of the codes of `num_averaged` training images drawn at random, with replacement ("mean code").

    A code is a posterior mean. Of one image it is that image's reconstruction, of all images always the same latent.
    """

    def __init__(self, latent_shape: tuple[int, ...], codes: Float[Tensor, "n d"], num_averaged: int) -> None:
        self.latent_shape = latent_shape
        self.codes = codes
        self.num_averaged = num_averaged

    def sample(self, seed: int, indices: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "b *latent"]:
        """See `Prior.sample`; equal to the bit whatever the batch. Only temperature 1 has a meaning."""
        if temperature != 1:
            refuse_temperature("mean-code", temperature)
        uniform = uniform_of_images(seed, indices, self.num_averaged)
        # A uniform number may round up to 1.
        chosen = (uniform * len(self.codes)).long().clamp(max=len(self.codes) - 1)
        rows = [self.codes[row].double().mean(0) for row in chosen]
        return torch.stack(rows).float().reshape(-1, *self.latent_shape)

    def log_density(self, z: Float[Tensor, "b d"]) -> None:
        """See `Prior.log_density`: none is fitted."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`."""
        return {"codes": self.codes, "num_averaged": torch.tensor(self.num_averaged)}


class RandomCode:
    """Each latent dimension by itself, uniform between its lowest and its highest training code ("random code").

    A code is a posterior mean. What it ignores, that dimensions depend on each other, is what it is there to show.
    """

    def __init__(self, latent_shape: tuple[int, ...], low: Float[Tensor, " d"], high: Float[Tensor, " d"]) -> None:
        self.latent_shape = latent_shape
        self.low = low
        self.high = high

    def sample(self, seed: int, indices: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "b *latent"]:
        """See `Prior.sample`; equal to the bit whatever the batch. Only temperature 1 has a meaning."""
        if temperature != 1:
            refuse_temperature("random-code", temperature)
        uniform = uniform_of_images(seed, indices, len(self.low))
        return torch.lerp(self.low.double(), self.high.double(), uniform).float().reshape(-1, *self.latent_shape)

    def log_density(self, z: Float[Tensor, "b d"]) -> None:
        """See `Prior.log_density`: none is fitted."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`."""
        return {"low": self.low, "high": self.high}


def uniform_of_images(seed: int, indices: Sequence[int], count: int) -> Float64[Tensor, "b count"]:
    """Uniform numbers in [0, 1]; row i depends on (seed, indices[i]) alone: Φ of a standard normal is uniform."""
    return torch.special.ndtr(noise_of_images(seed, indices, (count,)).double())


def refuse_temperature(prior: str, temperature: float) -> NoReturn:
    """Raise the ValueError of a prior that has no noise to scale."""
    raise ValueError(
        f"--temperature is {temperature:g}, but --prior {prior} has no noise that a temperature could scale; leave it at 1"
    )
