"""Fréchet inception distance from sums that every process gathers over its own images.

Each process feeds its images to a `FeatureExtractor` and their features to a `FeatureStatistics`; the sums n, Σf and
Σffᵀ add up over processes, and torch-fidelity computes the distance from them. No feature leaves its process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric


@dataclass
class FeatureStatistics:
    """n, Σf and Σffᵀ of feature vectors f, in float64: all that FID needs of a set of images, in any order."""

    count: int
    sum: Float64[Tensor, " d"]
    outer: Float64[Tensor, "d d"]

    @classmethod
    def empty(cls, num_features: int = 2048, device: torch.device | None = None) -> FeatureStatistics:
        """Statistics of no image; sums live on `device` (default: CPU), which must know float64."""
        return cls(
            count=0,
            sum=torch.zeros(num_features, dtype=torch.float64, device=device),
            outer=torch.zeros(num_features, num_features, dtype=torch.float64, device=device),
        )

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Add the features of a batch."""
        f = features.to(device=self.sum.device, dtype=torch.float64)
        self.count += f.shape[0]
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def mean(self) -> Float64[np.ndarray, " d"]:
        """Mean feature vector."""
        return (self.sum / self.count).cpu().numpy()

    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Unbiased covariance (n − 1), as numpy.cov and torch-fidelity have it.

        Raises ValueError for fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; these statistics are of {self.count}")
        return ((self.outer - self.sum.outer(self.sum) / self.count) / (self.count - 1)).cpu().numpy()

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> FeatureStatistics:
        """The statistics of all processes' images together, on every process.

        `all_reduce_sum` returns the sum over processes of the tensor it is given; every process must call.
        """
        count = torch.tensor(self.count, dtype=torch.float64, device=self.sum.device)
        # Copies, because a reduction may work in place or, on one process, return its argument.
        return FeatureStatistics(
            count=int(all_reduce_sum(count).item()),
            sum=all_reduce_sum(self.sum.clone()),
            outer=all_reduce_sum(self.outer.clone()),
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        tensors = {"count": torch.tensor(self.count), "sum": self.sum, "outer": self.outer}
        safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Read what `save` wrote, onto the CPU; raises FileNotFoundError, or ValueError for any other file."""
        try:
            tensors = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file; delete it to have it computed again") from error
        if tensors.keys() != {"count", "sum", "outer"}:
            raise ValueError(f"{path} holds {sorted(tensors)}, not the count, sum and outer of feature statistics")
        return cls(count=int(tensors["count"].item()), sum=tensors["sum"], outer=tensors["outer"])


def fid(generated: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Fréchet distance ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two sets of features (Heusel et al. 2017, Eq. 6).

    Symmetric, in squared feature units, biased upwards at small counts; computed by torch-fidelity in float64, in about
    2 s for 2048 features. Rounding can leave equal sets a hair below 0. Raises ValueError if a set has fewer than two
    images.
    """
    statistics = [{"mu": side.mean(), "sigma": side.covariance()} for side in (generated, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
