"""p(x|z): every likelihood is a distribution, agrees with an independent formula and survives extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Laplace as TorchLaplace

from vaetrain.model.config import ModelConfig
from vaetrain.model.likelihood import (
    BIN_WIDTH,
    MAX_LOG_SCALE,
    MIN_LOG_SIGMA,
    Gaussian,
    Laplace,
    Likelihood,
    LogisticMixture,
    PixelGaussian,
    build_likelihood,
    from_uint8,
    soft_lower_bound,
)

DENSITIES = ["gaussian-fixed", "gaussian-shared", "gaussian-pixel", "laplace-shared"]
MASSES = ["discretized-logistic", "logistic-mixture"]
ALL = [*DENSITIES, "bernoulli", *MASSES]
LEVELS = torch.arange(256, dtype=torch.uint8)[:, None, None, None]
SCALE_PARAMS = [-1e4, -5.5, -1.0, 0.0, 2.0, 1e4]
"""The number a decoder may put out for a log-scale, from far below its lower bound to far above any upper one."""


def build(name: str) -> Likelihood:
    return build_likelihood(ModelConfig(likelihood=name, num_mixtures=3))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_images(likelihood: Likelihood, *shape: int, seed: int = 0) -> Tensor:
    levels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return from_uint8(levels, likelihood.pixel_range)


def of_one_pixel(likelihood: Likelihood, params: list[float], x: Tensor) -> Tensor:
    """log p of each of the values x of one pixel whose parameters are `params`."""
    column = torch.tensor(params).reshape(1, -1, 1, 1)
    return likelihood.log_prob(column.expand(x.numel(), -1, 1, 1), x.reshape(-1, 1, 1, 1))


def logistic(mean: Tensor, scale: Tensor) -> Distribution:
    base = Uniform(torch.zeros_like(mean), torch.ones_like(mean))
    return TransformedDistribution(base, [SigmoidTransform().inv, AffineTransform(mean, scale)])


def level_probabilities(mean: Tensor, scale: Tensor) -> Tensor:
    """(n,) means and scales → (n, 256) probabilities of the levels in float64, straight from the definition."""
    edges = torch.linspace(-1 - BIN_WIDTH / 2, 1 + BIN_WIDTH / 2, 257, dtype=torch.float64)[1:-1]
    cdf = logistic(mean.double()[:, None], scale.double()[:, None]).cdf(edges)
    return torch.nn.functional.pad(torch.nn.functional.pad(cdf, (1, 0)), (0, 1), value=1.0).diff(dim=1)


def pixels_of_mixture(likelihood: LogisticMixture, params: Tensor) -> Tensor:
    """(n, k, 1, 1) parameters → (n, 256) probabilities of the levels, mixed in float64."""
    log_weights, mean, log_scale = (part.flatten(1) for part in likelihood.split(params))
    components = zip(log_weights.double().exp(), mean, log_scale.exp(), strict=True)
    return sum(weight[:, None] * level_probabilities(mean, scale) for weight, mean, scale in components)


@pytest.mark.parametrize("scale_param", SCALE_PARAMS[:-1])
@pytest.mark.parametrize("mean", [-1.0, 0.3, 2.5])
@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_one(name, mean, scale_param):
    likelihood = build(name)
    if name == "gaussian-pixel":
        params, sigma = [mean, scale_param], soft_lower_bound(torch.tensor(scale_param), MIN_LOG_SIGMA).exp()
    else:
        params, sigma = [mean], likelihood.log_sigma.exp().detach()
    x = mean + sigma * torch.linspace(-12, 12, 8001)
    density = of_one_pixel(likelihood, params, x).exp().detach()
    assert density.dtype == torch.float32
    assert torch.trapezoid(density.double(), x.double()).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("scale_param", SCALE_PARAMS)
@pytest.mark.parametrize("mean", [-1e4, -1.3, -1.0, 0.004, 0.7, 40.0])
def test_the_256_levels_of_a_discretized_logistic_sum_to_one(mean, scale_param):
    likelihood = build("discretized-logistic")
    log_prob = of_one_pixel(likelihood, [mean, scale_param], from_uint8(LEVELS, likelihood.pixel_range))
    assert log_prob.dtype == torch.float32
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_256_levels_of_logistic_mixtures_sum_to_one():
    likelihood = build("logistic-mixture")
    for spread in (0.5, 3.0, 30.0):
        for params in spread * draw(20, 9):
            log_prob = of_one_pixel(likelihood, params.tolist(), from_uint8(LEVELS, likelihood.pixel_range))
            assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_two_values_of_a_bernoulli_sum_to_one():
    for logit in (-80.0, -3.0, 0.0, 0.5, 30.0):
        assert of_one_pixel(build("bernoulli"), [logit], torch.tensor([0.0, 1.0])).exp().sum().item() == pytest.approx(
            1
        )


@pytest.mark.parametrize("name", ["gaussian-fixed", "gaussian-shared"])
def test_gaussians_agree_with_torch_distributions(name):
    likelihood = build(name)
    params, x = draw(4, 3, 8, 8), random_images(likelihood, 4, 3, 8, 8)
    expected = Normal(params, likelihood.log_sigma.exp()).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(params, x), expected)


def test_laplace_agrees_with_torch_distributions_and_so_do_its_gradients():
    likelihood = build("laplace-shared")
    params, x = draw(4, 3, 8, 8).requires_grad_(), random_images(likelihood, 4, 3, 8, 8)
    expected = TorchLaplace(params, likelihood.log_sigma.exp() / math.sqrt(2)).log_prob(x).sum((1, 2, 3))
    log_prob = likelihood.log_prob(params, x)
    torch.testing.assert_close(log_prob, expected)
    wanted = torch.autograd.grad(expected.sum(), (params, likelihood.scaled_log_sigma))
    torch.testing.assert_close(torch.autograd.grad(log_prob.sum(), (params, likelihood.scaled_log_sigma)), wanted)


def test_pixel_gaussian_agrees_with_torch_distributions():
    likelihood = PixelGaussian()
    params, x = 3 * draw(4, 6, 8, 8), random_images(likelihood, 4, 3, 8, 8)
    sigma = torch.nn.functional.softplus(params[:, 3:] - MIN_LOG_SIGMA).exp() * BIN_WIDTH / 2
    expected = Normal(params[:, :3], sigma).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(params, x), expected)


def test_bernoulli_agrees_with_torch_distributions_and_is_an_expectation_for_grey_pixels():
    likelihood = build("bernoulli")
    logits, binary = 5 * draw(4, 1, 8, 8), (draw(4, 1, 8, 8, seed=1) > 0).float()
    expected = TorchBernoulli(logits=logits).log_prob(binary).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(logits, binary), expected)
    white, black = (of_one_pixel(likelihood, [1.7], torch.tensor([value])) for value in (1.0, 0.0))
    torch.testing.assert_close(of_one_pixel(likelihood, [1.7], torch.tensor([0.3])), 0.3 * white + 0.7 * black)


@pytest.mark.parametrize("name", MASSES)
def test_level_probabilities_agree_with_differences_of_the_logistic_cdf(name):
    likelihood = build(name)
    for params in draw(10, likelihood.params_per_channel):
        got = of_one_pixel(likelihood, params.tolist(), from_uint8(LEVELS, likelihood.pixel_range)).exp()
        expected = pixels_of_mixture(likelihood, params.reshape(1, -1, 1, 1))[0]
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-9)


def test_levels_in_the_far_tail_keep_their_probability():
    # sigmoid(u) − sigmoid(l) rounds to 0 in float32 from some 17 scales on, and its logarithm would be −∞.
    likelihood = build("discretized-logistic")
    near, far = of_one_pixel(likelihood, [0.9, -1e4], from_uint8(LEVELS, likelihood.pixel_range)[[40, 41]].flip(0))
    assert near - far == pytest.approx(BIN_WIDTH / math.exp(MIN_LOG_SIGMA - 0.6), rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_log_prob_sums_over_pixels_and_channels_that_have_their_own_parameters(name):
    likelihood = build(name)
    k = likelihood.params_per_channel
    params, x = draw(2, 3 * k, 2, 2), random_images(likelihood, 2, 3, 2, 2)
    by_channel = params.reshape(2, k, 3, 2, 2)
    expected = torch.zeros(2)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                pixel = (..., slice(row, row + 1), slice(column, column + 1))
                expected += likelihood.log_prob(by_channel[:, :, channel][pixel], x[:, channel : channel + 1][pixel])
    torch.testing.assert_close(likelihood.log_prob(params, x), expected)


@pytest.mark.parametrize("name", ALL)
def test_bf16_parameters_are_computed_in_float32(name):
    likelihood = build(name)
    params = draw(2, 3 * likelihood.params_per_channel, 8, 8).bfloat16()
    x = random_images(likelihood, 2, 3, 8, 8)
    expected, mean = likelihood.log_prob(params.float(), x), likelihood.mean(params.float())
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = likelihood.log_prob(params, x)
        assert log_prob.dtype == likelihood.mean(params).dtype == torch.float32
        assert log_prob.equal(expected)
        assert likelihood.mean(params).equal(mean)


@pytest.mark.parametrize("name", ALL)
def test_extreme_bf16_parameters_stay_finite_and_so_do_their_gradients(name):
    likelihood = build(name)
    k = likelihood.params_per_channel
    values = torch.cartesian_prod(*[torch.tensor([-1e4, 0.0, 1e4])] * min(k, 6)).reshape(-1, min(k, 6))
    values = torch.nn.functional.pad(values, (0, k - values.shape[1]))
    params = values[:, :, None, None].expand(-1, -1, 1, 3).bfloat16().requires_grad_()
    x = from_uint8(LEVELS[[0, 100, 255]], likelihood.pixel_range).reshape(1, 1, 1, 3).expand(len(values), 1, 1, 3)
    log_prob = likelihood.log_prob(params, x)
    assert log_prob.isfinite().all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert gradient.isfinite().all()
    mean = likelihood.mean(params)
    assert mean.min() >= likelihood.pixel_range[0]
    assert mean.max() <= likelihood.pixel_range[1]


@pytest.mark.parametrize("name", DENSITIES)
def test_the_mean_of_a_density_is_its_expectation(name):
    likelihood = build(name)
    params = [0.3, -2.0][: likelihood.params_per_channel]
    x = 0.3 + torch.linspace(-3, 3, 8001)
    density = of_one_pixel(likelihood, params, x).exp().detach()
    mean = likelihood.mean(torch.tensor(params).reshape(1, -1, 1, 1))
    torch.testing.assert_close(mean.flatten(), torch.trapezoid(x * density, x)[None], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MASSES)
def test_the_mean_of_the_levels_is_their_expectation(name):
    likelihood = build(name)
    params = 2 * draw(200, likelihood.params_per_channel, 1, 1)
    expected = pixels_of_mixture(likelihood, params) @ from_uint8(LEVELS, likelihood.pixel_range).flatten().double()
    torch.testing.assert_close(likelihood.mean(params).flatten().double(), expected, rtol=0, atol=1e-4)


def test_the_mean_of_the_narrowest_logistic_is_within_a_quarter_of_a_level():
    likelihood = build("discretized-logistic")
    means = torch.linspace(-1.1, 1.1, 500)
    params = torch.stack([means, torch.full_like(means, -1e4)], dim=1)[:, :, None, None]
    expected = pixels_of_mixture(likelihood, params) @ from_uint8(LEVELS, likelihood.pixel_range).flatten().double()
    torch.testing.assert_close(likelihood.mean(params).flatten().double(), expected, rtol=0, atol=BIN_WIDTH / 4)


def test_the_mean_of_a_bernoulli_is_the_probability_of_white():
    assert build("bernoulli").mean(torch.tensor(0.8).reshape(1, 1, 1, 1)).item() == pytest.approx(
        1 / (1 + math.exp(-0.8))
    )


def fitted_scale(likelihood: Likelihood, params: Tensor, x: Tensor) -> Tensor:
    """log σ after 300 steps of Adam at the learning rate of a training."""
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (-likelihood.log_prob(params, x).sum() / x.numel()).backward()
        optimizer.step()
    return likelihood.log_sigma.detach()


def test_the_best_shared_variance_is_the_mean_squared_error_and_is_soon_found():
    likelihood = build("gaussian-shared")
    x = random_images(likelihood, 8, 3, 8, 8)
    params = x + 0.05 * draw(8, 3, 8, 8)
    mse = (x - params).square().mean()
    torch.testing.assert_close((2 * fitted_scale(likelihood, params, x)).exp(), mse, rtol=0.01, atol=0)


def test_the_best_shared_b_is_the_mean_absolute_error_and_is_soon_found():
    likelihood = build("laplace-shared")
    x = random_images(likelihood, 8, 3, 8, 8)
    params = x + 0.05 * draw(8, 3, 8, 8)
    mae = (x - params).abs().mean()
    torch.testing.assert_close(fitted_scale(likelihood, params, x).exp() / math.sqrt(2), mae, rtol=0.01, atol=0)
    torch.testing.assert_close(likelihood.log_b.exp().detach(), mae, rtol=0.01, atol=0)


def test_no_density_is_narrower_than_half_a_level():
    likelihood = Gaussian(sigma=1e-6, learned=True)
    assert likelihood.log_sigma.item() == pytest.approx(MIN_LOG_SIGMA, abs=1e-3)
    assert math.exp(MIN_LOG_SIGMA) == pytest.approx(1 / 255)
    assert Gaussian(sigma=1e-6, learned=False).log_sigma.item() == pytest.approx(math.log(1e-6))
    x = torch.zeros(1, 1, 1, 1)
    flattest = Laplace(sigma=1e-6, learned=True)
    assert flattest.log_b.exp().item() == pytest.approx(BIN_WIDTH / 2, rel=1e-3)
    assert flattest.bits_per_dim(-flattest.log_prob(x, x).item(), 1) == pytest.approx(0, abs=1e-3)
    peak = PixelGaussian().log_prob(torch.tensor([0.0, -1e4]).reshape(1, 2, 1, 1), x).item()
    assert peak == pytest.approx(Normal(0.0, 1 / 255).log_prob(x).item())


def test_scales_of_logistics_lie_between_their_bounds():
    params = torch.stack([torch.zeros(3), torch.tensor([-1e4, 0.0, 1e4])], dim=1)[:, :, None, None]
    log_scale = build("discretized-logistic").split(params)[2].flatten()
    assert log_scale[0].item() == pytest.approx(MIN_LOG_SIGMA - 0.6)
    assert log_scale[2] == MAX_LOG_SCALE
    narrowest = math.pi / math.sqrt(3) * log_scale[0].exp().item()
    assert narrowest == pytest.approx(1 / 255, rel=0.01)  # as a standard deviation


def test_only_a_learned_sigma_is_a_parameter_and_no_fixed_one_is_saved():
    for name in ("gaussian-shared", "laplace-shared"):
        assert (
            list(build(name).state_dict()) == ["scaled_log_sigma"] == [key for key, _ in build(name).named_parameters()]
        )
        assert build(name).log_sigma.exp().item() == pytest.approx(0.1, rel=0.06)
    fixed = build("gaussian-fixed")
    assert not list(fixed.parameters())
    assert not fixed.state_dict()


@pytest.mark.parametrize("name", ALL)
def test_levels_survive_the_pixel_range(name):
    likelihood = build(name)
    x = from_uint8(LEVELS, likelihood.pixel_range)
    assert (x.min().item(), x.max().item()) == pytest.approx(likelihood.pixel_range)
    assert likelihood.to_uint8(x).equal(LEVELS)
    torch.testing.assert_close(likelihood.to_unit(x), LEVELS / 255)
    low, high = likelihood.pixel_range
    assert likelihood.to_uint8(torch.tensor([low - 1, high + 1]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_bits_per_dim_of_known_distributions():
    masses, densities = build("logistic-mixture"), build("gaussian-fixed")
    assert masses.bits_per_dim(12 * math.log(256), 12) == pytest.approx(8)
    assert densities.bits_per_dim(-12 * math.log(1 / 2), 12) == pytest.approx(math.log2(255))  # uniform on [-1, 1]
    assert build("bernoulli").bits_per_dim(12 * math.log(2), 12) == pytest.approx(1)


@pytest.mark.parametrize("name", ALL)
def test_the_raw_mean_is_the_mean_without_its_clamp_which_has_no_gradient_outside_the_range(name):
    likelihood = build(name)
    params = (3 * draw(4, 3 * likelihood.params_per_channel, 4, 4)).requires_grad_()
    raw = likelihood.raw_mean(params)
    assert raw.dtype == torch.float32
    assert raw.clamp(*likelihood.pixel_range).equal(likelihood.mean(params))
    if name in DENSITIES:  # of the others E[x|z] lies within
        (gradient,) = torch.autograd.grad(raw.sum(), params, retain_graph=True)
        (clamped,) = torch.autograd.grad(likelihood.mean(params).sum(), params)
        assert gradient[:, :3][raw > 1].eq(1).all()
        assert clamped[:, :3][raw > 1].eq(0).all()


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.2, 1e-3), (2 * BIN_WIDTH, 0.02)])
def test_a_density_times_the_bin_width_approximates_the_bits_of_a_level(sigma, tolerance):
    likelihood, level = Gaussian(sigma, learned=False), torch.tensor([0.29], dtype=torch.float64)
    normal = Normal(torch.tensor([0.275], dtype=torch.float64), sigma)
    mass = normal.cdf(level + BIN_WIDTH / 2) - normal.cdf(level - BIN_WIDTH / 2)
    bits = likelihood.bits_per_dim(-of_one_pixel(likelihood, [0.275], level.float()).item(), 1)
    assert bits == pytest.approx(-mass.log2().item(), abs=tolerance)
