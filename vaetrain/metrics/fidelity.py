"""Fréchet distance between two sets of features, and how it depends on their number.

Each process adds its images' features to a `FeatureStatistics`; the sums n, Σf and Σffᵀ add up over processes, and make
the `FeatureGaussian` whose distance to another one is the FID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vaetrain.data.readers.order import epoch_order
from vaetrain.upload import upload


@dataclass
class FeatureStatistics:
    """n, Σf and Σffᵀ of feature vectors f, in float64: all that FID needs of a set of images, in any order."""

    count: int
    sum: Float64[Tensor, " d"]
    outer: Float64[Tensor, "d d"]

    @classmethod
    def empty(cls, num_features: int, device: torch.device | None = None) -> FeatureStatistics:
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

    def mean(self) -> Float64[Tensor, " d"]:
        """Mean feature vector."""
        return self.sum / self.count

    def covariance(self) -> Float64[Tensor, "d d"]:
        """Unbiased covariance (n − 1), as numpy.cov and torch-fidelity have it.

        Raises ValueError for fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; these statistics are of {self.count}")
        return (self.outer - self.sum.outer(self.sum) / self.count) / (self.count - 1)

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> FeatureStatistics:
        """The statistics of all processes' images together, on every process.

        `all_reduce_sum` returns the sum over processes of the tensor it is given; every process must call.
        """
        count = torch.full((), self.count, dtype=torch.float64, device=self.sum.device)
        # Copies, because a reduction may work in place or, on one process, return its argument.
        return FeatureStatistics(
            count=int(all_reduce_sum(count).item()),
            sum=all_reduce_sum(self.sum.clone()),
            outer=all_reduce_sum(self.outer.clone()),
        )


@dataclass(frozen=True)
class FeatureGaussian:
    """Mean and covariance of a set of features, the covariance as a root of it: Σ = rootᵀ root."""

    count: int
    mean: Float64[Tensor, " d"]
    root: Float64[Tensor, "r d"]

    @classmethod
    def of_statistics(cls, statistics: FeatureStatistics) -> FeatureGaussian:
        """From sums. The root is a Cholesky factor, or of eigenvectors where some feature never varies."""
        covariance = statistics.covariance()
        # 0.25 s at 2048 features against the eigenvectors' 4.2 s (one core), and any root will do.
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
            root = eigenvalues.clamp(min=0).sqrt()[:, None] * eigenvectors.T
        else:
            root = factor.T
        return cls(statistics.count, statistics.mean(), root)

    @classmethod
    def of_features(cls, features: Float[Tensor, "n d"]) -> FeatureGaussian:
        """From the features themselves, which are a root when there are no more of them than dimensions.

        Raises ValueError for fewer than two images.
        """
        num_images, num_features = features.shape
        if not 2 <= num_images <= num_features:
            statistics = FeatureStatistics.empty(num_features, features.device)
            statistics.update(features)
            return cls.of_statistics(statistics)
        f = features.double()
        return cls(num_images, f.mean(0), (f - f.mean(0)) / (num_images - 1) ** 0.5)


def frechet_distance(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), in squared feature units (Heusel et al. 2017, Eq. 6). Symmetric.

    With Σ = RᵀR, the eigenvalues of Σ₁Σ₂ are those of the symmetric CCᵀ, C = R₁R₂ᵀ: twice as fast as torch-fidelity's
    eigenvalues of Σ₁Σ₂ and equal to 1e-6. At most n − 1 of n images' are not 0; the others, which rounding leaves around
    1e-16 and a square root would lift to 1e-8 each, are left out. Rounding can leave equal sets a hair below 0.
    """
    product = a.root @ b.root.T
    gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
    rank = min(a.count, b.count) - 1
    eigenvalues = torch.linalg.eigvalsh(gram)[-rank:].clamp(min=0)
    traces = a.root.square().sum() + b.root.square().sum()
    return float((a.mean - b.mean).square().sum() + traces - 2 * eigenvalues.sqrt().sum())


@dataclass(frozen=True)
class FidAgainstCount:
    """FID at several numbers of images, and the straight line in 1/n through them."""

    counts: tuple[int, ...]
    """Images, ascending: on both sides, or of the generated ones only."""
    fids: tuple[float, ...]
    both_sides: bool
    """Whether the reference was cut to the same number."""

    @property
    def at_infinity(self) -> float:
        """Where the line meets 1/n = 0: FID∞ (Chong & Forsyth 2020, Sec. 4)."""
        line = np.polynomial.Polynomial.fit(1 / np.array(self.counts), np.array(self.fids), deg=1)
        return float(line(0.0))


NUM_COUNTS = 15
"""Points of the line, as many as Chong & Forsyth's."""


def fid_against_count(
    generated: Float[Tensor, "n d"], reference: Float[Tensor, "n d"] | FeatureGaussian
) -> FidAgainstCount:
    """FID at up to 15 numbers of images, evenly spaced from half of the generated ones to all of them.

    A reference of features, equally many, is cut to the same number, so that the line extrapolates it too: right when it is
    itself a sample. A `FeatureGaussian` stays whole. The last point is the FID of all images. Smaller numbers than half would bend
    the line: FID is not yet linear in 1/n where there are fewer images than features. Each set holds the next smaller one.
    """
    num_images = len(generated)
    counts = sorted({round(count) for count in np.linspace(num_images / 2, num_images, NUM_COUNTS)})
    order = upload(torch.from_numpy(epoch_order(num_images, 0, 0)), generated.device)
    cuts = _growing(generated[order], counts)
    if isinstance(reference, FeatureGaussian):
        fids = [frechet_distance(cut, reference) for cut in cuts]
    else:
        assert len(reference) == num_images
        fids = [frechet_distance(*pair) for pair in zip(cuts, _growing(reference[order], counts), strict=True)]
    return FidAgainstCount(tuple(counts), tuple(fids), not isinstance(reference, FeatureGaussian))


def _growing(features: Float[Tensor, "n d"], counts: Sequence[int]) -> Iterator[FeatureGaussian]:
    """The Gaussians of the first counts[0], counts[1], … images."""
    statistics = FeatureStatistics.empty(features.shape[1], features.device)
    for count in counts:
        if count <= features.shape[1]:
            yield FeatureGaussian.of_features(features[:count])
        else:
            statistics.update(features[statistics.count : count])
            yield FeatureGaussian.of_statistics(statistics)
