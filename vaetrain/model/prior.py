"""p(z), where new images begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.distributed.randomness import noise_of_images


@runtime_checkable  # for the type checks of the tests
class Prior(Protocol):
    """A distribution of latents that can be drawn image by image."""

    def sample(self, seed: int, indices: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "b *latent"]:
        """Latents of the images with these numbers, float32 on the CPU; row i depends on (seed, indices[i]) alone.

        Equal to the bit in batches of equal size; in others a matrix product may round differently. `temperature` scales the
        noise: below 1 safer and more alike. Raises ValueError where it has no meaning.
        """
        ...

    def log_density(self, z: Float[Tensor, "b d"]) -> Float64[Tensor, " b"] | None:
        """Log-density at temperature 1 of flattened latents, in nats, summed over dimensions; None if it has none."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that was fitted."""
        ...


@runtime_checkable
class ClassPrior(Prior, Protocol):
    """A prior that knows classes."""

    def of_class(self, name: str | None) -> Prior:
        """That of one class; raises ValueError naming the classes there are."""
        ...


@dataclass(frozen=True)
class StandardNormal:
    """N(0, temperature² I), which a VAE is trained against."""

    latent_shape: tuple[int, ...]

    def sample(self, seed: int, indices: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "b *latent"]:
        """See `Prior.sample`; equal to the bit whatever the batch."""
        return sample_standard_normal(seed, indices, self.latent_shape, temperature)

    def log_density(self, z: Float[Tensor, "b d"]) -> Float64[Tensor, " b"]:
        """See `Prior.log_density`."""
        return standard_normal_log_density(z)

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`: nothing is fitted."""
        return {}


def sample_standard_normal(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], temperature: float = 1.0
) -> Float[Tensor, "b *latent"]:
    """Latents z ~ N(0, temperature² I), float32 on the CPU; row i is a function of (seed, indices[i]) alone."""
    return temperature * noise_of_images(seed, indices, shape)


def standard_normal_log_density(z: Float[Tensor, "b d"]) -> Float64[Tensor, " b"]:
    """log N(z; 0, I) in nats, summed over dimensions."""
    return -0.5 * (z.double().square() + math.log(2 * math.pi)).sum(1)
