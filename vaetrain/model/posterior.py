"""q(z|x): what the encoder says about an image's latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Beyond these a bf16 encoder's overflow would reach exp(); σ between 3e-7 and 2e4 covers every posterior of use.
LOGVAR_RANGE = (-30.0, 20.0)


def kl_to_standard_normal(mean: Float[Tensor, "b ..."], logvar: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """KL(q(z|x) ‖ N(0, I)) in nats, one value per latent dimension; the sum over them is an image's rate.

    ½ (μ² + σ² − 1 − log σ²), Kingma & Welling 2013, App. B. The lecture prints −log σ in its place while calling σ a
    variance; with σ the standard deviation the term is −log σ², which is what stands here.
    """
    return 0.5 * (mean.square() + logvar.expm1() - logvar)


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z|x) = N(mean, diag(exp(logvar))), float32, any latent shape after the batch dimension."""

    mean: Float[Tensor, "b ..."]
    logvar: Float[Tensor, "b ..."]

    @classmethod
    def from_moments(cls, moments: Float[Tensor, "b c2 ..."]) -> DiagonalGaussian:
        """Split an encoder's output (mean and log-variance stacked on dimension 1) and bound the log-variance."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Float[Tensor, "b ..."] | None = None
    ) -> Float[Tensor, "b ..."]:
        """z = mean + σ·noise (the reparameterisation trick); standard normal `noise` is drawn unless given."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self) -> Float[Tensor, "b ..."]:
        """The most likely latent, the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, "b ..."]:
        """KL to N(0, I) in nats per latent dimension; see `kl_to_standard_normal`."""
        return kl_to_standard_normal(self.mean, self.logvar)


@dataclass(frozen=True)
class PointMass:
    """What a deterministic autoencoder says: one latent and no uncertainty, so that its rate is counted as 0."""

    mean: Float[Tensor, "b ..."]

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Float[Tensor, "b ..."] | None = None
    ) -> Float[Tensor, "b ..."]:
        """The latent itself; nothing is random."""
        return self.mean

    def mode(self) -> Float[Tensor, "b ..."]:
        """The latent itself."""
        return self.mean

    def kl(self) -> Float[Tensor, "b ..."]:
        """Zeros: a deterministic autoencoder has no rate term (the KL of a point mass would be infinite)."""
        return torch.zeros_like(self.mean)


Posterior = DiagonalGaussian | PointMass
