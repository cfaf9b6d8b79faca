"""Flow matching against densities that are known: solver, divergence, classes and guidance."""

import math

import pytest
import torch
from torch import nn

from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed.randomness import noise_of_images
from vaetrain.priors.config import FlowSettings
from vaetrain.priors.flow_matching.config import FlowObjectiveConfig, NetworkConfig
from vaetrain.priors.flow_matching.model import FlowMatching, draw_for_training, draw_held_out
from vaetrain.priors.flow_matching.ode import integrate, log_density
from vaetrain.priors.flow_matching.prior import FlowMatchingPrior

MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.5, -1.5]])
SCALES = torch.tensor([0.3, 0.5, 0.4])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def true_log_density(z: torch.Tensor) -> torch.Tensor:
    """Of a mixture of three round Gaussians in the plane."""
    squares = (z[:, None].double() - MEANS.double()).square().sum(2) / SCALES.double() ** 2
    return (SHARES.double().log() - 0.5 * squares - math.log(2 * math.pi) - 2 * SCALES.double().log()).logsumexp(1)


def draw_truth(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and their components."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(SHARES, num, replacement=True, generator=generator)
    return MEANS[labels] + SCALES[labels, None] * torch.randn(num, 2, generator=generator), labels


def true_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[z − noise | x_t = x] in closed form: each component is Gaussian, jointly with the line's end."""
    t = t[:, None]
    variance = (1 - t) ** 2 + t**2 * SCALES**2  # of x_t in each component (b, 3)
    apart = x[:, None] - t[..., None] * MEANS
    log_weights = SHARES.log() - 0.5 * apart.square().sum(2) / variance - variance.log()
    gain = (t * SCALES**2 - (1 - t)) / variance
    velocities = MEANS + gain[..., None] * apart
    return (log_weights.softmax(1)[..., None] * velocities).sum(1)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|x − y| − E|x − x′| − E|y − y′|: 0 for equal distributions."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - sum(within))


@pytest.mark.parametrize(("solver", "steps", "tolerance"), [("heun", 60, 0.003), ("euler", 400, 0.02)])
def test_the_true_velocity_draws_the_true_mixture(solver, steps, tolerance):
    x = integrate(true_velocity, torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), steps, solver)
    truth, others = (draw_truth(4000, seed)[0] for seed in (1, 2))
    floor = abs(energy_distance(truth, others))
    assert energy_distance(x, truth) < floor + tolerance
    start = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert energy_distance(start, truth) > 0.3  # the measure tells


def test_heun_is_of_second_order():
    start = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = integrate(true_velocity, start, 2000, "heun")
    error = {
        (solver, steps): float((integrate(true_velocity, start, steps, solver) - exact).abs().mean())
        for solver in ("heun", "euler")
        for steps in (40, 80)
    }
    assert 3 < error["heun", 40] / error["heun", 80] < 5
    assert 1.7 < error["euler", 40] / error["euler", 80] < 2.3


def test_the_divergence_gives_the_true_log_density():
    z, _ = draw_truth(300, 3)
    found = log_density(true_velocity, z.double(), 200)
    torch.testing.assert_close(found, true_log_density(z), atol=2e-3, rtol=0)


def test_a_probe_estimates_the_divergence_without_bias(monkeypatch):
    z, _ = draw_truth(2000, 3)
    probes = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).sign().double()
    monkeypatch.setattr("vaetrain.priors.flow_matching.ode.MAX_EXACT_DIMS", 1)
    found = log_density(true_velocity, z.double(), 60, probes)
    difference = found - true_log_density(z)
    assert float(difference.abs().mean()) > 1e-3  # an estimate each
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(len(z)) + 2e-3


@pytest.fixture(scope="module")
def trained() -> FlowMatching:
    """A small network that has learned the mixture and its components as classes, of which a fifth were withheld."""
    torch.manual_seed(0)
    model = FlowMatching(NetworkConfig(width=64, depth=3), (2,), 3)
    model.std.copy_(torch.tensor([1.7, 1.2]))
    model.mean.copy_(torch.tensor([-0.4, 0.15]))
    model.class_shares.copy_(SHARES)
    steps, optimizer = 600, torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    objective = FlowObjectiveConfig(label_dropout=0.2)
    for step in range(steps):
        z, labels = draw_truth(256, 100 + step)
        drawn = draw_for_training(objective, 0, slice(step * 256, step * 256 + 256), (2,), torch.device("cpu"))
        loss = model(z, drawn.noise, drawn.t, torch.where(drawn.unlabelled, 3, labels)).mean()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def prior_of(model: FlowMatching, **settings: object) -> FlowMatchingPrior:
    return FlowMatchingPrior(model, ("left", "up", "down"), knows_no_class=True, settings=FlowSettings(**settings))


def test_what_is_learned_is_drawn(trained):
    found = prior_of(trained).sample(0, range(1500))
    truth, others = (draw_truth(1500, seed)[0] for seed in (1, 2))
    assert energy_distance(found, truth) < abs(energy_distance(truth, others)) + 0.01


def test_its_log_density_is_near_the_truth(trained):
    z, _ = draw_truth(300, 5)
    found = prior_of(trained, steps=40).log_density(z)
    assert abs(float((found - true_log_density(z)).mean())) < 0.08


def test_a_class_is_drawn_when_it_is_asked_for(trained):
    for label, name in enumerate(("left", "up", "down")):
        found = prior_of(trained, class_=name).sample(0, range(500))
        nearest = ((found[:, None] - MEANS).norm(dim=2) / SCALES).argmin(1)
        assert float((nearest == label).float().mean()) > 0.97
    labels = prior_of(trained).labels(0, range(4000))
    shares = torch.bincount(labels, minlength=3) / 4000
    torch.testing.assert_close(shares, SHARES, atol=0.03, rtol=0)
    assert torch.equal(prior_of(trained).labels(0, range(100, 200)), labels[100:200])


def test_guidance_1_is_the_class_and_0_is_none(trained):
    prior, x, t = prior_of(trained), torch.randn(8, 2), torch.rand(8)
    labels, none = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.full((8,), 3)
    assert torch.equal(prior.velocity(x, t, labels), trained.network(x, t, labels))
    torch.testing.assert_close(prior_of(trained, guidance=0.0).velocity(x, t, labels), trained.network(x, t, none))
    expected = torch.lerp(trained.network(x, t, none), trained.network(x, t, labels), 2.5)
    torch.testing.assert_close(prior_of(trained, guidance=2.5).velocity(x, t, labels), expected)


def test_a_prior_that_lost_all_labels_knows_none(trained):
    without = FlowMatchingPrior(trained, (), knows_no_class=True)
    assert without.labels(0, range(5)).tolist() == [3] * 5
    with pytest.raises(ValueError, match="no class 'up': it was trained without classes"):
        without.of_class("up")
    with pytest.raises(ValueError, match="trained with no label; leave it at 1"):
        FlowMatchingPrior(trained, (), knows_no_class=True, settings=FlowSettings(guidance=2.0))
    with pytest.raises(ValueError, match="it knows left, up, down"):
        prior_of(trained).of_class("sideways")
    with pytest.raises(ValueError, match="every label"):
        FlowMatchingPrior(trained, ("left", "up", "down"), knows_no_class=False, settings=FlowSettings(guidance=2.0))


def test_an_image_depends_on_seed_and_number_alone(trained):
    prior = prior_of(trained, steps=4)
    whole = prior.sample(7, range(10))
    torch.testing.assert_close(prior.sample(7, [3, 8]), whole[[3, 8]], rtol=1e-5, atol=1e-5)
    assert not torch.equal(prior.sample(8, range(10)), whole)
    cold = prior.of_class("up").sample(7, range(3), temperature=0.0)
    assert torch.equal(
        cold, prior.of_class("up").sample(8, range(3), temperature=0.0)
    )  # without noise seeds do not matter


def test_training_draws_are_functions_of_the_position():
    config, device = FlowObjectiveConfig(label_dropout=0.25), torch.device("cpu")
    layout = BatchLayout.of(64, None, 0, 1)
    whole = draw_for_training(config, 3, next(iter(layout.positions(0))), (4, 2, 2), device)
    half = draw_for_training(config, 3, slice(32, 64), (4, 2, 2), device)
    for all_of_them, later in zip(whole, half, strict=True):
        assert torch.equal(all_of_them[32:], later)
    many = draw_for_training(config, 3, slice(0, 8000), (1,), device)
    assert float(many.unlabelled.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(many.t.logit().std()) == pytest.approx(1, abs=0.03)
    uniform = draw_for_training(FlowObjectiveConfig(time="uniform"), 3, slice(0, 8000), (1,), device).t
    assert float(uniform.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_held_out_latents_are_judged_at_fixed_times_spread_evenly():
    times = torch.stack(
        [draw_held_out(0, list(range(200)), number, (3,), torch.device("cpu"))[1] for number in range(4)]
    )
    assert torch.equal((times * 4).floor(), torch.arange(4.0)[:, None].expand(4, 200))
    again = draw_held_out(0, [150], 2, (3,), torch.device("cpu"))
    assert float(again[1]) == float(times[2, 150])
    assert not torch.equal(again[0], noise_of_images(0, [150], (3,)))


@pytest.mark.parametrize("shape", [(5,), (4, 8, 6)])
def test_a_network_begins_as_the_velocity_0_and_sees_time_and_class(shape):
    torch.manual_seed(0)
    network = FlowMatching(NetworkConfig(width=32, depth=2, heads=2), shape, 3).network
    z, t, labels = torch.randn(2, *shape), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    assert torch.equal(network(z, t, labels), torch.zeros(2, *shape))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    at = network(z, t, labels)
    assert not torch.allclose(network(z, t + 0.1, labels), at)
    assert not torch.allclose(network(z, t, labels.flip(0)), at)
    assert not torch.allclose(network(-z, t, labels), at)


def test_patches_must_tile_the_latent():
    with pytest.raises(ValueError, match=r"--model.patch-size 4 does not divide the latent's 8 × 6 places"):
        FlowMatching(NetworkConfig(patch_size=4), (4, 8, 6), 1)
