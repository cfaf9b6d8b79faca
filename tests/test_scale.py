"""vaetrain/scale.py as a user runs it: on one and two processes, and its recommendation trains."""

from __future__ import annotations

import json

import pytest
import yaml
from launching import TINY, run, succeed

from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.scaling.config import ScaleConfig

QUICK = (
    "--probe.largest", "4", "--probe.num-steps", "1", "--lr-range.num-steps", "40", "--lr-range.num-seeds", "2",
    "--lr-range.trial-steps", "20",
    "--noise.num-steps", "20", "--noise.skip-steps", "5", "--train.epochs", "2",
)  # fmt: skip


@pytest.mark.parametrize("two_processes", [False, True])
def test_it_measures_advises_and_its_recommendation_trains(tiny_shards, tmp_path, two_processes):
    out = tmp_path / "out"
    printed = succeed(
        "vaetrain/scale.py", *TINY, *QUICK, "--data.train", tiny_shards, "--out", out, two_processes=two_processes
    )
    count = 2 if two_processes else 1
    assert f"recommended.yaml (for {count} processes), scaling.json and scaling.png written to {out}" in printed
    assert ("measured between 2 processes (gloo)" in printed) == two_processes
    assert ("ASSUMED" in printed) != two_processes
    found = json.loads((out / "scaling.json").read_text())
    assert [each["num_processes"] for each in found["advice"]] == [1, 2, 4, 8, 64]
    assert [m["micro_batch_size"] for m in found["probe"][0]["measurements"]] == [1, 2, 4]
    assert len(found["lr_range"]["curves"]) == 2
    assert len(found["lr_trials"]["trials"]) >= 2
    assert found["advice"][0]["optim"]["lr"] == pytest.approx(found["lr_trials"]["suggestion"], rel=1e-9) or (
        found["advice"][0]["global_batch_size"] != 20
    )
    assert found["noise_scale"]["small_batch"] == (10 if two_processes else 5)
    assert found["noise_scale"]["simple"]["num_steps"] == found["noise_scale"]["adam"]["num_steps"] == 15
    assert [images for images, _, _ in found["noise_scale"]["stretches"]] == [40 * number for number in range(1, 11)]
    assert "critical batch (Adam's gradient noise scale)" in printed or "noise drowns the gradient" in printed
    assert found["provenance"]["num_processes"] == count
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    own = found["advice"][count - 1]
    recommended = yaml.safe_load((out / "recommended.yaml").read_text())
    assert recommended["train"]["global_batch_size"] == own["global_batch_size"]
    assert recommended["optim"]["lr"] == own["optim"]["lr"]
    config = parse(
        Config, None, ["--config", str(out / "recommended.yaml"), *TINY[:-6], "--data.train", str(tiny_shards)]
    )
    assert config.optim.lr == own["optim"]["lr"]
    if not two_processes:
        train = ("vaetrain/train.py", *TINY, "--config", out / "recommended.yaml", "--data.train", tiny_shards)
        succeed(*train, "--train.num-images", 40, "--run-dir", tmp_path / "run")


def test_nothing_is_overwritten_and_advice_needs_the_probe(tiny_shards, tmp_path):
    (tmp_path / "scaling.json").write_text("{}")
    result = run("vaetrain/scale.py", *TINY, "--data.train", tiny_shards, "--out", tmp_path)
    assert result.returncode == 1
    assert "already holds a scaling.json; name another folder with --out" in result.stderr
    asked = [*TINY, "--data.train", "x", "--out", "y"]
    assert parse(ScaleConfig, None, [*asked, "--for-num-processes", "3", "9"]).for_num_processes == (3, 9)
    for refused in (
        ["--phases", "lr"],
        ["--for-num-processes", "0"],
        ["--noise.num-steps", "1", "--noise.skip-steps", "0"],
    ):
        with pytest.raises(SystemExit):
            parse(ScaleConfig, None, [*asked, *refused])
