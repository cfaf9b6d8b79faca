"""What advice is held against: lengths are read off between trainings, a batch is worth what the noise scale says."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from launching import succeed
from reproduce.scaling_evidence import (
    Run,
    SeedGroup,
    critical_batches,
    images_worth,
    points,
    predicted,
    runs_below,
    score_gap,
)
from vaetrain.runs.provenance import provenance

LENGTHS = [SeedGroup(1000.0, (-200.0,)), SeedGroup(2000.0, (-150.0, -152.0)), SeedGroup(4000.0, (-120.0,))]


def write_run(folder, *, lr=1e-3, batch=32, images=4000, seed=0, score=-120.0):
    folder.mkdir(parents=True)
    config = {"seed": seed, "optim": {"lr": lr}, "train": {"global_batch_size": batch}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"split": "train", "step": 1, "images_seen": images},
        {"split": "val", "step": 1, "images_seen": images // 2, "val/elbo_nats": score - 50},
        {"split": "val", "step": 2, "images_seen": images, "val/elbo_nats": score},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_images_are_worth_what_trainings_of_their_length_reached():
    assert images_worth(LENGTHS, 1000) == pytest.approx(-200)
    assert images_worth(LENGTHS, 2000) == pytest.approx(-151)
    assert images_worth(LENGTHS, 2000 * 2**0.5) == pytest.approx((-151 - 120) / 2)
    assert images_worth(LENGTHS, 500) == pytest.approx(-249)
    assert images_worth(LENGTHS, 8000) == pytest.approx(-89)


def test_a_batch_is_worth_fewer_images_beyond_the_noise_scale():
    # (1 + 32/96) / (1 + 544/96) = 1/5 of the images at 544; the small batch itself loses nothing.
    assert predicted(LENGTHS, 4000, 32, 32, 96.0) == pytest.approx(-120)
    assert predicted(LENGTHS, 5000, 32, 544, 96.0) == pytest.approx(-200)
    assert predicted(LENGTHS, 4000, 32, 544, 1e9) == pytest.approx(-120, abs=1e-3)
    assert score_gap(-102.0, -100.0) == pytest.approx(0.02)
    assert score_gap(3920.0, 4000.0) == pytest.approx(0.02)


def test_runs_are_read_and_seeds_averaged(tmp_path):
    write_run(tmp_path / "a", seed=0, score=-100)
    write_run(tmp_path / "b", seed=1, score=-110)
    write_run(tmp_path / "c", batch=128, score=-90)
    assert Run.read(tmp_path / "c") == Run(1e-3, 128, 4000, 0, -90.0)
    small, large = points(runs_below(tmp_path), lambda run: run.batch)
    assert (small.x, small.mean, small.error) == (32, -105, pytest.approx(5.0))
    assert (large.mean, large.error) == (-90, None)
    with pytest.raises(ValueError, match="no run below"):
        runs_below(tmp_path / "a" / "nothing")
    with pytest.raises(ValueError, match=r"is no run directory \(it has no config\.yaml\)"):
        Run.read(tmp_path)


def write_noise_run(folder, *, adam: float, simple: float) -> None:
    """A run at batch 32 in micro-batches of 8 whose gradients shrink while both noise scales stay."""
    write_run(folder)
    (folder / "config.yaml").write_text("data: {train: somewhere}\ntrain: {global_batch_size: 32, micro_batch_size: 8}")
    (folder / "provenance.json").write_text(json.dumps(provenance(None, None)))
    with (folder / "metrics.jsonl").open("a") as file:
        for step, gradient_sq in enumerate((99.0, 3.0, 2.0, 1.0, 0.5), start=1):
            norms = {
                "grad_sq": (simple, 32),
                "small_grad_sq": (simple, 8),
                "adam_grad_sq": (adam, 32),
                "adam_small_grad_sq": (adam, 8),
            }
            logged = {f"train/{name}": gradient_sq * (1 + scale / batch) for name, (scale, batch) in norms.items()}
            file.write(json.dumps({"split": "train", "step": step, "images_seen": 32 * step, **logged}) + "\n")


def test_a_run_without_noise_scale_has_no_critical_batch(tmp_path):
    write_noise_run(tmp_path / "a", adam=96.0, simple=24.0)
    adam, simple = critical_batches(tmp_path / "a")
    assert (adam.images, simple.images) == (pytest.approx(96), pytest.approx(24))
    write_run(tmp_path / "b")
    with pytest.raises(ValueError, match="has no gradient norms; train with --log"):
        critical_batches(tmp_path / "b")


def test_the_tool_prints_both_tables_and_draws(tmp_path):
    for number, lr in enumerate((1e-3, 4e-3)):
        write_run(tmp_path / "grid" / str(number), lr=lr, score=-100 - number)
    write_run(tmp_path / "own", lr=2e-3, score=-101.5)
    for batch, score in ((32, -120.0), (544, -210.0)):
        write_run(tmp_path / "rule" / str(batch), batch=batch, images=5000, score=score)
    for point in LENGTHS:
        write_run(tmp_path / "lengths" / str(point.x), images=int(point.x), score=point.mean)
    write_noise_run(tmp_path / "noise", adam=96.0, simple=24.0)
    printed = succeed(
        "tools/check_scaling.py", "--lr-grid", tmp_path / "grid", "--suggested", tmp_path / "own",
        "--rule", tmp_path / "rule" / "32", tmp_path / "rule" / "544", "--lengths", *sorted((tmp_path / "lengths").iterdir()),
        "--noise", tmp_path / "noise", "--out", tmp_path / "x.png", python=sys.executable,
    )  # fmt: skip
    assert "| **0.002, suggested** | -101.5 | 1.5% |" in printed
    assert "| 544 | -210.0 | 75.0% | -200.0 (66.7%) |" in printed
    assert "critical batch 96 ± 0 images; 5,000 images each\n(simple noise scale, counted alike: 24 ± 0)" in printed
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
