"""The affine map between latents and white coordinates, of which the first are those the codes vary in most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.priors.aggregate import AggregatePosterior

JITTER = 1e-6
"""Added to the variance of every direction, as a fraction of the largest: an autoencoder may leave directions unused."""


@dataclass(frozen=True)
class Whitening:
    """z = mean + A L w, where w has mean 0 and covariance I when z follows the aggregate posterior.

    A's columns are the principal axes of the posterior means, the widest first; L is the Cholesky factor of the
    aggregate's whole covariance in those axes. L is lower triangular, so the first r entries of w belong to the r widest
    axes alone, and a model of those r leaves the rest Gaussian.
    """

    mean: Float64[Tensor, " d"]
    axes: Float64[Tensor, "d d"]
    cholesky: Float64[Tensor, "d d"]

    @classmethod
    def of(cls, aggregate: AggregatePosterior) -> Whitening:
        """The whitening of an aggregate posterior, on its device; raises ValueError when it is a single point."""
        of_means = aggregate.covariance_of_means()
        axes = torch.linalg.eigh(of_means).eigenvectors.flip(1)  # eigh puts the narrowest first
        covariance = axes.T @ (of_means + aggregate.mean_variances().diag()) @ axes
        widest = covariance.diagonal().max()
        if not widest > 0:
            raise ValueError("all training images have the same code; there is nothing to fit a prior to")
        covariance.diagonal().add_(JITTER * widest)
        return cls(aggregate.mean(), axes, torch.linalg.cholesky(covariance))

    def whiten(self, z: Float[Tensor, "b d"], leading: int | None = None) -> Float64[Tensor, "b r"]:
        """White coordinates of latents, or the `leading` ones alone, which cost no more than they are."""
        rotated = (z.double() - self.mean) @ self.axes[:, :leading]
        return torch.linalg.solve_triangular(self.cholesky[:leading, :leading], rotated.T, upper=False).T

    def unwhiten(self, w: Float[Tensor, "b d"]) -> Float64[Tensor, "b d"]:
        """Latents at white coordinates."""
        return self.mean + w.double() @ self.cholesky.T @ self.axes.T

    @property
    def log_volume(self) -> float:
        """log |det ∂z/∂w|, which a log-density of w loses on its way to one of z."""
        return float(self.cholesky.diagonal().log().sum())
