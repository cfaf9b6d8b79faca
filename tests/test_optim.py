"""Learning rate, weight decay, skipped steps and the moving average of weights."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from vaetrain.config import Config, OptimConfig
from vaetrain.data.config import DataConfig
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.objective.config import ObjectiveConfig
from vaetrain.training.ema import ExponentialMovingAverage
from vaetrain.training.optimizer import build_optimizer
from vaetrain.training.schedule import learning_rate_at, unfinished_warmups

COSINE = OptimConfig(lr=0.1, warmup_images=1000, final_lr_fraction=0.2)
TOTAL = 11_000


def test_cosine_goes_up_from_zero_to_the_peak_and_down_to_the_final_fraction():
    expected = {0: 0.0, 500: 0.05, 1000: 0.1, 6000: 0.06, TOTAL: 0.02, 2 * TOTAL: 0.02}
    for images_seen, lr in expected.items():
        assert learning_rate_at(COSINE, images_seen, TOTAL) == pytest.approx(lr)
    rates = [learning_rate_at(COSINE, images_seen, TOTAL) for images_seen in range(0, TOTAL + 1, 50)]
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert max(abs(a - b) for a, b in pairwise(rates)) <= 0.1 * 50 / 1000 + 1e-9  # no jumps


def test_a_constant_schedule_stays_at_the_peak():
    config = OptimConfig(lr=0.1, warmup_images=1000, schedule="constant")
    assert [learning_rate_at(config, images, TOTAL) for images in (0, 250, 1000, 6000, TOTAL)] == pytest.approx(
        [0, 0.025, 0.1, 0.1, 0.1]
    )


def test_training_may_start_at_the_peak_or_end_inside_the_warmup():
    assert learning_rate_at(OptimConfig(lr=0.1, warmup_images=0), 0, TOTAL) == pytest.approx(0.1)
    assert learning_rate_at(COSINE, 400, 400) == pytest.approx(0.04)
    assert learning_rate_at(COSINE, 1000, 1000) == pytest.approx(0.1)


def test_a_warmup_may_be_a_fraction_of_the_training():
    config = OptimConfig(lr=1.0, warmup_images=10**6, warmup_fraction=0.1, schedule="constant")
    assert [learning_rate_at(config, images, 1000) for images in (0, 50, 100, 500)] == [0.0, 0.5, 1.0, 1.0]
    assert learning_rate_at(config, 100, 2000) == 0.5
    in_images = config.in_images(2000)
    assert (in_images.warmup_images, in_images.warmup_fraction) == (200, None)
    assert learning_rate_at(in_images, 100, 2000) == 0.5
    with pytest.raises(ValueError, match=r"--optim\.warmup-fraction is 1\.5; give a fraction in \[0, 1\)"):
        OptimConfig(warmup_fraction=1.5)


@pytest.mark.parametrize(
    ("optim", "objective", "said"),
    [
        (OptimConfig(warmup_images=10_000), ObjectiveConfig(), ["1,600", "10,000", "--optim.warmup-images", "0.00016 of 0.001"]),
        (OptimConfig(warmup_images=1_600), ObjectiveConfig(), ["1,600", "--optim.warmup-fraction 0.05"]),
        (
            OptimConfig(warmup_images=0),
            ObjectiveConfig(beta=2.0, beta_schedule="warmup", beta_warmup_images=3_200),
            ["1,600", "3,200", "--objective.beta-warmup-images", "it ends at 1 of 2"],
        ),
        (
            OptimConfig(warmup_images=0),
            ObjectiveConfig(beta_schedule="cyclical", beta_cycle_images=6_400),
            ["1,600", "3,200", "half of --objective.beta-cycle-images"],
        ),
    ],
)  # fmt: skip
def test_a_warmup_that_does_not_end_is_told_with_both_numbers(optim, objective, said):
    [line] = unfinished_warmups(Config(DataConfig("shards"), optim=optim, objective=objective), 1_600)
    assert "\n" not in line
    for words in said:
        assert words in line


def test_a_warmup_that_ends_is_not_told():
    objective = ObjectiveConfig(beta_schedule="warmup", beta_warmup_images=1_599)
    config = Config(DataConfig("shards"), optim=OptimConfig(warmup_images=1_599), objective=objective)
    assert unfinished_warmups(config, 1_600) == []


def test_matrices_and_kernels_decay_and_nothing_else():
    vae = VAE(ModelConfig(image_size=8, base_channels=8, channel_mult=(1,), num_res_blocks=1, latent="vector"))
    optimizer = build_optimizer(vae, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(vae.parameters()))
    for name, parameter in vae.named_parameters():
        is_kernel = name.endswith("weight") and "norm" not in name
        assert decay[id(parameter)] == (0.3 if is_kernel else 0.0), name
    assert "likelihood.scaled_log_sigma" in dict(vae.named_parameters())


def test_weight_decay_is_decoupled_from_the_gradient():
    model = nn.Linear(3, 3)
    model.weight.grad, model.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before[0])
    assert model.bias.equal(before[1])


def test_a_step_whose_gradient_is_not_finite_moves_nothing():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    ema = ExponentialMovingAverage(model, half_life_images=100)

    def step(gradient: float, skipped: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.tensor(skipped)  # as train.py does
        optimizer.step()
        ema.update(model, 50, images_seen=10_000, skipped=torch.tensor(skipped))

    def state() -> list[torch.Tensor]:
        moments = [value for entry in optimizer.state.values() for value in entry.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *ema.module.parameters(), *moments)]

    start = state()
    step(1.0, skipped=0.0)
    moved = state()
    assert not any(a.equal(b) for a, b in zip(start[:4], moved[:4], strict=True))
    for gradient in (math.nan, math.inf):
        step(gradient, skipped=1.0)
        assert len(moved) == 4 + 2 * 3  # weights, averages; step count and two moments of each
        assert all(a.equal(b) for a, b in zip(moved, state(), strict=True))
    step(1.0, skipped=0.0)
    assert not any(a.equal(b) for a, b in zip(moved, state(), strict=True))


# The moving average of a weight that is 0 at first and 1 ever after.


def follow(half_life_images: int, batch_size: int, start: int, num_images: int) -> float:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ExponentialMovingAverage(model, half_life_images)
    nn.init.ones_(model.weight)
    for images_seen in range(start + batch_size, start + num_images + 1, batch_size):
        ema.update(model, batch_size, images_seen)
    return ema.module.weight.item()


@pytest.mark.parametrize("batch_size", [10, 50, 500])
def test_after_a_half_life_the_average_is_half_way_at_any_batch_size(batch_size):
    past_the_ramp = 20 * 1000
    assert follow(1000, batch_size, start=past_the_ramp, num_images=1000) == pytest.approx(0.5, abs=1e-5)
    assert follow(1000, batch_size, start=past_the_ramp, num_images=2000) == pytest.approx(0.75, abs=1e-5)


def test_early_on_the_half_life_is_a_twentieth_of_the_images_seen():
    # A step of 50 images after 2,000: the half-life is 100 images, not the 10,000 asked for.
    assert follow(10_000, 50, start=1950, num_images=50) == pytest.approx(1 - 0.5**0.5)
    assert follow(10_000, 50, start=0, num_images=2000) > 0.999999  # the initial weights are forgotten


def test_without_a_half_life_the_average_is_the_weights():
    assert follow(0, 50, start=0, num_images=50) == 1


def test_the_average_is_a_frozen_copy_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = ExponentialMovingAverage(model, 100)
    assert not ema.module.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(ema.module.state_dict()) == list(model.state_dict())
    averaged, trained = ema.module[0].weight, model[0].weight
    assert averaged.equal(trained)
    assert averaged.data_ptr() != trained.data_ptr()
