"""The FID's gap between the splits: 0 for samples of the data's distribution, above 0 for copies of training images."""

from __future__ import annotations

import pytest
import torch

from vaetrain.metrics.fid_gap import MAX_TRAIN_SETS, fid_gap
from vaetrain.metrics.fidelity import Gaussian, frechet_distance


def draw(num_images: int, seed: int, num_features: int = 16) -> torch.Tensor:
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def test_new_samples_are_as_far_from_both_splits():
    found = fid_gap(draw(400, 1), draw(1600, 2), draw(200, 3), seed=0)
    assert (found.num_real, len(found.train)) == (200, MAX_TRAIN_SETS)
    assert abs(found.gap) < 3 * found.standard_error
    assert 0 < found.standard_error < found.val


def test_copies_of_training_images_are_nearer_to_these():
    train = draw(400, 2)
    found = fid_gap(train.clone(), train, draw(200, 3), seed=0)
    assert len(found.train) == 2
    assert found.gap > 3 * found.standard_error > 0
    everything = fid_gap(train.clone(), train, draw(500, 3), seed=0)  # one set: the very same images
    assert everything.train == pytest.approx((0,), abs=1e-9)
    assert everything.num_real == 400
    assert everything.standard_error is None


def test_the_sets_are_disjoint_random_images_and_of_equal_size():
    train = torch.arange(10.0)[:, None].expand(10, 2) + draw(10, 5, 2) / 10  # ordered, as shards may be by class
    val = draw(4, 3, 2)
    found = fid_gap(draw(8, 1, 2), train, val, seed=0)
    assert found.val == frechet_distance(Gaussian.of_features(draw(8, 1, 2)), Gaussian.of_features(val))
    assert len(found.train) == 2
    assert found != fid_gap(draw(8, 1, 2), train, val, seed=1)
    in_order = frechet_distance(Gaussian.of_features(draw(8, 1, 2)), Gaussian.of_features(train[:4]))
    assert in_order not in found.train
