"""The noise scale equals theory where the gradients' covariance is known, on one process and on two, and is unbiased."""

from __future__ import annotations

import json

import pytest
import torch
from launching import succeed
from noise_scale_scenario import BATCH, DEVIATIONS, STEPS, THEORY, Quadratic, images

from vaetrain.data.order import BatchLayout
from vaetrain.run import RunDirectory
from vaetrain.scaling.noise_scale import NoiseScale, SmallGradient


def check(scale: NoiseScale) -> None:
    assert scale.num_steps == STEPS
    assert 0 < scale.standard_error < 0.15 * THEORY  # else any answer would do
    assert abs(scale.images - THEORY) < 3 * scale.standard_error
    assert scale.gradient_sq == pytest.approx(len(DEVIATIONS) * 0.1**2, rel=0.2)
    assert scale.covariance_trace == pytest.approx(float(DEVIATIONS.square().sum()), rel=0.1)


def test_one_process_with_accumulation_equals_theory():
    layout = BatchLayout.of(BATCH, BATCH // 4, 0, 1)
    model = Quadratic()
    small = SmallGradient(model, layout, 1)
    assert small.batch_size == BATCH // 4
    small_sq, big_sq = [], []
    for step in range(STEPS):
        x = images(step, DEVIATIONS)
        model.zero_grad()
        for number, part in enumerate(layout.positions(0), start=1):
            (model(x[part]).sum() / BATCH).backward()
            small.after_micro_batch(number)
        small_sq.append(float(small.take()))
        big_sq.append(float(model.theta.grad.square().sum()))
    first = model.theta.detach() - x[layout.positions(0)[0]].mean(0)
    assert small_sq[-1] == pytest.approx(float(first.square().sum()), rel=1e-5)
    check(NoiseScale.of(small_sq, big_sq, small.batch_size, BATCH))


def test_two_processes_through_ddp_equal_theory(tmp_path):
    succeed("tests/noise_scale_scenario.py", tmp_path / "found.json", two_processes=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["batch"] == BATCH // 2
    x = images(STEPS - 1, DEVIATIONS)
    halves = [float((0.1 - half.mean(0)).square().sum()) for half in x.split(BATCH // 2)]
    assert found["small"][-1] == pytest.approx(sum(halves) / 2, rel=1e-4)
    assert found["big"][-1] == pytest.approx(float((0.1 - x.mean(0)).square().sum()), rel=1e-4)
    check(NoiseScale.of(found["small"], found["big"], found["batch"], BATCH))


def test_two_equations_two_unknowns():
    # |G|² = 3, tr Σ = 8: E|g|² is 3 + 8/2 at two images and 3 + 8/8 at eight.
    scale = NoiseScale.of([7.0], [4.0], 2, 8)
    assert (scale.gradient_sq, scale.covariance_trace) == (pytest.approx(3), pytest.approx(8))
    assert scale.images == pytest.approx(8 / 3)
    assert scale.standard_error is None


def test_a_drowned_gradient_gives_no_number():
    assert NoiseScale.of([4.0, 4.0, 4.0, 4.0], [0.5, 0.5, 0.5, 0.5], 2, 8).images is None


def test_the_error_covers_what_other_seeds_find():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        big = torch.randn(200, generator=generator).square() * 0.5 + 1
        small = torch.randn(200, generator=generator).square() * 2 + 3
        found.append(NoiseScale.of(small.tolist(), big.tolist(), 4, 16))
    spread = float(torch.tensor([scale.images for scale in found]).std())
    told = sum(scale.standard_error for scale in found) / len(found)
    assert told == pytest.approx(spread, rel=0.35)


def test_training_logs_it_live(train_tiny):
    run_dir = train_tiny("--log.noise-scale", True, "--train.micro-batch-size", 5)
    plain_run = train_tiny("--train.micro-batch-size", 5, run_dir="plain")
    records = [record for record in RunDirectory(run_dir).metrics() if record["split"] == "train"]
    without = [record for record in RunDirectory(plain_run).metrics() if record["split"] == "train"]
    assert [record["train/loss"] for record in records] == [record["train/loss"] for record in without]
    for record in records:
        expected = NoiseScale.of([record["train/small_grad_sq"]], [record["train/grad_sq"]], 5, 20)
        assert record["train/noise_scale_images"] == expected.images
        assert record["train/small_grad_sq"] > 0
    assert "train/noise_scale_images" not in without[0]


def test_a_step_of_one_part_is_refused(train_tiny):
    with pytest.raises(ValueError, match="needs a step of several parts: several processes, or"):
        train_tiny("--log.noise-scale", True)


def test_fp16_is_refused(train_tiny):
    with pytest.raises(SystemExit):
        train_tiny("--log.noise-scale", True, "--train.precision", "fp16")
