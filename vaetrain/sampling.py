"""New images, shared out among processes, and sample sets: their shards and manifest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor

from vaetrain.model.autoencoder import VAE


@torch.no_grad()
def generate(
    vae: VAE, accelerator: Accelerator, num_images: int, *, seed: int, temperature: float, batch_size: int
) -> Iterator[tuple[range, UInt8[Tensor, "b c h w"]]]:
    """This process's blocks of the sample set (seed, temperature): their image numbers and uint8 pixels.

    Block j holds images j·batch_size …; process r makes the blocks j ≡ r. Every block is decoded whole, the last one too,
    so that an image's bits depend neither on the number of images nor on that of processes.
    """
    for start in range(accelerator.process_index * batch_size, num_images, accelerator.num_processes * batch_size):
        images = vae.sample(batch_size, seed=seed, start=start, temperature=temperature)
        indices = range(start, min(start + batch_size, num_images))
        yield indices, vae.likelihood.to_uint8(images[: len(indices)])
