"""Rate = mutual information + marginal KL: by brute force, and where they are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from linear_gaussian import LinearGaussian, MemoryReader, draw
from vaetrain.distributed.randomness import mixed_seed, noise_of_images
from vaetrain.metrics import elbo_surgery as module
from vaetrain.metrics.elbo_surgery import elbo_surgery, log_aggregate, log_dimension_aggregates
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.model.posterior import DiagonalGaussian


def mixture(posterior: DiagonalGaussian) -> MixtureSameFamily:
    components = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    return MixtureSameFamily(Categorical(torch.ones(len(posterior.mean)).double()), Independent(components, 1))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)


@pytest.mark.usefixtures("small_blocks")
def test_densities_of_the_aggregate_are_those_of_the_mixture():
    posterior = DiagonalGaussian(draw(50, 7), draw(50, 7, seed=1) - 1)
    z = 1.5 * draw(33, 7, seed=2).double()
    torch.testing.assert_close(log_aggregate(z, posterior), mixture(posterior).log_prob(z), rtol=0, atol=1e-9)
    each = log_dimension_aggregates(z, posterior)
    for dimension in range(7):
        marginal = DiagonalGaussian(posterior.mean[:, [dimension]], posterior.logvar[:, [dimension]])
        expected = mixture(marginal).log_prob(z[:, [dimension]])
        torch.testing.assert_close(each[:, dimension], expected, rtol=0, atol=1e-9)


def test_narrow_posteriors_far_from_zero_lose_no_digits():
    """At σ = 1e-4 and μ = 5 the terms of the expanded square are 2.5e9 times the result."""
    posterior = DiagonalGaussian(5 + draw(40, 6), torch.full((40, 6), 2 * math.log(1e-4)))
    z = posterior.mean.double() + 1e-4 * draw(40, 6, seed=1)
    torch.testing.assert_close(log_aggregate(z, posterior), mixture(posterior).log_prob(z), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("latents_per_image", [1, 3])
def test_every_part_is_that_of_the_brute_force(latents_per_image: int, accelerator):
    torch.manual_seed(0)
    config = ModelConfig(image_size=8, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2)
    vae = VAE(config).eval().requires_grad_(False)
    vae.encoder.out.weight.mul_(1.3)  # posteriors that overlap in part
    reader = MemoryReader(torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8))
    surgery = elbo_surgery(
        vae, reader, accelerator, LikelihoodConfig(latents_per_image=latents_per_image, seed=3), batch_size=7
    )

    q = vae.encode(vae.from_uint8(reader.images))
    q = DiagonalGaussian(q.mean.flatten(1), q.logvar.flatten(1))
    components = Independent(Normal(q.mean.double(), (0.5 * q.logvar.double()).exp()), 1)
    information = []
    for number in range(latents_per_image):
        noise = noise_of_images(mixed_seed(3, number, module.SURGERY), range(50), config.latent_shape).flatten(1)
        z = q.mean.double() + (0.5 * q.logvar.double()).exp() * noise
        information.append(components.log_prob(z) - mixture(q).log_prob(z))
    expected = torch.stack(information).mean(0)
    rate = q.kl().double().sum(1)
    assert 0.5 < expected.mean() < math.log(50) - 0.5
    assert surgery.rate.mean == pytest.approx(rate.mean().item(), rel=1e-5)
    assert surgery.mutual_information.mean == pytest.approx(expected.mean().item(), rel=1e-5)
    assert surgery.mutual_information.standard_error == pytest.approx(expected.std().item() / 50**0.5, rel=1e-4)
    assert surgery.marginal_kl.mean == pytest.approx((rate - expected).mean().item(), rel=1e-5)
    assert surgery.rate.mean == pytest.approx(surgery.mutual_information.mean + surgery.marginal_kl.mean, rel=1e-12)
    assert surgery.dimension_kl.shape == (32,)
    assert surgery.dimension_kl.sum().item() == pytest.approx(surgery.dimension_kl_sum.mean, rel=1e-9)


@pytest.mark.usefixtures("small_blocks")
def test_latents_are_drawn_a_block_at_a_time(accelerator, monkeypatch):
    """In float64, and with their noise, those of all images would be five times what the moments hold."""
    sizes = []

    def counting(seed, indices, shape):
        sizes.append(len(indices))
        return noise_of_images(seed, indices, shape)

    monkeypatch.setattr(module, "noise_of_images", counting)
    config = ModelConfig(image_size=8, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2)
    reader = MemoryReader(torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8))
    elbo_surgery(VAE(config).eval(), reader, accelerator, LikelihoodConfig(), batch_size=7)
    assert sizes == [16, 16, 16, 2]


def test_exact_posteriors_of_many_images_make_up_the_prior(accelerator):
    """I(x; z) = ½ log det(I + WᵀW/σ²), and nothing is left for the marginal KL."""
    vae = LinearGaussian((0.4, 0.2))
    surgery = elbo_surgery(vae, vae.images(3000), accelerator, LikelihoodConfig(), batch_size=500)
    assert vae.mutual_information() == pytest.approx(0.5 * math.log(17 * 5))
    assert surgery.rate.mean == pytest.approx(vae.mutual_information(), abs=3 * surgery.rate.standard_error)
    assert surgery.mutual_information.mean == pytest.approx(vae.mutual_information(), abs=0.06)
    assert surgery.marginal_kl.mean == pytest.approx(0, abs=0.06)
    assert surgery.dimension_kl.abs().max() < 0.06
    assert surgery.total_correlation == pytest.approx(0, abs=0.12)


def test_a_shift_of_all_codes_is_marginal_kl_and_no_information(accelerator):
    vae = LinearGaussian((0.4, 0.2))
    vae.set_encoder(shift=1.5)
    surgery = elbo_surgery(vae, vae.images(3000), accelerator, LikelihoodConfig(latents_per_image=2), batch_size=500)
    assert surgery.mutual_information.mean == pytest.approx(vae.mutual_information(), abs=0.06)
    assert surgery.marginal_kl.mean == pytest.approx(2 * 0.5 * 1.5**2, abs=0.15)
    torch.testing.assert_close(surgery.dimension_kl, torch.full((2,), 0.5 * 1.5**2).double(), rtol=0, atol=0.15)


def test_distinct_images_reach_the_limit_and_fewer_images_a_lower_one(accelerator):
    vae = LinearGaussian((0.4, 0.3, 0.3, 0.25))
    vae.set_encoder(stretch=1e-4)
    reader = vae.images(200)
    for num_posteriors, expected in ((None, 200), (20, 20)):
        surgery = elbo_surgery(vae, reader, accelerator, LikelihoodConfig(num_posteriors=num_posteriors), batch_size=64)
        assert surgery.rate.num_images == expected
        assert surgery.limit == pytest.approx(math.log(expected))
        assert surgery.mutual_information.mean == pytest.approx(math.log(expected), abs=1e-4)
        assert surgery.marginal_kl.mean == pytest.approx(surgery.rate.mean - math.log(expected), abs=1e-4)


def test_a_dependence_between_dimensions_is_total_correlation(accelerator):
    """Codes on a diagonal: each dimension alone looks standard normal, both together do not."""
    vae = LinearGaussian((0.4, 0.4))
    vae.set_encoder()
    vae.encoder[1].weight[1].copy_(vae.encoder[1].weight[0])
    vae.encoder[1].bias[1] = vae.encoder[1].bias[0]
    surgery = elbo_surgery(vae, vae.images(2000), accelerator, LikelihoodConfig(), batch_size=500)
    variance, covariance = 1.0, (1 - vae.posterior_variance[0]).item()
    assert surgery.dimension_kl.abs().max() < 0.1
    assert surgery.total_correlation == pytest.approx(-0.5 * math.log(variance**2 - covariance**2), abs=0.15)


def test_a_deterministic_autoencoder_has_no_densities(accelerator):
    vae = VAE(ModelConfig(kind="dense", image_size=4, in_channels=1, hidden_features=(4,), variational=False)).eval()
    images: Tensor = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no posterior density"):
        elbo_surgery(vae, MemoryReader(images), accelerator, LikelihoodConfig(), batch_size=2)
