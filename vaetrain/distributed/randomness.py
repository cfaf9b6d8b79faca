"""Randomness that belongs to images and steps, never to processes.

Training noise is a function of (seed, images seen), that of samples and scores of (seed, image number). Hence the same
losses on 1 and 64 processes, a resume that needs no generator state, and sample i that is the same whoever draws it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

TRAINING, IMAGES = 0, 1  # what the randomness is for: image 0 and the first batch share no stream


def mixed_seed(*numbers: int) -> int:
    """One well-spread 63-bit seed from several numbers; adjacent raw seeds would give correlated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def noise_of_images(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "b *latent"]:
    """Standard normal noise (len(indices), *shape), float32 on the CPU; row i depends on (seed, indices[i]) alone.

    It costs some 30 µs an image: made for sampling and evaluation. Training draws a whole global batch at once.
    """
    rows = torch.empty(len(indices), *shape)
    generator = torch.Generator()
    for row, index in zip(rows, indices, strict=True):
        row.normal_(generator=generator.manual_seed(mixed_seed(seed, index, IMAGES)))
    return rows


def noise_of_global_batch(
    seed: int, images_seen: int, global_batch_size: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Float[Tensor, "g *latent"], Bool[Tensor, " g"]]:
    """Latent noise and mirror coins of the global batch that starts at `images_seen`, the same on every process.

    Every process draws the whole and uses its slice: 4,096 images of 1,024 latent dimensions are 16 MB and well under a
    millisecond on a GPU, and cutting the batch otherwise changes nothing.
    """
    generator = torch.Generator(device).manual_seed(mixed_seed(seed, images_seen, TRAINING))
    noise = torch.randn(global_batch_size, *shape, generator=generator, device=device)
    mirror = torch.rand(global_batch_size, generator=generator, device=device) < 0.5
    return noise, mirror
