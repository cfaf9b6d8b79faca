"""The Fréchet distance equals torch-fidelity's, whoever summed, and its extrapolation finds the truth where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from vaetrain.metrics.fidelity import FeatureGaussian, FeatureStatistics, fid_against_count, frechet_distance


def draw(num: int, std: Tensor, mean: float = 0.0, seed: int = 0) -> Tensor:
    """Features of independent dimensions."""
    return torch.randn(num, len(std), generator=torch.Generator().manual_seed(seed)) * std + mean


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    statistics.update(features)
    return statistics


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(FeatureGaussian.of_features(a), FeatureGaussian.of_features(b))


def torch_fidelitys(a: Tensor, b: Tensor) -> float:
    return fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in (a, b)), verbose=False)[
        KEY_METRIC_FID
    ]


@pytest.mark.parametrize(("num_a", "num_b"), [(400, 300), (300, 90), (70, 60)], ids=["more", "mixed", "fewer"])
def test_equals_torch_fidelity_with_more_and_fewer_images_than_features(num_a: int, num_b: int) -> None:
    std = torch.arange(1, 101) ** -0.6
    a, b = draw(num_a, std, 0.4), draw(num_b, std.flip(0), seed=1)
    assert distance(a, b) == pytest.approx(torch_fidelitys(a, b), rel=1e-6)
    assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-9)


def test_equals_torch_fidelity_when_some_feature_never_varies() -> None:
    a, b = draw(300, torch.arange(40) / 40, 1.0), draw(200, torch.arange(40) / 20)
    assert distance(a, b) == pytest.approx(torch_fidelitys(a, b), rel=1e-6)


def test_sums_of_two_processes_give_the_distance_of_the_whole() -> None:
    features, other = draw(200, torch.arange(1, 49)), draw(150, torch.arange(1, 49), 9.0, seed=1)
    first, second = statistics_of(features[:73]), statistics_of(features[73:])
    others = iter([torch.tensor(float(second.count)), second.sum, second.outer])
    reduced = first.reduce(lambda tensor: tensor + next(others))
    assert (first.count, reduced.count) == (73, 200)
    split = frechet_distance(FeatureGaussian.of_statistics(reduced), FeatureGaussian.of_features(other))
    assert split == pytest.approx(distance(features, other), rel=1e-9)


def test_equal_sets_have_no_distance() -> None:
    for num in (30, 200):
        features = draw(num, torch.arange(1, 49))
        assert abs(distance(features, features)) < 1e-9 * float(features.double().square().sum(1).mean())


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    """Σ (μ₁ − μ₂)² + (σ₁ − σ₂)², with statistics made to have exactly these moments."""
    mean_1, mean_2 = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    std_1, std_2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.0, 0.25, 3.0]).double()
    n = 11

    def exact(mean: Tensor, std: Tensor) -> FeatureGaussian:
        outer = (n - 1) * std.square().diag() + n * mean.outer(mean)
        return FeatureGaussian.of_statistics(FeatureStatistics(n, n * mean, outer))

    expected = ((mean_1 - mean_2).square() + (std_1 - std_2).square()).sum().item()
    assert frechet_distance(exact(mean_1, std_1), exact(mean_2, std_2)) == pytest.approx(expected, rel=1e-9)


def test_covariance_is_numpys_unbiased_one_and_needs_two_images() -> None:
    features = draw(9, torch.ones(4)).double()
    np.testing.assert_allclose(statistics_of(features).covariance(), np.cov(features.numpy(), rowvar=False), rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2 images; these statistics are of 1"):
        FeatureGaussian.of_features(features[:1])


def test_extrapolation_of_both_sides_finds_the_distance_of_the_distributions() -> None:
    std_a, std_b = torch.arange(1, 65) ** -0.5, torch.arange(1, 65) ** -0.3
    truth = float((std_a - std_b).square().sum()) + 64 * 0.1**2
    a, b = draw(500, std_a), draw(500, std_b, 0.1, seed=1)
    line = fid_against_count(a, b)
    assert line.counts[0] == 250
    assert line.counts[-1] == 500
    assert len(line.counts) == 15
    assert line.fids[-1] == pytest.approx(distance(a, b), rel=1e-9)
    assert line.fids[0] > line.fids[-1] > 1.15 * truth
    assert line.at_infinity == pytest.approx(truth, rel=0.05)
    half_done = fid_against_count(a, FeatureGaussian.of_features(b))
    assert half_done.fids[-1] == pytest.approx(line.fids[-1], rel=1e-9)
    assert truth < half_done.at_infinity < line.fids[-1]


def test_extrapolation_of_a_handful_of_images_uses_each_count_once() -> None:
    line = fid_against_count(draw(10, torch.ones(4)), FeatureGaussian.of_features(draw(30, torch.ones(4), seed=1)))
    assert line.counts == (5, 6, 7, 8, 9, 10)
