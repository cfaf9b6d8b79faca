"""Flow matching (Lipman et al. 2023; Liu et al. 2023): from noise at t = 0 to latents at t = 1 on straight lines.

    x_t = (1 − t) · noise + t · (z − mean) / std        velocity of the line = (z − mean) / std − noise

The network learns the mean velocity at (x_t, t), which carries N(0, I) to the distribution of latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from vaetrain.distributed.randomness import mixed_seed, noise_of_images, noise_of_training, uniform_of_training
from vaetrain.priors.flow_matching.config import FlowObjectiveConfig, NetworkConfig
from vaetrain.priors.flow_matching.network import build_network
from vaetrain.upload import upload

FLOW_MATCHING, TIMES = 41, 42
"""What the randomness is for: the first stage's noise, that of z ~ q(z|x) and this one are three."""

HELD_OUT_TIMES = 4
"""At which each held-out latent is judged, spread evenly over (0, 1)."""


class FlowDraw(NamedTuple):
    """What is drawn for each latent of a training batch."""

    noise: Float[Tensor, "b *latent"]
    t: Float[Tensor, " b"]
    unlabelled: Bool[Tensor, " b"]


class FlowMatching(nn.Module):
    """A velocity network, and the statistics by which latents are normalised: all that a prior is made of."""

    mean: Float[Tensor, "c *places"]
    std: Float[Tensor, "c *places"]
    class_shares: Float[Tensor, " classes"]
    """Of the training latents."""

    def __init__(self, config: NetworkConfig, latent_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = latent_shape
        self.num_classes = num_classes
        self.network = build_network(config, latent_shape, num_classes)
        by_channel = (latent_shape[0], *(1 for _ in latent_shape[1:]))
        self.register_buffer("mean", torch.zeros(by_channel))
        self.register_buffer("std", torch.ones(by_channel))
        self.register_buffer("class_shares", torch.full((num_classes,), 1 / num_classes))

    def forward(
        self,
        z: Float[Tensor, "b *latent"],
        noise: Float[Tensor, "b *latent"],
        t: Float[Tensor, " b"],
        labels: Int64[Tensor, " b"],
    ) -> Float32[Tensor, " b"]:
        """Squared error of the velocity at x_t, mean over the latent's dimensions; the label `num_classes` stands for none."""
        end = (z - self.mean) / self.std
        place = t.view(-1, *(1 for _ in self.latent_shape))
        x = torch.lerp(noise, end, place)
        velocity = self.network(x, t, labels)
        error: Float32[Tensor, " b"] = (velocity.float() - (end - noise)).square().flatten(1).mean(1)
        return error


def draw_for_training(
    config: FlowObjectiveConfig, seed: int, positions: slice, latent_shape: tuple[int, ...], device: torch.device
) -> FlowDraw:
    """Noise, times and dropped labels of the latents at `positions` of training: functions of (seed, images seen)."""
    seed = mixed_seed(seed, FLOW_MATCHING)
    noise, _ = noise_of_training(seed, positions, latent_shape, device)
    uniform, drop = uniform_of_training(seed, positions, 2, device).unbind(1)
    t = torch.special.ndtri(uniform).sigmoid() if config.time == "log-normal" else uniform
    return FlowDraw(noise, t, drop < config.label_dropout)


def draw_held_out(
    seed: int, indices: list[int], number: int, latent_shape: tuple[int, ...], device: torch.device
) -> tuple[Float[Tensor, "b *latent"], Float[Tensor, " b"]]:
    """Noise and time number `number` of HELD_OUT_TIMES at which held-out latents are judged; of (seed, index) alone."""
    noise = noise_of_images(mixed_seed(seed, FLOW_MATCHING, number), indices, latent_shape)
    uniform = torch.special.ndtr(noise_of_images(mixed_seed(seed, TIMES, number), indices, (1,))[:, 0])
    return upload(noise, device), upload((number + uniform) / HELD_OUT_TIMES, device)
