"""KID is unbiased, and its standard error is the deviation between data sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vaetrain.metrics import kid as module
from vaetrain.metrics.kid import jackknife_variance, kid


def draw(num_images: int, seed: int, num_features: int = 32, shift: float = 0.0) -> torch.Tensor:
    return shift + torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def test_kid_is_unbiased():
    scores, details = kid(draw(400, 0, 16), draw(400, 1, 16))
    assert details == {"kid_subsets": 100, "kid_subset_size": 200}
    assert abs(scores["eval/kid"]) < 3 * scores["eval/kid_std_error"] < 0.05


@pytest.mark.parametrize("shift", [0.0, 0.3], ids=["equal", "different"])
def test_the_standard_error_is_the_deviation_between_data_sets(shift):
    found = [kid(draw(120, 2 * seed), draw(90, 2 * seed + 1, shift=shift))[0] for seed in range(40)]
    deviation = float(np.std([scores["eval/kid"] for scores in found], ddof=1))
    error = float(np.mean([scores["eval/kid_std_error"] for scores in found]))
    assert deviation / 1.2 < error < 1.5 * deviation


def test_the_order_of_the_images_does_not_matter_and_a_part_of_them_suffices(monkeypatch):
    samples, real = draw(800, 0), draw(600, 1, shift=0.3)
    in_order = jackknife_variance(samples, real[real[:, 0].argsort()])  # as shards may be by class
    assert in_order == pytest.approx(jackknife_variance(samples, real), rel=0.3)
    monkeypatch.setattr(module, "MAX_IMAGES", 300)
    assert jackknife_variance(samples, real) == pytest.approx(in_order, rel=0.4)


def test_before_what_is_counted_twice_is_taken_off_it_is_the_textbook_jackknife(monkeypatch):
    """Against the MMD computed anew without each image."""
    monkeypatch.setattr(module, "interaction_variance", lambda *_: 0.0)
    x, y = draw(12, 0, 3), draw(9, 1, 3, shift=0.5)

    def mmd(x, y):
        xx, yy, xy = ((a.double() @ b.double().T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        own = [(kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in (xx, yy)]
        return float(sum(own) - 2 * xy.mean())

    def without(t, i):
        return torch.cat([t[:i], t[i + 1 :]])

    sides = [[mmd(without(x, i), y) for i in range(12)], [mmd(x, without(y, i)) for i in range(9)]]
    expected = sum(np.var(values) * (len(values) - 1) for values in sides)
    assert jackknife_variance(x, y) == pytest.approx(expected, rel=1e-4)
