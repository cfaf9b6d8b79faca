"""Protocols name the same images for good, and refuse what they cannot honour."""

from __future__ import annotations

import numpy as np
import pytest

from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.protocol import Protocol


def test_lecture_2k_is_the_default_and_its_floor_needs_as_many_images_again():
    protocol = Protocol.of(FidConfig(), 5000)
    assert (protocol.name, protocol.num_generated, protocol.num_reference, protocol.num_floor) == (
        "lecture-2k", 2000, 2000, 2000,
    )  # fmt: skip
    first, second = protocol.halves()
    assert set(first) == set(protocol.reference())
    assert set(second) == set(protocol.extra())
    assert not set(first) & set(second)
    assert (np.diff(protocol.reference()) > 0).all()
    assert not protocol.whole_split


def test_the_same_seed_names_the_same_images_and_another_others():
    reference = Protocol.of(FidConfig(num_images=20), 100).reference()
    assert reference.tolist() == [
        6, 13, 32, 42, 45, 48, 56, 57, 62, 69, 71, 72, 74, 80, 81, 87, 89, 90, 91, 92,
    ]  # fmt: skip
    assert set(reference) != set(Protocol.of(FidConfig(num_images=20, seed=1), 100).reference())


@pytest.mark.parametrize(
    ("num_split", "num_floor", "num_extra"), [(100, 40, 40), (70, 35, 30), (41, 20, 0), (40, 20, 0)]
)
def test_the_floor_has_the_largest_disjoint_halves_there_are(num_split: int, num_floor: int, num_extra: int):
    protocol = Protocol.of(FidConfig(num_images=40), num_split)
    first, second = protocol.halves()
    assert protocol.num_floor == len(first) == len(second) == num_floor
    assert not set(first) & set(second)
    assert len(protocol.extra()) == num_extra
    assert set(first) | set(second) <= set(protocol.reference()) | set(protocol.extra())


@pytest.mark.parametrize(("num_split", "num_generated"), [(5000, 10_000), (60_000, 60_000)])
def test_standard_is_the_whole_split_against_as_many_samples_and_at_least_ten_thousand(num_split, num_generated):
    protocol = Protocol.of(FidConfig(protocol="standard"), num_split)
    assert protocol.num_generated == num_generated
    assert protocol.whole_split
    assert protocol.reference().tolist() == list(range(num_split))
    assert protocol.num_floor == num_split // 2
    assert len(protocol.extra()) == 0


def test_too_small_a_split_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"--fid\.protocol lecture-2k compares 2000 but the train split has 100 images.*num-images 100"
    ):
        Protocol.of(FidConfig(), 100)
    with pytest.raises(ValueError, match="standard needs 10 images; the train split has 9"):
        Protocol.of(FidConfig(protocol="standard"), 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 9}, "--fid.num-images is 9"),
        ({"batch_size": 0}, "--fid.batch-size is 0"),
        ({"seed": -1}, "--fid.seed is -1"),
        ({"protocol": "standard", "num_images": 50}, "--fid.protocol standard says itself"),
        ({"protocol": "custom"}, "needs --fid.num-images"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FidConfig(**options)
