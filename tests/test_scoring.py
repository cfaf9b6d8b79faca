"""All groups of scores together, as evaluate.py takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TINY
from lpips_weights import write_random_lpips_weights
from PIL import Image
from torchscript_extractor import write_torchscript_extractor

from vaetrain.evaluate import evaluate
from vaetrain.metrics.config import EvaluateConfig, FidConfig
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.priors.config import PRIOR_NAMES, PriorFitConfig

QUICK = {
    "num_pictures": 12,
    "likelihood": LikelihoodConfig(num_images=4, num_samples=10),
    "fit": PriorFitConfig(gmm_components=(2,), leading_dims=4, flow_steps=20),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_shards, accelerator):
    from vaetrain.command_line import parse
    from vaetrain.config import Config
    from vaetrain.train import train

    folder = tmp_path_factory.mktemp("scoring")
    arguments = [*TINY, "--data.train", tiny_shards, "--train.epochs", 1, "--run-dir", folder / "run"]
    train(parse(Config, None, [str(argument) for argument in arguments]), accelerator)
    accelerator.free_memory()
    return folder / "run"


def test_all_priors_stand_side_by_side(run_dir, accelerator, tmp_path):
    fid = FidConfig(
        num_images=20, extractor=str(write_torchscript_extractor(tmp_path / "mine.pt")), cache_dir=tmp_path / "cache"
    )
    config = EvaluateConfig(run_dir, scores=("fid", "nearest", "latents"), priors=("all",), fid=fid, **QUICK)
    scores = evaluate(config, accelerator)
    assert tuple(scores["priors"]) == PRIOR_NAMES
    assert scores["priors"]["standard"]["eval/fid"] == scores["eval/fid"]
    # Each has its own samples; a flow that has hardly been trained is the Gaussian that it starts from.
    assert len({row["eval/fid"] for row in scores["priors"].values()}) >= len(PRIOR_NAMES) - 1
    for name in ("standard", "gaussian", "gmm", "flow"):
        assert scores["priors"][name]["heldout_nats_per_dim"] < 0
    assert scores["fid_protocol"]["prior"] == "standard"
    assert json.loads((run_dir / "evaluation.json").read_text()) == scores
    for name in ("priors", "nearest", "latent_interpolations", "latent_traversals", "latent_pca"):
        with Image.open(run_dir / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 50
    assert 0 <= scores["eval/nearest_pixel_closer_than_val"] <= 1


def test_the_first_prior_that_was_chosen_is_the_one_scored(run_dir, accelerator, tmp_path):
    fid = FidConfig(
        num_images=20, extractor=str(write_torchscript_extractor(tmp_path / "mine.pt")), cache_dir=tmp_path / "cache"
    )
    scores = evaluate(EvaluateConfig(run_dir, scores=("fid",), priors=("gaussian",), fid=fid, **QUICK), accelerator)
    assert scores["fid_protocol"]["prior"] == "gaussian"
    standard = evaluate(EvaluateConfig(run_dir, scores=("fid",), fid=fid, **QUICK), accelerator)
    assert standard["priors"] == {}
    assert standard["eval/fid"] != scores["eval/fid"]


def test_likelihood_and_lpips_are_in_the_record(run_dir, accelerator, tmp_path):
    lpips = write_random_lpips_weights(tmp_path, "vgg")
    scores = evaluate(EvaluateConfig(run_dir, scores=("likelihood", "lpips"), lpips=lpips, **QUICK), accelerator)
    assert scores["eval/lpips"] > 0
    assert len(scores["lpips_protocol"]["heads_sha256"]) == 64
    assert scores["likelihood_protocol"]["nll"]["num_samples"] == 10
    assert scores["eval/rate_nats"] == pytest.approx(
        scores["eval/mutual_information_nats"] + scores["eval/marginal_kl_nats"]
    )


def test_a_missing_lpips_file_is_told_before_anything_is_computed(run_dir, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("vaetrain.scoring.load_run", None)
    lpips = write_random_lpips_weights(tmp_path, "alex")
    lpips.heads.unlink()
    with pytest.raises(FileNotFoundError, match=r"--lpips\.heads .*alex-heads\.pth is no file"):
        evaluate(EvaluateConfig(run_dir, scores=("elbo", "lpips"), lpips=lpips), accelerator)


def test_the_first_prior_is_the_one_named_first():
    assert EvaluateConfig(Path("run"), priors=("gmm", "standard", "gmm")).chosen_priors == ("gmm", "standard")
    assert EvaluateConfig(Path("run"), priors=("all",)).chosen_priors == PRIOR_NAMES
    assert EvaluateConfig(Path("run"), priors=("flow", "all")).chosen_priors[:2] == ("flow", "standard")


def test_priors_are_named(run_dir):
    with pytest.raises(ValueError, match="--priors names none"):
        EvaluateConfig(run_dir, priors=())
