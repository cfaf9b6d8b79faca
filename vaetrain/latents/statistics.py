"""Exact statistics of latents: float64 sums of each channel over a file, and of the files' sums without rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from vaetrain.latents.manifest import LatentStatistics
from vaetrain.latents.record import Parts


@dataclass(frozen=True)
class ChannelSums:
    """Sums over the positions of some images' latents, one number for each channel."""

    num_images: int
    num_values: int
    """Numbers summed in each channel."""
    mean: tuple[float, ...]
    """Σ μ"""
    squared_mean: tuple[float, ...]
    """Σ μ²"""
    variance: tuple[float, ...]
    """Σ σ²; zeros of a deterministic encoder"""

    @classmethod
    def of(cls, parts: Parts) -> ChannelSums:
        """Of the images as they are: their twins are left out."""
        mean = _by_channel(parts["mean"])
        variance = _by_channel(parts["logvar"]).exp() if "logvar" in parts else torch.zeros_like(mean)
        sums = (tuple(each.sum(1).tolist()) for each in (mean, mean.square(), variance))
        return cls(len(parts["mean"]), mean.shape[1], *sums)


def total(sums: Sequence[ChannelSums]) -> ChannelSums:
    """The sum of several, rounded once: it does not matter in which order they come."""
    columns = {
        name: tuple(map(math.fsum, zip(*(getattr(each, name) for each in sums), strict=True)))
        for name in ("mean", "squared_mean", "variance")
    }
    return ChannelSums(sum(each.num_images for each in sums), sum(each.num_values for each in sums), **columns)


def statistics_of(sums: ChannelSums) -> LatentStatistics:
    """Mean and standard deviations (of the population: divided by n) of each channel."""
    n = sums.num_values
    mean = tuple(each / n for each in sums.mean)
    of_means = [max(0.0, square / n - m * m) for square, m in zip(sums.squared_mean, mean, strict=True)]
    whole = [means + each / n for means, each in zip(of_means, sums.variance, strict=True)]
    return LatentStatistics(sums.num_images, mean, tuple(map(math.sqrt, whole)), tuple(map(math.sqrt, of_means)))


def _by_channel(latents: Tensor) -> Float64[Tensor, "c n"]:
    return latents.double().transpose(0, 1).flatten(1)
