"""The ELBO: an identity with the exact log p(x), its reductions, free bits, and where its gradients go."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.model.likelihood import build_likelihood
from vaetrain.objective.elbo import negative_elbo, penalised_rate, rate

SIZE = 4
"""Height and width of the linear model's images: 16 pixels."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The linear-Gaussian VAE: p(z) = N(0, I), p(x|z) = N(Wz + b, σ²I), q(z|x) = N(Vx + c, diag(s²)).


class LinearGaussian(VAE):
    """A VAE without hidden layers, whose p(x) and p(z|x) are Gaussians known in closed form."""

    def __init__(self, latent_channels: int, likelihood: str) -> None:
        super().__init__(
            ModelConfig(
                kind="dense",
                image_size=SIZE,
                in_channels=1,
                hidden_features=(1,),
                latent_channels=latent_channels,
                likelihood=likelihood,
                sigma=0.5,
            )
        )
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 2 * latent_channels))
        self.decoder = nn.Sequential(
            nn.Linear(latent_channels, SIZE**2), Rearrange("b (c h w) -> b c h w", c=1, h=SIZE)
        )
        self.requires_grad_(False)
        self.decoder[0].weight.copy_(0.5 * draw(SIZE**2, latent_channels))
        self.decoder[0].bias.copy_(0.3 * draw(SIZE**2, seed=1))

    def exact_posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z|x), float64."""
        weight, bias = self.decoder[0].weight.double(), self.decoder[0].bias.double()
        variance = (2 * self.likelihood.log_sigma.double()).exp()
        precision = torch.eye(weight.shape[1], dtype=torch.float64) + weight.T @ weight / variance
        mean = torch.linalg.solve(precision, weight.T @ (x.double().flatten(1) - bias).T / variance).T
        return MultivariateNormal(mean, precision_matrix=precision)

    def exact_log_prob(self, x: Tensor) -> Tensor:
        """log p(x), float64: x ~ N(b, WWᵀ + σ²I)."""
        weight, bias = self.decoder[0].weight.double(), self.decoder[0].bias.double()
        variance = (2 * self.likelihood.log_sigma.double()).exp()
        covariance = weight @ weight.T + variance * torch.eye(SIZE**2, dtype=torch.float64)
        return MultivariateNormal(bias, covariance).log_prob(x.double().flatten(1))


def expected_terms(vae: VAE, x: Tensor, nodes_per_dim: int = 5) -> tuple[Tensor, Tensor]:
    """E_q[distortion] by Gauss-Hermite quadrature over the noise given to the model, and the KL; both per image."""
    latent_channels = vae.config.latent_channels
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(nodes_per_dim))
    grid = torch.tensor(list(itertools.product(nodes.tolist(), repeat=latent_channels)))
    grid_weights = torch.tensor(
        [math.prod(chosen) for chosen in itertools.product((weights / weights.sum()).tolist(), repeat=latent_channels)],
        dtype=torch.float64,
    )
    distortions, kls = [], []
    for image in x:
        terms = vae(image.expand(len(grid), -1, -1, -1), grid)
        distortions.append(grid_weights @ terms.distortion.double())
        kls.append(terms.kl[0])
    return torch.stack(distortions), torch.stack(kls)


@pytest.mark.parametrize("likelihood", ["gaussian-fixed", "gaussian-shared"])
def test_log_prob_is_elbo_plus_the_divergence_from_the_exact_posterior(likelihood):
    torch.manual_seed(0)
    vae = LinearGaussian(2, likelihood)
    x = draw(6, 1, SIZE, SIZE, seed=2)
    distortion, kl = expected_terms(vae, x)
    elbo = -negative_elbo(distortion, kl.double(), beta=1.0)

    q = vae.encode(x)
    q_full = MultivariateNormal(q.mean.double(), torch.diag_embed(q.logvar.double().exp()))
    gap = kl_divergence(q_full, vae.exact_posterior(x))
    assert gap.min() > 0.1  # the encoder is no good one, so that the identity says something
    torch.testing.assert_close(elbo + gap, vae.exact_log_prob(x), rtol=0, atol=1e-4)

    # With the lecture's −log σ for −log σ² the same check fails on every image.
    variance = q.logvar.double().exp()
    misprinted = 0.5 * (q.mean.double().square() + variance - 1 - 0.5 * q.logvar.double())
    wrong = -negative_elbo(distortion, misprinted, beta=1.0) + gap - vae.exact_log_prob(x)
    assert (wrong.abs() > 1e-2).all()


def test_the_elbo_is_log_prob_where_the_encoder_is_exact():
    torch.manual_seed(0)
    vae = LinearGaussian(1, "gaussian-fixed")  # in one dimension the exact posterior is a diagonal Gaussian
    x = draw(6, 1, SIZE, SIZE, seed=2)
    weight, bias = vae.decoder[0].weight, vae.decoder[0].bias
    posterior_variance = 1 / (1 + weight.square().sum() / 0.5**2)
    gain = posterior_variance * weight.T / 0.5**2
    vae.encoder[1].weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
    vae.encoder[1].bias.copy_(torch.cat([-gain @ bias, posterior_variance.log()[None]]))
    distortion, kl = expected_terms(vae, x)
    elbo = -negative_elbo(distortion, kl.double(), beta=1.0)
    torch.testing.assert_close(elbo, vae.exact_log_prob(x), rtol=0, atol=1e-4)


# Reductions, β and free bits.


@pytest.mark.parametrize("latent", [(7,), (3, 2, 2)])
def test_beta_one_without_free_bits_is_minus_the_elbo(latent):
    distortion, kl = draw(5), draw(5, *latent).square()
    assert rate(kl).equal(kl.reshape(5, -1).sum(1))
    assert negative_elbo(distortion, kl, beta=1.0).equal(distortion + rate(kl))


def test_beta_weighs_the_rate_alone():
    distortion, kl = draw(5), draw(5, 7).square()
    assert negative_elbo(distortion, kl, beta=0.0).equal(distortion)
    torch.testing.assert_close(negative_elbo(distortion, kl, beta=4.0), distortion + 4 * kl.sum(1))


def test_free_bits_charge_every_dimension_at_least_the_floor_and_push_none_below_it():
    kl = torch.tensor([[0.1, 0.4, 2.0], [0.5, 0.0, 0.6]], requires_grad=True)
    penalised = penalised_rate(kl, free_bits=0.45)
    torch.testing.assert_close(penalised, torch.tensor([0.45 + 0.45 + 2.0, 0.5 + 0.45 + 0.6]))
    (gradient,) = torch.autograd.grad(penalised.sum(), kl)
    assert gradient.tolist() == [[0, 0, 1], [1, 0, 1]]
    assert penalised_rate(kl, free_bits=0.0).equal(rate(kl))


@pytest.mark.parametrize("free_bits", [0.0, 0.2])
def test_an_image_s_loss_does_not_depend_on_how_its_batch_is_cut(free_bits):
    torch.manual_seed(0)
    vae = VAE(ModelConfig(image_size=8, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4))
    x, noise = draw(7, 3, 8, 8).tanh(), draw(7, *vae.config.latent_shape)

    def losses(start: int, stop: int) -> Tensor:
        terms = vae(x[start:stop], noise[start:stop])
        return negative_elbo(terms.distortion, terms.kl, beta=2.0, free_bits=free_bits).detach()

    whole = losses(0, 7)
    assert whole.shape == (7,)
    for cuts in ((0, 4, 7), (0, 1, 3, 7)):
        pieces = torch.cat([losses(start, stop) for start, stop in itertools.pairwise(cuts)])
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pixels", ["[-1, 1]", "[0, 1]"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mse_plus_weighted_kl_is_the_elbo_at_the_variance_that_the_docs_name(reduction, pixels):
    weight, num_pixels = 1e-3, 3 * 8 * 8
    x, recon, kl = draw(5, 3, 8, 8).tanh(), draw(5, 3, 8, 8, seed=1).tanh(), draw(5, 7).square()
    to_units = (lambda x: x) if pixels == "[-1, 1]" else (lambda x: (x + 1) / 2)
    squared_errors = (to_units(x) - to_units(recon)).square().flatten(1)
    lecture = (squared_errors.sum(1) if reduction == "sum" else squared_errors.mean(1)) + weight * kl.sum(1)

    variance = weight / 2 * (num_pixels if reduction == "mean" else 1) * (4 if pixels == "[0, 1]" else 1)
    likelihood = build_likelihood(ModelConfig(likelihood="gaussian-fixed", sigma=math.sqrt(variance)))
    constant = num_pixels * 0.5 * math.log(2 * math.pi * variance)
    ours = negative_elbo(-likelihood.log_prob(recon, x), kl, beta=1.0)
    torch.testing.assert_close(ours - constant, lecture / weight)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_l1_with_logvar_plus_weighted_kl_and_lpips_is_the_elbo_that_the_docs_name(reduction):
    kl_weight, lpips_weight, num_pixels, num_latents = 0.1, 0.25, 3 * 8 * 8, 7
    x, recon, kl = draw(5, 3, 8, 8).tanh(), draw(5, 3, 8, 8, seed=1).tanh(), draw(5, num_latents).square()
    lpips = torch.rand(5, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    likelihood = build_likelihood(ModelConfig(likelihood="laplace-shared", sigma=0.3))
    logvar = likelihood.log_b.detach().clone().requires_grad_()

    nll = ((x - recon).abs() + lpips_weight * lpips) / logvar.exp() + logvar
    if reduction == "sum":  # latent-diffusion, sgm
        theirs = nll.flatten(1).sum(1) + kl_weight * kl.sum(1)
        constant = -num_pixels * math.log(2)
    else:  # MosaicML
        per_pixel = (nll + 2).flatten(1).mean(1) + kl_weight * num_latents / num_pixels * kl.mean(1)
        theirs, constant = num_pixels * per_pixel, num_pixels * (2 - math.log(2))

    weight = lpips_weight * num_pixels / likelihood.log_b.exp().detach()
    ours = negative_elbo(-likelihood.log_prob(recon, x), kl, beta=kl_weight) + weight * lpips.flatten()
    torch.testing.assert_close(ours + constant, theirs)

    # Without LPIPS, which they divide by the width that they learn, the widths follow the same gradient.
    (wanted,) = torch.autograd.grad(
        (theirs - weight * lpips.flatten() * (likelihood.log_b.detach() - logvar).exp()).sum(), logvar
    )
    (gradient,) = torch.autograd.grad(ours.sum(), likelihood.scaled_log_sigma)
    (chain,) = torch.autograd.grad(likelihood.log_b, likelihood.scaled_log_sigma)
    torch.testing.assert_close(gradient / chain, wanted)


# Where the gradients go.

ARCHITECTURES = {
    "conv-spatial": {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 2},
    "conv-vector": {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "latent": "vector"},
    "conv-attention": {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)},
    "dense": {"kind": "dense", "hidden_features": (16, 8), "latent_channels": 3},
}
LIKELIHOODS = [
    "gaussian-fixed",
    "gaussian-shared",
    "gaussian-pixel",
    "laplace-shared",
    "bernoulli",
    "discretized-logistic",
    "logistic-mixture",
]


def parameters_without_gradient(loss: Tensor, module: nn.Module) -> list[str]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None or not gradient.any()]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_reach_every_parameter_from_the_distortion_and_the_encoder_s_from_the_rate(architecture, likelihood):
    torch.manual_seed(0)
    vae = VAE(ModelConfig(image_size=8, likelihood=likelihood, num_mixtures=2, **ARCHITECTURES[architecture]))
    x = vae.from_uint8(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    noise = draw(4, *vae.config.latent_shape)

    # Residual branches end in zeros, which keeps gradients from what lies before; one step of any size ends that.
    terms = vae(x, noise)
    (terms.distortion.mean() + rate(terms.kl).mean()).backward()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter -= 1e-2 * parameter.grad / (parameter.grad.norm() + 1e-8)

    terms = vae(x, noise)
    assert parameters_without_gradient(terms.distortion.sum(), vae) == []
    assert parameters_without_gradient(rate(terms.kl).sum(), vae.encoder) == []


def test_only_the_ends_of_residual_branches_learn_in_the_very_first_step():
    torch.manual_seed(0)
    vae = VAE(ModelConfig(image_size=8, **ARCHITECTURES["conv-attention"]))
    terms = vae(draw(2, 3, 8, 8).tanh(), draw(2, *vae.config.latent_shape))
    silent = parameters_without_gradient(terms.distortion.sum(), vae)
    assert {name.split(".")[-2] for name in silent} == {"norm", "qkv", "norm1", "conv1", "norm2"}
