"""Noise belongs to images and steps: never to a batch, a process or the order of drawing."""

from __future__ import annotations

import pytest
import torch

from vaetrain.distributed.randomness import NUMBERS_AT_A_TIME, mixed_seed, noise_of_images, noise_of_training
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
    noise_of_training(0, slice(0, 8), (4,), CPU)
    assert torch.get_rng_state().equal(state)


def test_the_noise_of_training_depends_on_seed_and_position_alone_whatever_the_cut():
    noise, mirrored = noise_of_training(3, slice(640, 720), (4, 2, 2), CPU)
    assert noise.shape == (80, 4, 2, 2)
    assert mirrored.shape == (80,)
    for start, stop in ((640, 720), (640, 656), (645, 677), (659, 660), (719, 720)):
        part, mirrored_part = noise_of_training(3, slice(start, stop), (4, 2, 2), CPU)
        assert part.equal(noise[start - 640 : stop - 640])
        assert mirrored_part.equal(mirrored[start - 640 : stop - 640])
    for seed, start in ((4, 640), (3, 720), (640, 3)):
        other, other_mirrored = noise_of_training(seed, slice(start, start + 80), (4, 2, 2), CPU)
        assert not (other == noise).any()
        assert not other_mirrored.equal(mirrored)


def test_large_latents_are_drawn_in_pieces_that_every_gpu_draws_alike(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda piece, **_: drawn.append(piece.numel()))
    noise_of_training(0, slice(0, 1), (16, 64, 64), CPU)
    assert sum(drawn) == 16 * 16 * 64 * 64
    assert max(drawn) == NUMBERS_AT_A_TIME == 40_960


def test_noise_is_standard_normal_and_independent_across_images_and_batches():
    by_image = noise_of_images(0, range(4000), (25,))
    by_batch = torch.cat([noise_of_training(0, slice(40 * step, 40 * step + 40), (25,), CPU)[0] for step in range(100)])
    for noise in (by_image, by_batch):  # 100,000 numbers: standard errors of 0.003, 0.0045, 0.008 and 0.015
        assert noise.mean().abs() < 0.016
        assert (noise.var() - 1).abs() < 0.023
        assert noise.pow(3).mean().abs() < 0.062
        assert (noise.pow(4).mean() - 3).abs() < 0.16
        assert (noise[1:] * noise[:-1]).mean().abs() < 0.016  # adjacent images, the more so across a batch's edge
        assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.08  # dimensions of one image


def test_half_of_the_images_are_mirrored():
    coins = torch.cat([noise_of_training(1, slice(100 * step, 100 * step + 100), (1,), CPU)[1] for step in range(100)])
    assert abs(coins.float().mean().item() - 0.5) < 0.025


def test_seeds_are_mixed_well():
    seeds = {mixed_seed(seed, image) for seed in range(50) for image in range(50)}
    assert len(seeds) == 2500  # (1, 2) is not (2, 1), and adjacent numbers do not collide
    assert all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(bin(seed).count("1") for seed in seeds) / (63 * len(seeds))
    assert abs(ones - 0.5) < 0.01


def test_latents_of_the_prior_are_that_noise_times_the_temperature():
    torch.testing.assert_close(sample_standard_normal(5, [3, 9], (4,), 0.7), 0.7 * noise_of_images(5, [3, 9], (4,)))
