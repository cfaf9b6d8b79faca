"""The FID's gap between the splits: 0 for samples of the data's distribution, above 0 for copies of training images."""

from __future__ import annotations

import pytest
import torch

from vaetrain.metrics.fid_gap import MAX_TRAIN_SETS, FidGap, GapSets
from vaetrain.metrics.fidelity import FeatureGaussian, frechet_distance


def draw(num_images: int, seed: int, num_features: int = 16) -> torch.Tensor:
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def fid_gap(samples: torch.Tensor, train: torch.Tensor, val: torch.Tensor, seed: int) -> FidGap:
    return GapSets.draw(train, val, seed).gap(FeatureGaussian.of_features(samples))


def test_new_samples_are_as_far_from_both_splits():
    found = fid_gap(draw(400, 1), draw(1600, 2), draw(200, 3), seed=0)
    assert (found.num_real, len(found.train)) == (200, MAX_TRAIN_SETS)
    assert abs(found.gap) < 3 * found.standard_error
    assert 0 < found.standard_error < found.val


def test_copies_of_training_images_are_nearer_to_these():
    train = draw(400, 2)
    found = fid_gap(train.clone(), train, draw(200, 3), seed=0)
    assert found.gap > 3 * found.standard_error > 0


@pytest.mark.parametrize("num_val", [100, 200, 500])
def test_there_is_a_standard_error_however_many_validation_images_there_are(num_val):
    found = fid_gap(draw(400, 1), draw(400, 2), draw(num_val, 3), seed=0)
    assert (found.num_real, len(found.train)) == (100, 4)
    assert found.standard_error > 0


def test_the_sets_are_disjoint_random_images_and_of_equal_size():
    train = torch.arange(10.0)[:, None].expand(10, 2) + draw(10, 5, 2) / 10  # ordered, as shards may be by class
    train, val = torch.cat([train, train + 20]), draw(4, 3, 2)
    found = fid_gap(draw(8, 1, 2), train, val, seed=0)
    assert found.val == frechet_distance(FeatureGaussian.of_features(draw(8, 1, 2)), FeatureGaussian.of_features(val))
    assert (found.num_real, len(found.train)) == (4, 5)
    assert len(set(found.train)) == 5
    assert found != fid_gap(draw(8, 1, 2), train, val, seed=1)
    in_order = frechet_distance(FeatureGaussian.of_features(draw(8, 1, 2)), FeatureGaussian.of_features(train[:4]))
    assert in_order not in found.train
