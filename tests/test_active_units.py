"""Which latent dimensions are active: exact variances, however the split is cut."""

from __future__ import annotations

import pytest
import torch

from linear_gaussian import LinearGaussian, MemoryReader
from vaetrain.metrics.active_units import THRESHOLD, LatentActivity, latent_activity
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig


def test_a_dimension_that_the_decoder_does_not_use_is_inactive(accelerator):
    """Var E[z_d|x] = 1 − posterior variance; the KL of the exact posterior averages to −½ log posterior variance."""
    vae = LinearGaussian((0.4, 1e-3, 0.2))
    activity = latent_activity(vae, vae.images(4000), accelerator, batch_size=512)
    assert activity.active_units == 2
    torch.testing.assert_close(activity.variance, 1 - vae.posterior_variance, rtol=0.07, atol=1e-3)
    torch.testing.assert_close(activity.kl, -0.5 * vae.posterior_variance.log(), rtol=0.07, atol=1e-3)
    assert activity.most_active(2).tolist() == [0, 2]
    assert activity.most_active(9).tolist() == [0, 2, 1]


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_mean_and_variance_are_exact_for_any_batch_size(batch_size, accelerator):
    torch.manual_seed(0)
    config = ModelConfig(image_size=8, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=3)
    vae = VAE(config).eval().requires_grad_(False)
    vae.encoder.out.bias.add_(1000.0)  # a sum of squares would lose its digits here
    reader = MemoryReader(torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8))
    activity = latent_activity(vae, reader, accelerator, batch_size)
    posterior = vae.encode(vae.from_uint8(reader.images))
    assert activity.variance.shape == activity.mean.shape == activity.kl.shape == (3, 4, 4)
    torch.testing.assert_close(activity.mean, posterior.mean.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(activity.variance, posterior.mean.double().var(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(activity.kl, posterior.kl().double().mean(0), rtol=1e-5, atol=0)


def test_the_threshold_is_that_of_the_paper():
    variance = torch.tensor([0.0099, 0.0101, 3.0]).double()
    assert THRESHOLD == 0.01
    assert LatentActivity(torch.zeros(3).double(), variance, torch.zeros(3).double()).active_units == 2


def test_a_deterministic_autoencoder_has_active_units_and_no_kl(accelerator):
    config = ModelConfig(kind="dense", image_size=4, in_channels=1, hidden_features=(4,), variational=False)
    reader = MemoryReader(torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8))
    activity = latent_activity(VAE(config).eval(), reader, accelerator, batch_size=8)
    assert 0 < activity.active_units <= 16
    assert activity.kl.count_nonzero() == 0


def test_one_image_has_no_variance(accelerator):
    vae = LinearGaussian((0.4, 0.2))
    with pytest.raises(ValueError, match="at least 2 of them; the split has 1"):
        latent_activity(vae, vae.images(1), accelerator, batch_size=8)
