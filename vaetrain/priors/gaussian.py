"""Priors that are densities of white coordinates, and the simplest of them, a Gaussian."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.distributed.randomness import noise_of_images
from vaetrain.model.prior import standard_normal_log_density
from vaetrain.priors.whitening import Whitening


class WhitePrior(ABC):
    """A density of white coordinates, carried to latents by a `Whitening`."""

    def __init__(self, latent_shape: tuple[int, ...], whitening: Whitening) -> None:
        self.latent_shape = latent_shape
        self.whitening = whitening

    @torch.no_grad()
    def sample(self, seed: int, indices: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "b *latent"]:
        """See `Prior.sample`."""
        # The last number picks a mixture's component.
        noise = noise_of_images(seed, indices, (len(self.whitening.mean) + 1,))
        w = self.draw(temperature * noise[:, :-1], torch.special.ndtr(noise[:, -1].double()))
        return self.whitening.unwhiten(w).float().reshape(-1, *self.latent_shape)

    @torch.no_grad()
    def log_density(self, z: Float[Tensor, "b d"]) -> Float64[Tensor, " b"]:
        """See `Prior.log_density`."""
        return self.white_log_density(self.whitening.whiten(z)) - self.whitening.log_volume

    @abstractmethod
    def draw(self, noise: Float[Tensor, "b d"], uniform: Float64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """White coordinates from standard normal noise (times the temperature) and one uniform number each."""

    @abstractmethod
    def white_log_density(self, w: Float64[Tensor, "b d"]) -> Float64[Tensor, " b"]:
        """Log-density of white coordinates in nats."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`."""
        return {
            "whitening.mean": self.whitening.mean,
            "whitening.axes": self.whitening.axes,
            "whitening.cholesky": self.whitening.cholesky,
        }


@dataclass(frozen=True)
class WhitenedCodes:
    """Latents by which a density of the leading white coordinates is judged while it is fitted; the rest is computed once."""

    leading: Float64[Tensor, "b r"]
    rest_log_density: Float64[Tensor, " b"]
    log_volume: float

    @classmethod
    def of(cls, z: Float[Tensor, "b d"], whitening: Whitening, rank: int) -> WhitenedCodes:
        """With `rank` leading coordinates."""
        w = whitening.whiten(z)
        return cls(w[:, :rank].clone(), standard_normal_log_density(w[:, rank:]), whitening.log_volume)

    def nats_per_dim(self, leading_log_density: Float64[Tensor, " b"], num_dims: int) -> float:
        """Mean log-density of the latents per latent dimension, given that of their leading coordinates."""
        return float((leading_log_density + self.rest_log_density - self.log_volume).mean()) / num_dims


class GaussianPrior(WhitePrior):
    """N(μ, Σ), Σ the full covariance of the aggregate posterior: no better Gaussian exists."""

    def draw(self, noise: Float[Tensor, "b d"], uniform: Float64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """See `WhitePrior.draw`."""
        return noise

    def white_log_density(self, w: Float64[Tensor, "b d"]) -> Float64[Tensor, " b"]:
        """See `WhitePrior.white_log_density`."""
        return standard_normal_log_density(w)
