"""A VAE whose log p(x), p(z|x) and aggregate posterior are known: p(z) = N(0, I), p(x|z) = N(Wz + b, σ²I).

The columns of W are orthogonal, so that p(z|x) is a diagonal Gaussian, which a linear encoder can be exactly. Images are
4×4 and, drawn from p(x), rounded to the 256 levels: at σ = 0.1 that adds a thousandth to their variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vaetrain.data.format.manifest import Manifest
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout, eval_indices
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig

SIZE = 4
NUM_PIXELS = SIZE**2
SIGMA = 0.1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LinearGaussian(VAE):
    """`lengths` are the norms of W's columns, one a latent dimension; the encoder is the exact posterior."""

    def __init__(self, lengths: tuple[float, ...]) -> None:
        num_latents = len(lengths)
        super().__init__(
            ModelConfig(
                kind="dense", image_size=SIZE, in_channels=1, hidden_features=(1,), latent_channels=num_latents,
                likelihood="gaussian-fixed", sigma=SIGMA,
            )
        )  # fmt: skip
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(NUM_PIXELS, 2 * num_latents))
        self.decoder = nn.Sequential(nn.Linear(num_latents, NUM_PIXELS), Rearrange("b (c h w) -> b c h w", c=1, h=SIZE))
        self.eval().requires_grad_(False)
        directions = torch.linalg.qr(draw(NUM_PIXELS, num_latents)).Q
        self.weight = (directions * torch.tensor(lengths)).double()
        self.bias = 0.1 * draw(NUM_PIXELS, seed=1).double()
        self.decoder[0].weight.copy_(self.weight)
        self.decoder[0].bias.copy_(self.bias)
        self.posterior_variance = 1 / (1 + torch.tensor(lengths).double().square() / SIGMA**2)
        self.set_encoder()

    def set_encoder(self, shift: float = 0.0, stretch: float = 1.0) -> None:
        """The exact posterior with every mean moved by `shift` and every standard deviation multiplied by `stretch`."""
        gain = self.posterior_variance[:, None] * self.weight.T / SIGMA**2
        logvar = self.posterior_variance.log() + 2 * math.log(stretch)
        self.encoder[1].weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
        self.encoder[1].bias.copy_(torch.cat([shift - gain @ self.bias, logvar]))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x): x ~ N(b, WWᵀ + σ²I)."""
        covariance = self.weight @ self.weight.T + SIGMA**2 * torch.eye(NUM_PIXELS, dtype=torch.float64)
        return MultivariateNormal(self.bias, covariance).log_prob(x.double().flatten(1))

    def mutual_information(self) -> float:
        """I(x; z) = ½ log det(I + WᵀW/σ²) for the exact posterior and endless images."""
        return -0.5 * self.posterior_variance.log().sum().item()

    def images(self, num_images: int, seed: int = 0) -> MemoryReader:
        """Images drawn from p(x)."""
        z, noise = (
            draw(num_images, len(self.posterior_variance), seed=seed),
            draw(num_images, NUM_PIXELS, seed=seed + 100),
        )
        x = z.double() @ self.weight.T + self.bias + SIGMA * noise
        assert (x.abs() > 1).double().mean() < 1e-3  # next to none is clipped
        return MemoryReader(self.likelihood.to_uint8(x.float().view(-1, 1, SIZE, SIZE)))


class MemoryReader:
    """A split that lies in memory."""

    manifest = Manifest.__new__(Manifest)
    description = "in memory"

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.num_images = len(images)

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[Batch]:
        raise NotImplementedError

    def eval_batches(self, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        for positions in eval_indices(self.num_images, batch_size, rank, num_processes):
            indices = torch.from_numpy(positions)
            yield Batch(self.images[indices], torch.zeros_like(indices), indices)

    def first(self, num_images: int) -> Batch:
        raise NotImplementedError

    def subset(self, positions: np.ndarray) -> MemoryReader:
        return MemoryReader(self.images[torch.from_numpy(positions)])

    def close(self) -> None:
        pass
