"""How much closer samples come to the training images than to held-out ones: the FID's train-validation gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vaetrain.data.readers.order import epoch_order
from vaetrain.metrics.fidelity import FeatureGaussian, frechet_distance
from vaetrain.upload import upload

MIN_TRAIN_SETS, MAX_TRAIN_SETS = 4, 5
"""Sets of training images that the validation images are held against: of fewer than four the deviation is hardly known, and
sets become smaller instead."""


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
    def standard_error(self) -> float:
        """Of the gap: the deviation between the sets of training images, of which the validation images would be another.

        It holds the samples fixed.
        """
        return float(np.std(self.train, ddof=1) * (1 + 1 / len(self.train)) ** 0.5)


@dataclass(frozen=True)
class GapSets:
    """The real images' side of the gap, the same for all samples."""

    num_real: int
    val: FeatureGaussian
    train: tuple[FeatureGaussian, ...]

    @classmethod
    def draw(cls, train: Float[Tensor, "m d"], val: Float[Tensor, "v d"], seed: int) -> GapSets:
        """From features of images of both splits, at least 8 of `train`; `seed` picks the sets.

        They are as large as `val`, or smaller where `train` would not make `MIN_TRAIN_SETS` of them.
        """
        num_real = min(len(train) // MIN_TRAIN_SETS, len(val))

        def sets(features: Float[Tensor, "n d"], most: int) -> tuple[FeatureGaussian, ...]:
            order = upload(torch.from_numpy(epoch_order(len(features), seed, 0)), features.device)
            chunks = order[: len(order) // num_real * num_real].split(num_real)[:most]
            return tuple(FeatureGaussian.of_features(features[rows]) for rows in chunks)

        return cls(num_real, sets(val, 1)[0], sets(train, MAX_TRAIN_SETS))

    def gap(self, samples: FeatureGaussian) -> FidGap:
        """Of these samples."""
        train = tuple(frechet_distance(samples, real) for real in self.train)
        return FidGap(self.num_real, frechet_distance(samples, self.val), train)
