"""p(z), where new images begin."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from vaetrain.randomness import noise_of_images


def sample_standard_normal(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], temperature: float = 1.0
) -> Float[Tensor, "b *latent"]:
    """Latents z ~ N(0, temperature² I), float32 on the CPU; row i is a function of (seed, indices[i]) alone."""
    return temperature * noise_of_images(seed, indices, shape)
