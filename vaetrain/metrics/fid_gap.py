"""How much closer samples come to the training images than to held-out ones: the FID's train-validation gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vaetrain.data.order import epoch_order
from vaetrain.metrics.fidelity import Gaussian, frechet_distance

MAX_TRAIN_SETS = 5
"""Sets of training images that the validation images are held against."""


@dataclass(frozen=True)
class FidGap:
    """FID of the same samples against equally many images of each split, since FID falls with the number of images."""

    num_real: int
    """Images in each set of real ones."""
    val: float
    """Against the validation images."""
    train: tuple[float, ...]
    """Against each of several disjoint random sets of training images."""

    @property
    def gap(self) -> float:
        """FID against the validation images less the mean of those against training images.

        Above 0 as far as samples resemble the training images more than new ones, or the splits differ in kind.
        """
        return self.val - float(np.mean(self.train))

    @property
    def standard_error(self) -> float | None:
        """Of the gap: the deviation between the sets of training images, of which the validation images would be another.

        It holds the samples fixed. None with a single set.
        """
        if len(self.train) < 2:
            return None
        return float(np.std(self.train, ddof=1) * (1 + 1 / len(self.train)) ** 0.5)


def fid_gap(samples: Float[Tensor, "n d"], train: Float[Tensor, "m d"], val: Float[Tensor, "v d"], seed: int) -> FidGap:
    """The gap from features of the samples and of images of both splits; `seed` picks the sets."""
    num_real = min(len(train), len(val))
    order = epoch_order(len(train), seed, 0)
    sets = [order[start : start + num_real] for start in range(0, len(train) - num_real + 1, num_real)]
    generated = Gaussian.of_features(samples)

    def against(real: Float[Tensor, "n d"]) -> float:
        return frechet_distance(generated, Gaussian.of_features(real))

    return FidGap(
        num_real,
        against(val[torch.from_numpy(epoch_order(len(val), seed, 0)[:num_real]).to(val.device)]),
        tuple(against(train[torch.from_numpy(rows).to(train.device)]) for rows in sets[:MAX_TRAIN_SETS]),
    )
