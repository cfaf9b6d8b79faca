"""The train-validation gap: the same estimate on as many images of either split."""

from __future__ import annotations

import pytest
import torch

from linear_gaussian import LinearGaussian, MemoryReader
from vaetrain.metrics.elbo_gap import elbo_gap
from vaetrain.metrics.validation import validate
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig


def test_images_of_one_kind_have_no_gap_and_the_bound_is_their_log_p(accelerator):
    vae = LinearGaussian((0.4, 0.3))
    train, val = vae.images(900, seed=1), vae.images(400, seed=2)
    scores = elbo_gap(vae, train, val, accelerator, batch_size=64, seed=0)
    assert scores.train.num_images == scores.val.num_images == 400
    exact = vae.log_prob(
        vae.from_uint8(val.images)
    )  # of an exact posterior any sample's weight is log p(x) only on average
    assert scores.val.mean == pytest.approx(exact.mean().item(), abs=0.2)
    assert abs(scores.gap) < 3 * scores.standard_error
    assert 0.5 < scores.standard_error / (exact.std().item() * (2 / 400) ** 0.5) < 1.5


def test_learned_images_show_and_the_gap_s_sign_says_which(accelerator):
    vae = LinearGaussian((0.4, 0.3))
    likely, unlikely = vae.images(300), vae.images(200, seed=5)
    unlikely.images = torch.randint(0, 256, unlikely.images.shape, dtype=torch.uint8)
    scores = elbo_gap(vae, likely, unlikely, accelerator, batch_size=64, seed=0)
    assert scores.train.num_images == scores.val.num_images == 200
    assert scores.gap == scores.train.mean - scores.val.mean
    assert scores.gap > 10 * scores.standard_error > 0
    assert elbo_gap(vae, unlikely, likely, accelerator, batch_size=64, seed=0).gap < 0


def test_the_estimate_of_a_whole_split_is_that_of_validation(accelerator):
    vae = LinearGaussian((0.4, 0.3))
    val = vae.images(50)
    gap = elbo_gap(vae, vae.images(80, seed=1), val, accelerator, batch_size=16, seed=7)
    assert gap.val.mean == pytest.approx(validate(vae, val, accelerator, 16, seed=7).elbo_nats, rel=1e-5)


def test_a_deterministic_autoencoder_has_no_elbo(accelerator):
    vae = VAE(ModelConfig(kind="dense", image_size=4, in_channels=1, hidden_features=(4,), variational=False)).eval()
    reader = MemoryReader(torch.zeros(4, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="has no ELBO"):
        elbo_gap(vae, reader, reader, accelerator, batch_size=2, seed=0)
