"""The noise scale equals theory where the gradients' covariance is known, on one process and on two, and is unbiased."""

from __future__ import annotations

import json

import pytest
import torch

from noise_scale_scenario import (
    BATCH,
    DEVIATIONS,
    STEPS,
    THEORY,
    Quadratic,
    adam_at_rest,
    adam_theory,
    images,
    norms_together,
)
from together import succeed_together
from vaetrain.config import Config, LogConfig, TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.runs.directory import RunDirectory
from vaetrain.training.noise_scale import GradientNoiseProbe, NoiseScale, by_progress


def check(norms: list[list[float]], small_batch: int) -> None:
    """The simple noise scale and Adam's, from NOISE_METERS of each step."""
    grad_sq, small_sq, adam_small_sq, adam_sq = zip(*norms, strict=True)
    simple = NoiseScale.of(small_sq, grad_sq, small_batch, BATCH)
    assert simple.num_steps == STEPS
    assert 0 < simple.standard_error < 0.15 * THEORY  # else any answer would do
    assert abs(simple.images - THEORY) < 3 * simple.standard_error
    assert simple.gradient_sq == pytest.approx(len(DEVIATIONS) * 0.1**2, rel=0.2)
    assert simple.covariance_trace == pytest.approx(float(DEVIATIONS.square().sum()), rel=0.1)
    assert adam_small_sq[0] == adam_sq[0] == 0  # no update yet, no preconditioner
    settled = slice(STEPS // 8, None)
    adam = NoiseScale.of(*by_progress(adam_small_sq[settled], adam_sq[settled]), small_batch, BATCH)
    assert 0 < adam.standard_error < 0.15 * adam_theory()
    assert abs(adam.images - adam_theory()) < 3 * adam.standard_error
    # Both saw the same noise, so that their ratio (0.86 in theory) tells them apart more sharply.
    same = NoiseScale.of(*by_progress(small_sq[settled], grad_sq[settled]), small_batch, BATCH)
    assert adam.images / same.images == pytest.approx(adam_theory() / THEORY, rel=0.06)


def test_one_process_with_accumulation_equals_theory():
    layout = BatchLayout.of(BATCH, BATCH // 4, 0, 1)
    model = Quadratic()
    optimizer = adam_at_rest(model)
    small = GradientNoiseProbe(model, optimizer, layout, 1)
    assert small.batch_size == BATCH // 4
    norms = []
    for step in range(STEPS):
        x = images(step, DEVIATIONS)
        model.zero_grad()
        for number, part in enumerate(layout.positions(0), start=1):
            (model(x[part]).sum() / BATCH).backward()
            small.after_micro_batch(number)
        norms.append([float(model.theta.grad.square().sum()), *map(float, small.pop())])
        optimizer.step()
    first = model.theta.detach() - x[layout.positions(0)[0]].mean(0)
    assert norms[-1][1] == pytest.approx(float(first.square().sum()), rel=1e-5)
    check(norms, small.batch_size)


def test_two_processes_through_ddp_equal_theory(tmp_path):
    succeed_together(norms_together, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["batch"] == BATCH // 2
    x = images(STEPS - 1, DEVIATIONS)
    halves = [float((0.1 - half.mean(0)).square().sum()) for half in x.split(BATCH // 2)]
    grad_sq, small_sq, *_ = found["norms"][-1]
    assert small_sq == pytest.approx(sum(halves) / 2, rel=1e-4)
    assert grad_sq == pytest.approx(float((0.1 - x.mean(0)).square().sum()), rel=1e-4)
    check(found["norms"], found["batch"])


def test_adams_weights_are_those_of_its_next_step():
    """With g alone in v̂ and no ε, D g is sign(g): Σ D g² is Σ |g|."""
    model = Quadratic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=0.0)
    small = GradientNoiseProbe(model, optimizer, BatchLayout.of(4, 2, 0, 1), 1)
    gradient = torch.linspace(-2, 3, len(model.theta))
    for _ in range(2):
        model.theta.grad = gradient.clone()
        small.after_micro_batch(1)
        norms = small.pop()
        optimizer.step()
    assert float(norms.adam_sq) == pytest.approx(float(gradient.abs().sum()), rel=1e-5)
    assert float(norms.adam_small_sq) == pytest.approx(4 * float(gradient.abs().sum()), rel=1e-5)
    assert float(small.pop().small_sq) == 0  # taken


def test_another_optimizer_has_no_noise_scale_of_adams():
    model = Quadratic()
    small = GradientNoiseProbe(model, torch.optim.SGD(model.parameters(), lr=0.0), BatchLayout.of(4, 2, 0, 1), 1)
    model.theta.grad = torch.ones_like(model.theta)
    small.after_micro_batch(1)
    assert [float(norm) for norm in small.pop()] == [4 * len(model.theta), 0, 0]


def test_a_training_whose_noise_grows_is_averaged_over_its_progress():
    """Stretches with noise scales 1, 4, 16 and 400, and gradients that shrink: the formula of the docstring by hand."""
    batch, small_batch = 16, 4
    small_sq, big_sq, top, bottom = [], [], 0.0, 0.0
    for gradient_sq, noise in ((100.0, 1.0), (10.0, 4.0), (1.0, 16.0), (0.01, 400.0)):
        small_sq += [gradient_sq * (1 + noise / small_batch)] * 5
        big_sq += [gradient_sq * (1 + noise / batch)] * 5
        top += noise / (1 + noise / batch)
        bottom += 1 / (1 + noise / batch)
    assert NoiseScale.of(*by_progress(small_sq, big_sq, 4), small_batch, batch).images == pytest.approx(top / bottom)
    assert NoiseScale.of(small_sq, big_sq, small_batch, batch).images < 2  # what plain averages make of it
    # Stretches before Adam's first update have no norms, and count for nothing.
    padded = by_progress([0.0] * 5 + small_sq, [0.0] * 5 + big_sq, 5)
    assert NoiseScale.of(*padded, small_batch, batch).images == pytest.approx(top / bottom)


def test_two_equations_two_unknowns():
    # |G|² = 3, tr Σ = 8: E|g|² is 3 + 8/2 at two images and 3 + 8/8 at eight.
    scale = NoiseScale.of([7.0], [4.0], 2, 8)
    assert (scale.gradient_sq, scale.covariance_trace) == (pytest.approx(3), pytest.approx(8))
    assert scale.images == pytest.approx(8 / 3)
    assert scale.standard_error is None


def test_a_drowned_gradient_or_no_noise_gives_no_number_and_says_which():
    drowned = NoiseScale.of([4.0, 4.0, 4.0, 4.0], [0.5, 0.5, 0.5, 0.5], 2, 8)
    assert drowned.images is None
    assert "noise drowns the gradient" in drowned.why_none
    quiet = NoiseScale.of([3.0] * 8, [4.0] * 8, 2, 8)
    assert quiet.images is None
    assert "hardly any noise" in quiet.why_none
    assert NoiseScale.of([7.0], [4.0], 2, 8).why_none is None


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
        norms = record["train/adam_small_grad_sq"], record["train/adam_grad_sq"]
        if record["step"] == 1:  # Adam has seen no gradient yet
            assert norms == (0, 0)
            assert record["train/adam_noise_scale_images"] is None
            continue
        assert record["train/adam_noise_scale_images"] == NoiseScale.of([norms[0]], [norms[1]], 5, 20).images
        assert min(norms) > 0
    assert "train/noise_scale_images" not in without[0]


def test_a_step_of_one_part_is_refused(train_tiny):
    with pytest.raises(ValueError, match="needs a step of several parts: several processes, or"):
        train_tiny("--log.noise-scale", True)


def test_fp16_is_refused(train_tiny):
    with pytest.raises(SystemExit):
        train_tiny("--log.noise-scale", True, "--train.precision", "fp16")


def test_compressed_gradients_are_refused():
    with pytest.raises(ValueError, match=r"--train.gradient-compression bf16 sends others; use one of the two"):
        Config(DataConfig("shards"), train=TrainConfig(gradient_compression="bf16"), log=LogConfig(noise_scale=True))


def test_norms_are_taken_before_clipping(train_tiny):
    run_dir = train_tiny("--log.noise-scale", True, "--train.micro-batch-size", 5, "--optim.clip-norm", 1e-3)
    records = [record for record in RunDirectory(run_dir).metrics() if record["split"] == "train"]
    for record in records:
        assert record["train/grad_sq"] > 100 * 1e-3**2
        assert record["train/adam_grad_sq"] > record["train/adam_small_grad_sq"] / 20 or record["step"] == 1
