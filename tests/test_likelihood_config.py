"""Counts that estimate nothing are refused with the remedy."""

import pytest

from vaetrain.metrics.likelihood_config import LikelihoodConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_images", 1),
        ("num_posteriors", 0),
        ("num_samples", 0),
        ("batch_size", 0),
        ("latents_per_image", 0),
        ("seed", -1),
    ],
)
def test_counts_that_estimate_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"--likelihood.{field.replace('_', '-')} is {value}"):
        LikelihoodConfig(**{field: value})


def test_the_bound_is_reported_at_powers_of_ten_and_the_largest_k():
    counts = [LikelihoodConfig(num_samples=k).sample_counts for k in (1, 2, 10, 5000)]
    assert counts == [(1,), (1, 2), (1, 10), (1, 10, 100, 1000, 5000)]
