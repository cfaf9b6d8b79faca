"""vaetrain/scale.py as a user runs it: on one and two processes, and its recommendation trains."""

from __future__ import annotations

import json

import pytest
import yaml

from launching import TINY
from together import run_script, script_succeeds
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.scaling.config import ScaleConfig

QUICK = (
    "--model.kind", "dense", "--model.hidden-features", "32",
    "--optim.warmup-fraction", "0.4",
    "--probe.largest", "4", "--probe.num-steps", "1", "--lr-range.num-steps", "30", "--lr-range.num-seeds", "2",
    "--lr-range.trial-steps", "20",
    "--noise.num-steps", "20", "--noise.skip-steps", "5", "--train.epochs", "2",
)  # fmt: skip


@pytest.mark.parametrize("two_processes", [False, True])
def test_it_measures_advises_and_its_recommendation_trains(tiny_shards, tmp_path, two_processes):
    out = tmp_path / "out"
    count = 2 if two_processes else 1
    command = ("vaetrain/scale.py", *TINY, *QUICK, "--data.train", tiny_shards, "--out", out)
    printed = script_succeeds(*command, num_processes=count)
    assert (
        f"recommended.yaml (for {count} process{'es' * two_processes}), scaling.json and scaling.png written to {out}"
        in printed
    )
    assert ("measured between 2 processes (gloo)" in printed) == two_processes
    assert ("ASSUMED" in printed) != two_processes
    found = json.loads((out / "scaling.json").read_text())
    assert [each["num_processes"] for each in found["advice"]] == [1, 2, 4, 8, 64]
    assert [m["micro_batch_size"] for m in found["probe"][0]["measurements"]] == [1, 2, 4]
    assert len(found["lr_range"]["curves"]) == 2
    assert len(found["lr_trials"]["trials"]) >= 2
    at_base = found["advice"][0]
    assert at_base["global_batch_size"] == 20
    assert at_base["optim"]["lr"] == pytest.approx(found["lr_trials"]["suggestion"], rel=1e-9)
    assert found["noise_scale"]["small_batch"] == (10 if two_processes else 4)  # no larger micro-batch was probed
    assert found["noise_scale"]["simple"]["num_steps"] == found["noise_scale"]["adam"]["num_steps"] == 15
    assert [images for images, _, _ in found["noise_scale"]["stretches"]] == [40 * number for number in range(1, 11)]
    said = (
        "is not measurable"
        if found["noise_scale"]["adam"]["images"] is None
        else "critical batch (Adam's gradient noise scale)"
    )
    assert said in printed
    assert found["provenance"]["num_processes"] == count
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    own = found["advice"][count - 1]
    recommended = yaml.safe_load((out / "recommended.yaml").read_text())
    assert recommended["train"]["global_batch_size"] == own["global_batch_size"]
    assert recommended["optim"]["lr"] == own["optim"]["lr"]
    (tmp_path / "same.yaml").write_text("optim: {warmup_fraction: 0.4}")
    files = ["--config", str(tmp_path / "same.yaml"), "--config", str(out / "recommended.yaml")]
    config = parse(Config, None, [*files, *TINY[:-6], "--data.train", str(tiny_shards)])
    assert config.optim.lr == own["optim"]["lr"]
    assert at_base["optim"]["warmup_images"] == 80  # of 200 images
    assert (config.optim.warmup_fraction, config.optim.warmup_images) == (None, own["optim"]["warmup_images"])
    if not two_processes:
        train = ("vaetrain/train.py", *TINY, "--config", out / "recommended.yaml", "--data.train", tiny_shards)
        script_succeeds(*train, "--train.num-images", 40, "--run-dir", tmp_path / "run")


def test_a_training_that_diverges_is_not_called_noise(tiny_shards, tmp_path):
    printed = script_succeeds(
        "vaetrain/scale.py", *TINY, *QUICK, "--phases", "probe", "noise", "--optim.lr", "1e9", "--optim.clip-norm", "None",
        "--optim.warmup-images", "0", "--data.train", tiny_shards, "--out", tmp_path / "out", "--for-num-processes", "1", "999",
        "--advice.gb-per-s", "3",
    )  # fmt: skip
    assert "no gradient noise scale: training with learning rate 1e+09 diverged; lower --optim.lr" in printed
    assert "left out: 999 processes, more than the" in printed
    assert "network: 3 GB/s, 50 µs, bandwidth as given, latency ASSUMED; give --advice.latency-us" in printed
    found = json.loads((tmp_path / "out" / "scaling.json").read_text(), parse_constant=pytest.fail)
    assert found["noise_scale"] is None
    assert [each["num_processes"] for each in found["advice"]] == [1]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--noise.parts", "3"), "--noise.parts 3 does not divide --train.global-batch-size 20"),
        (("--train.global-batch-size", "4096"), "fewer than one global batch"),
        (("--for-num-processes", "999"), "--for-num-processes 999: the training split has"),
        (("--out", "README.md"), "README.md is a file; name a folder with --out"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(tiny_shards, tmp_path, asked, said):
    outcome = run_script(
        "vaetrain/scale.py", *TINY, *QUICK, "--data.train", tiny_shards, "--out", tmp_path / "out", *asked
    )
    assert outcome.exit_codes == [1]
    assert said in outcome.printed[0]
    assert "micro-batches" not in outcome.printed[0]


def test_nothing_is_overwritten_and_advice_needs_the_probe(tiny_shards, tmp_path):
    (tmp_path / "scaling.json").write_text("{}")
    outcome = run_script("vaetrain/scale.py", *TINY, "--data.train", tiny_shards, "--out", tmp_path)
    assert outcome.exit_codes == [1]
    assert "already holds a scaling.json; name another folder with --out" in outcome.printed[0]
    asked = [*TINY, "--data.train", "x", "--out", "y"]
    assert parse(ScaleConfig, None, [*asked, "--for-num-processes", "3", "9"]).for_num_processes == (3, 9)
    for refused in (
        ["--phases", "lr"],
        ["--for-num-processes", "0"],
        ["--noise.num-steps", "1", "--noise.skip-steps", "0"],
        ["--advice.gb-per-s", "0"],
        ["--advice.latency-us", "-1"],
        ["--probe.cpu-memory-gib", "-1"],
    ):
        with pytest.raises(SystemExit):
            parse(ScaleConfig, None, [*asked, *refused])
