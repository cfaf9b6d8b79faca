"""q(z|x): the closed-form KL against torch.distributions and Monte Carlo, and the reparameterisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vaetrain.model.posterior import LOGVAR_RANGE, DiagonalGaussian, PointMass, kl_to_standard_normal

MEANS = torch.linspace(-4, 4, 9).repeat_interleave(9)[None]
LOGVARS = torch.linspace(-8, 4, 9).repeat(9)[None]


def reference_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))


def random_posterior(*shape: int, seed: int = 0) -> DiagonalGaussian:
    moments = torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=torch.Generator().manual_seed(seed))
    return DiagonalGaussian.from_moments(moments)


def test_kl_agrees_with_torch_distributions():
    torch.testing.assert_close(kl_to_standard_normal(MEANS, LOGVARS), reference_kl(MEANS, LOGVARS))


def test_the_lecture_s_misprint_would_not_pass_for_the_kl():
    std = (0.5 * LOGVARS).exp()
    true = reference_kl(MEANS, LOGVARS)
    for sigma in (std, std.square()):  # whether σ is read as the standard deviation or, as it says there, the variance
        misprinted = 0.5 * (MEANS.square() + sigma.square() - 1 - sigma.log())
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(misprinted, true)
    assert (0.5 * (MEANS.square() + std.square() - 1 - std.log()) < 0).any()  # which no divergence is


def test_kl_agrees_with_monte_carlo():
    posterior = DiagonalGaussian(torch.tensor([[0.0, -1.5, 0.3, 2.0]]), torch.tensor([[0.0, -2.0, 1.0, -6.0]]))
    noise = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    z = posterior.sample(noise=noise)
    log_ratio = Normal(posterior.mean, (0.5 * posterior.logvar).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    standard_error = log_ratio.std(0) / len(z) ** 0.5
    assert ((log_ratio.mean(0) - posterior.kl()[0]).abs() <= 5 * standard_error + 1e-6).all()


def test_kl_vanishes_at_the_prior_alone_and_keeps_its_digits_near_it():
    zero = torch.zeros(1, 3)
    assert kl_to_standard_normal(zero, zero).eq(0).all()
    logvar = torch.tensor([[-1e-2, 1e-3, 1e-2]])
    torch.testing.assert_close(kl_to_standard_normal(zero, logvar), logvar.square() / 4, rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("latent", [(5,), (4, 3, 2)])
def test_moments_are_split_into_float32_mean_and_bounded_log_variance(latent):
    moments = 100 * torch.randn(2, 2 * latent[0], *latent[1:], generator=torch.Generator().manual_seed(1))
    posterior = DiagonalGaussian.from_moments(moments.bfloat16())
    assert posterior.mean.shape == posterior.logvar.shape == posterior.kl().shape == (2, *latent)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    torch.testing.assert_close(posterior.mean, moments[:, : latent[0]].bfloat16().float())
    assert posterior.logvar.min() == LOGVAR_RANGE[0]
    assert posterior.logvar.max() == LOGVAR_RANGE[1]
    assert posterior.kl().isfinite().all()


def test_infinite_log_variances_of_an_overflowing_encoder_stay_finite():
    posterior = DiagonalGaussian.from_moments(torch.tensor([[0.0, 0.0, torch.inf, -torch.inf]]))
    assert posterior.kl().isfinite().all()
    assert posterior.sample(noise=torch.ones(1, 2)).isfinite().all()


def test_a_sample_is_mean_plus_sigma_times_noise():
    posterior = random_posterior(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    z = posterior.sample(noise=noise)
    torch.testing.assert_close(z, posterior.mean + posterior.logvar.exp().sqrt() * noise)
    assert posterior.sample(noise=torch.zeros_like(noise)).equal(posterior.mode())
    drawn = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_sample_moments_are_the_posterior_s():
    posterior = random_posterior(1, 4)
    z = posterior.sample(noise=torch.randn(100_000, 4, generator=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(z.mean(0), posterior.mean[0], rtol=0, atol=0.03)
    torch.testing.assert_close(z.var(0).log(), posterior.logvar[0], rtol=0, atol=0.03)


def test_gradients_pass_through_a_sample_to_mean_and_log_variance():
    mean, logvar = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    noise = torch.tensor([[1.0, -2.0]])
    DiagonalGaussian(mean, logvar).sample(noise=noise).sum().backward()
    assert mean.grad.eq(1).all()
    torch.testing.assert_close(logvar.grad, 0.5 * noise)


def test_a_point_mass_is_certain_and_has_no_rate():
    posterior = PointMass(torch.randn(2, 3, 4, 4))
    assert posterior.sample(noise=torch.ones(2, 3, 4, 4)).equal(posterior.mode())
    assert posterior.sample().equal(posterior.mean)
    assert posterior.kl().eq(0).all()
    assert posterior.kl().shape == (2, 3, 4, 4)
