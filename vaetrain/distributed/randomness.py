"""Randomness that belongs to images and steps, never to processes.

Training noise is a function of (seed, position in training), that of samples and scores of (seed, image number). Hence the same
losses on 1 and 64 processes, a resume that needs no generator state, and sample i that is the same whoever draws it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

TRAINING, IMAGES, AUGMENTATION = 0, 1, 2  # what the randomness is for: image 0 and the first block share no stream

BLOCK_IMAGES = 16
NUMBERS_AT_A_TIME = 40_960
"""Up to so many, PyTorch's CUDA generator gives the same ones on every model of GPU: 40 blocks of 256 threads with 4 numbers
each, for which even the smallest has room. Beyond, threads draw again, and which of them draws which number depends on the room."""


def mixed_seed(*numbers: int) -> int:
    """One well-spread 63-bit seed from several numbers; adjacent raw seeds would give correlated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def noise_of_images(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "b *latent"]:
    """Standard normal noise (len(indices), *shape), float32 on the CPU; row i depends on (seed, indices[i]) alone.

    It costs some 30 µs an image: made for sampling and evaluation. Training draws blocks of images on its device.
    """
    rows = torch.empty(len(indices), *shape)
    generator = torch.Generator()
    for row, index in zip(rows, indices, strict=True):
        row.normal_(generator=generator.manual_seed(mixed_seed(seed, index, IMAGES)))
    return rows


def noise_of_training(
    seed: int, positions: slice, shape: tuple[int, ...], device: torch.device
) -> tuple[Float[Tensor, "b *latent"], Bool[Tensor, " b"]]:
    """Latent noise (b, *shape), float32, and mirror coins of the images at `positions` of training, counted from its first.

    Drawn on `device` in blocks of 16 images, each from a seed of its own, so that any cut into processes and micro-batches
    sees the same and draws little more than it needs.
    """
    blocks, cut = blocks_of(positions)
    noise = torch.empty(len(blocks) * BLOCK_IMAGES, *shape, device=device)
    coins = torch.empty(len(blocks) * BLOCK_IMAGES, device=device)
    generator = torch.Generator(device)
    for number, block, coins_of_block in zip(blocks, noise.split(BLOCK_IMAGES), coins.split(BLOCK_IMAGES), strict=True):
        generator.manual_seed(mixed_seed(seed, number, TRAINING))
        for piece in block.view(-1).split(NUMBERS_AT_A_TIME):
            piece.normal_(generator=generator)
        coins_of_block.uniform_(generator=generator)
    return noise[cut], coins[cut] < 0.5


def uniform_of_training(seed: int, positions: slice, count: int, device: torch.device) -> Float[Tensor, "b {count}"]:
    """`count` numbers in [0, 1) for each of the images at `positions` of training, by which they are augmented; as the noise is."""
    blocks, cut = blocks_of(positions)
    numbers = torch.empty(len(blocks) * BLOCK_IMAGES, count, device=device)
    generator = torch.Generator(device)
    for number, block in zip(blocks, numbers.split(BLOCK_IMAGES), strict=True):
        block.uniform_(generator=generator.manual_seed(mixed_seed(seed, number, AUGMENTATION)))
    return numbers[cut]


def blocks_of(positions: slice) -> tuple[range, slice]:
    """The blocks of 16 images that hold these positions, and where the positions lie in them."""
    blocks = range(positions.start // BLOCK_IMAGES, -(-positions.stop // BLOCK_IMAGES))
    first = blocks.start * BLOCK_IMAGES
    return blocks, slice(positions.start - first, positions.stop - first)
