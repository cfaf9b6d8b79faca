"""p(z) and the randomness that samples and scores are made of: noise that belongs to an image, not to a process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def noise_of_images(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "b ..."]:
    """Standard normal noise (len(indices), *shape), float32 on the CPU, where row i depends on (seed, indices[i]) alone.

    So any number of processes and any batch size draw the same sample i, and score image i with the same latent noise.
    It costs about 30 µs an image: made for sampling and evaluation; training draws a whole global batch at once.
    """
    rows = torch.empty(len(indices), *shape)
    generator = torch.Generator()
    for row, index in zip(rows, indices, strict=True):
        # SeedSequence mixes both numbers into one well-spread seed; adjacent raw seeds would be correlated in some generators.
        generator.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1))
        row.normal_(generator=generator)
    return rows


def sample_standard_normal(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], temperature: float = 1.0
) -> Float[Tensor, "b ..."]:
    """Latents z ~ N(0, temperature² I), row i a function of (seed, indices[i]) alone; see `noise_of_images`."""
    return temperature * noise_of_images(seed, indices, shape)
