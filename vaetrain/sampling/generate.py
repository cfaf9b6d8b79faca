"""New images, shared out among processes block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor

from vaetrain.distributed import processes
from vaetrain.model.autoencoder import VAE
from vaetrain.model.prior import Prior, StandardNormal
from vaetrain.upload import upload


@torch.no_grad()
def generate(
    vae: VAE,
    accelerator: Accelerator,
    num_images: int,
    *,
    seed: int,
    temperature: float,
    batch_size: int,
    prior: Prior | None = None,
    skip: int = 0,
) -> Iterator[tuple[range, UInt8[Tensor, "b c h w"]]]:
    """This process's blocks of the sample set (prior, seed, temperature): their image numbers and uint8 pixels.

    Decoder means at latents from `prior` (default: the standard normal), rounded to the nearest of 256 levels. Block j
    holds images j·batch_size …; process r makes the blocks j ≡ r, without the first `skip` of its images. Every block
    is drawn and decoded whole, the last one too, so that an image's bits depend neither on the number of images nor on
    that of processes. (On `batch_size` they may: a matrix product of another shape may round differently.)
    """
    prior = prior or StandardNormal(vae.config.latent_shape)
    device = next(vae.parameters()).device
    stride = accelerator.num_processes * batch_size
    blocks_to_skip, skip = divmod(skip, batch_size)
    for start in range(accelerator.process_index * batch_size + blocks_to_skip * stride, num_images, stride):
        z = prior.sample(seed, range(start, start + batch_size), temperature)
        images = vae.decode(upload(z, device))
        indices = range(start, min(start + batch_size, num_images))
        yield indices[skip:], vae.likelihood.to_uint8(images[skip : len(indices)])
        skip = 0


def gather_samples(
    vae: VAE,
    accelerator: Accelerator,
    num_images: int,
    *,
    seed: int,
    batch_size: int,
    prior: Prior | None = None,
    temperature: float = 1.0,
) -> UInt8[Tensor, "n c h w"]:
    """The first images of a sample set, on every process's CPU; a collective."""
    blocks = generate(
        vae, accelerator, num_images, seed=seed, temperature=temperature, batch_size=batch_size, prior=prior
    )
    return gather_images(vae, accelerator, blocks)


def gather_images(
    vae: VAE, accelerator: Accelerator, blocks: Iterable[tuple[Sequence[int], UInt8[Tensor, "b c h w"]]]
) -> UInt8[Tensor, "n c h w"]:
    """All processes' images in the order of their numbers, on every process's CPU; a collective.

    For pictures and for comparisons of a few thousand images: every process holds all of them.
    """
    side = vae.config.image_size
    images = [torch.empty(0, vae.config.in_channels, side, side, dtype=torch.uint8)]
    indices: list[int] = []
    for numbers, block in blocks:
        indices += numbers
        images.append(block.cpu())
    return processes.gather_by_index(accelerator, torch.tensor(indices, dtype=torch.int64), torch.cat(images))
