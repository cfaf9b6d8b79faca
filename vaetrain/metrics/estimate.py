"""A mean over images that says how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float64
from torch import Tensor

from vaetrain.distributed.processes import sum_over_processes


@dataclass(frozen=True)
class Estimate:
    """The mean of one score over images, in the score's unit."""

    mean: float
    standard_error: float
    """Sample standard deviation over images, divided by √num_images: how far the mean is from that of all such images."""
    num_images: int

    @classmethod
    def of(cls, scores: Float64[Tensor, " n"], accelerator: Accelerator) -> Estimate:
        """From the scores of each process's own images, every image with the same weight; a collective.

        A process may have none. Raises ValueError when all together have fewer than 2.
        """
        count = torch.full((), len(scores), dtype=torch.float64, device=scores.device)
        total, num_images = sum_over_processes(accelerator, torch.stack([scores.sum(), count])).tolist()
        if num_images < 2:
            raise ValueError(f"a standard error needs at least 2 images; the split has {int(num_images)}")
        mean = total / num_images
        # Deviations in a second pass: Σx² − n·mean² would lose every digit where scores are large and alike.
        squares = sum_over_processes(accelerator, (scores - mean).square().sum()).item()
        return cls(mean, (squares / (num_images - 1) / num_images) ** 0.5, int(num_images))
