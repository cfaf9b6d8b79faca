"""What an older vaetrain wrote is still read: fixtures/REVISION.tar.gz holds a shard set, a run, samples and an export of each."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import vaetrain
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.evaluate import evaluate
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.runs.directory import RunDirectory
from vaetrain.sample import SampleConfig, sample
from vaetrain.sampling.reader import SampleReader
from vaetrain.train import train


@pytest.fixture(params=["ec12a9c"])
def written(request, tmp_path):
    with tarfile.open(Path(__file__).parent / "fixtures" / f"{request.param}.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_is_scored_as_it_was(written, accelerator):
    before = json.loads((written / "run" / "evaluation.json").read_text())
    config = EvaluateConfig(written / "run", written / "now.json", data=str(written / "shards"), scores=("elbo",))
    now = evaluate(config, accelerator)
    for name in ("val/elbo_nats", "val/distortion_nats", "val/rate_nats", "val/psnr_db", "val/ssim"):
        assert now[name] == pytest.approx(before[name], rel=1e-5)


def test_training_does_not_go_on_and_says_with_what_it_would(written, accelerator):
    """Noise is drawn otherwise since format 3: the rest would be another training."""
    run = RunDirectory(written / "run")
    own = ["--config", str(run.config_file), "--data.train", str(written / "shards"), "--train.num-images", "24"]
    with pytest.raises(
        ValueError, match=r"has format 2, .* vaetrain 0\.1\.0, which wrote it, .* --init-from .*step-00000004"
    ):
        train(parse(Config, None, [*own, "--run-dir", str(run.path)]), accelerator)
    new = [*own, "--run-dir", str(written / "new"), "--init-from", str(run.path)]
    assert train(parse(Config, None, new), accelerator).images_seen == 24
    accelerator.free_memory()


def test_samples_and_export_are_read_and_the_fitted_prior_draws(written, accelerator):
    assert SampleReader.open(written / "samples").num_images == 4
    assert vaetrain.load(written / "export").sample(2).shape == (2, 3, 8, 8)
    assert vaetrain.load(written / "run").sample(2).shape == (2, 3, 8, 8)
    sample(SampleConfig(written / "run", written / "more", num_images=3, prior="gaussian"), accelerator)
    assert SampleReader.open(written / "more").num_images == 3
