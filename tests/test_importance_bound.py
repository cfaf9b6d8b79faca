"""The importance-weighted bound against log p(x) of a linear-Gaussian VAE, and against densities written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from linear_gaussian import LinearGaussian, MemoryReader, draw
from vaetrain.metrics.importance_bound import BLOCK, image_scores, importance_bound, log_weights
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig


@pytest.fixture
def vae() -> LinearGaussian:
    return LinearGaussian((0.4, 0.3, 0.2))


def some(vae: LinearGaussian, num_images: int) -> Tensor:
    return vae.from_uint8(vae.images(num_images).images)


def test_with_the_exact_posterior_one_sample_gives_log_p(vae):
    x = some(vae, 20)
    scores = image_scores(vae, x, range(20), LikelihoodConfig(num_samples=60))
    exact = vae.log_prob(x)
    assert exact.std() > 1
    for column in range(4):  # k = 1, 10, 60, and the mean of log w
        torch.testing.assert_close(scores[:, column], exact, rtol=0, atol=2e-3)
    torch.testing.assert_close(scores[:, -1], torch.full((20,), 60.0).double(), rtol=1e-3, atol=0)


def test_with_a_wrong_posterior_the_bound_rises_from_the_elbo_to_log_p(vae, accelerator):
    vae.set_encoder(shift=0.4, stretch=1.3)
    reader = vae.images(40)
    exact = vae.log_prob(vae.from_uint8(reader.images)).mean().item()
    result = importance_bound(vae, reader, accelerator, LikelihoodConfig(None, num_samples=5000))
    means = [estimate.mean for estimate in result.bounds.values()]
    assert list(result.bounds) == [1, 10, 100, 1000, 5000]
    assert means[:3] == sorted(means[:3])
    assert means[2] < means[3] + 0.02 < means[4] + 0.04  # within their noise of log p(x)
    assert means[0] < exact - 2
    assert result.log_prob.mean == pytest.approx(exact, abs=0.02)
    assert result.log_prob.num_images == 40

    # log p(x) − ELBO = KL(q(z|x) ‖ p(z|x)), here the same for all images.
    kl = 0.5 * (0.4**2 / vae.posterior_variance + 1.3**2 - 1 - torch.tensor(1.3**2).log()).sum().item()
    assert result.elbo.mean == pytest.approx(exact - kl, abs=0.03)
    assert result.gain.mean == pytest.approx(result.log_prob.mean - result.elbo.mean, abs=1e-9)
    assert result.gain.standard_error < 0.1 * result.log_prob.standard_error
    assert 100 < result.effective_samples.mean < 4000


def test_the_bound_at_k_is_the_same_whatever_larger_k_is_asked_for_and_however_it_is_cut(vae):
    vae.set_encoder(shift=0.3)
    x = some(vae, 5)
    whole = image_scores(vae, x, [3, 5, 6, 9, 40], LikelihoodConfig(num_samples=1000))
    fewer = image_scores(vae, x, [3, 5, 6, 9, 40], LikelihoodConfig(num_samples=100))
    torch.testing.assert_close(fewer[:, :3], whole[:, :3], rtol=0, atol=1e-6)
    for batch_size in (1, 7, 64):
        cut = image_scores(vae, x, [3, 5, 6, 9, 40], LikelihoodConfig(num_samples=1000, batch_size=batch_size))
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-3)
    alone = image_scores(vae, x[3:4], [9], LikelihoodConfig(num_samples=1000))
    torch.testing.assert_close(alone, whole[3:4], rtol=0, atol=1e-3)
    other = image_scores(vae, x, [3, 5, 6, 9, 40], LikelihoodConfig(num_samples=1000, seed=1))
    assert (other[:, 0] - whole[:, 0]).abs().min() > 1e-3


def test_no_more_latents_are_decoded_at_a_time_than_batch_size(vae, accelerator):
    decoded: list[int] = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output)))
    for batch_size in (16, 120):
        decoded.clear()
        config = LikelihoodConfig(num_images=5, num_samples=2 * BLOCK + 3, batch_size=batch_size)
        importance_bound(vae, vae.images(9), accelerator, config)
        assert sum(decoded) == 5 * config.num_samples
        assert max(decoded) <= batch_size


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian-shared", "laplace-shared", "discretized-logistic"])
def test_weights_of_a_spatial_latent_are_the_densities_written_out(likelihood):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=8, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=3, likelihood=likelihood
    )
    vae = VAE(config).eval().requires_grad_(False)
    x = vae.from_uint8(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    posterior, noise = vae.encode(x), draw(2, 5, *config.latent_shape)
    log_w = log_weights(vae, x, posterior, noise, batch_size=3)
    for image in range(2):
        q = Normal(posterior.mean[image], (0.5 * posterior.logvar[image]).exp())
        for sample in range(5):
            z = posterior.mean[image] + (0.5 * posterior.logvar[image]).exp() * noise[image, sample]
            log_likelihood = vae.likelihood.log_prob(vae.decoder(z[None]), x[image : image + 1])
            expected = log_likelihood + Normal(0, 1).log_prob(z).sum() - q.log_prob(z).sum()
            assert log_w[image, sample].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_huge_weight_neither_overflows_nor_hides_the_others(vae):
    """Narrow likelihoods have log w of many thousands, far beyond what exp holds."""
    vae.likelihood.scaled_log_sigma.sub_(0.4)  # σ ← σ/55: weights differ by thousands of nats
    scores = image_scores(vae, some(vae, 4), range(4), LikelihoodConfig(num_samples=200))
    assert scores.isfinite().all()
    assert (
        scores[:, :3].diff(dim=1) >= -torch.tensor([10.0, 20.0]).log().double() - 1e-9
    ).all()  # a sample less than doubles the sum
    torch.testing.assert_close(scores[:, -1], torch.ones(4).double(), rtol=0, atol=0.9)


def test_a_deterministic_autoencoder_bounds_nothing(accelerator):
    vae = VAE(ModelConfig(kind="dense", image_size=4, in_channels=1, hidden_features=(4,), variational=False))
    with pytest.raises(ValueError, match="bounds no likelihood"):
        importance_bound(vae, MemoryReader(torch.zeros(4, 1, 4, 4, dtype=torch.uint8)), accelerator, LikelihoodConfig())
