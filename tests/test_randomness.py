"""Noise belongs to images and steps: never to a batch, a process or the order of drawing."""

from __future__ import annotations

import pytest
import torch

from vaetrain.distributed.randomness import mixed_seed, noise_of_global_batch, noise_of_images
from vaetrain.model.prior import sample_standard_normal

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3,), (16,), (4, 5, 5)])
def test_the_noise_of_an_image_depends_on_seed_and_image_alone(shape):
    whole = noise_of_images(7, range(20), shape)
    assert whole.shape == (20, *shape)
    assert whole.dtype == torch.float32
    assert noise_of_images(7, [13, 2, 13], shape).equal(whole[[13, 2, 13]])
    assert noise_of_images(7, range(5, 9), shape).equal(whole[5:9])
    assert noise_of_images(7, [], shape).shape == (0, *shape)
    assert not noise_of_images(8, range(20), shape).equal(whole)


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    noise_of_images(0, range(3), (4,))
    noise_of_global_batch(0, 0, 8, (4,), CPU)
    assert torch.get_rng_state().equal(state)


def test_the_noise_of_a_global_batch_depends_on_seed_and_images_seen():
    noise, mirror = noise_of_global_batch(3, 640, 64, (4, 2, 2), CPU)
    assert noise.shape == (64, 4, 2, 2)
    assert mirror.shape == (64,)
    again, mirror_again = noise_of_global_batch(3, 640, 64, (4, 2, 2), CPU)
    assert again.equal(noise)
    assert mirror_again.equal(mirror)
    for seed, images_seen in ((4, 640), (3, 704), (640, 3)):
        other, other_mirror = noise_of_global_batch(seed, images_seen, 64, (4, 2, 2), CPU)
        assert not other.equal(noise)
        assert not other_mirror.equal(mirror)


def test_noise_is_standard_normal_and_independent_across_images_and_batches():
    by_image = noise_of_images(0, range(4000), (25,))
    by_batch = torch.cat([noise_of_global_batch(0, 40 * step, 40, (25,), CPU)[0] for step in range(100)])
    for noise in (by_image, by_batch):  # 100,000 numbers: standard errors of 0.003, 0.0045, 0.008 and 0.015
        assert noise.mean().abs() < 0.016
        assert (noise.var() - 1).abs() < 0.023
        assert noise.pow(3).mean().abs() < 0.062
        assert (noise.pow(4).mean() - 3).abs() < 0.16
        assert (noise[1:] * noise[:-1]).mean().abs() < 0.016  # adjacent images, the more so across a batch's edge
        assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.08  # dimensions of one image


def test_half_of_the_images_are_mirrored():
    coins = torch.cat([noise_of_global_batch(1, 100 * step, 100, (1,), CPU)[1] for step in range(100)])
    assert abs(coins.float().mean().item() - 0.5) < 0.025


def test_seeds_are_mixed_well():
    seeds = {mixed_seed(seed, image) for seed in range(50) for image in range(50)}
    assert len(seeds) == 2500  # (1, 2) is not (2, 1), and adjacent numbers do not collide
    assert all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(bin(seed).count("1") for seed in seeds) / (63 * len(seeds))
    assert abs(ones - 0.5) < 0.01


def test_latents_of_the_prior_are_that_noise_times_the_temperature():
    torch.testing.assert_close(sample_standard_normal(5, [3, 9], (4,), 0.7), 0.7 * noise_of_images(5, [3, 9], (4,)))
