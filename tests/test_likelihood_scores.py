"""Likelihood scores are the same on one and two processes, complete, and null with a reason where there are none."""

import json
import math

import pytest
import torch

from likelihood_scenarios import measure, measure_together
from linear_gaussian import LinearGaussian, MemoryReader
from lpips_weights import write_random_lpips_weights
from together import succeed_together
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.likelihood_scores import VARIATIONAL_SCORES, likelihood_scores
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig


@pytest.fixture(scope="module")
def results(tiny_shards, accelerator, tmp_path_factory):
    """What likelihood_scenarios.py measures in this process and in two."""
    folder = tmp_path_factory.mktemp("likelihood")
    write_random_lpips_weights(folder, "vgg")
    out = folder / "two.json"
    succeed_together(measure_together, tiny_shards, folder, out)
    one = measure(accelerator, tiny_shards, folder)
    two = json.loads(out.read_text())
    assert (one.pop("num_processes"), two.pop("num_processes")) == (1, 2)
    return one, two


def numbers(value, name=""):
    """Every number of nested results, by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, inner in items for path, leaf in numbers(inner, f"{name}/{key}").items()}
    return {name: value}


@pytest.mark.parametrize("scenario", ["whole", "small batches", "some", "activity", "lpips"])
def test_two_processes_score_like_one(results, scenario):
    one, two = (numbers(result[scenario]) for result in results)
    assert len(one) > 2
    assert all(math.isfinite(value) for value in one.values())
    assert two == pytest.approx(one, rel=2e-6, abs=1e-6)


def test_batches_change_nothing(results):
    one, _ = results
    assert numbers(one["small batches"]) == pytest.approx(numbers(one["whole"]), rel=2e-6, abs=1e-6)


def test_every_image_counts_once_and_a_choice_is_of_the_size_asked_for(results):
    for result in results:
        whole, some = result["whole"]["likelihood_protocol"], result["some"]["likelihood_protocol"]
        assert (whole["nll"]["num_images"], whole["aggregate_posterior"]["num_images"]) == (23, 23)
        assert (some["nll"]["num_images"], some["aggregate_posterior"]["num_images"]) == (5, 15)
        assert {split["num_images"] for split in whole["elbo_gap"].values()} == {23}
        assert result["lpips"]["num_images"] == 23


def test_scores_are_named_agree_with_each_other_and_are_json(accelerator):
    vae = LinearGaussian((0.4, 0.3))
    train, val = vae.images(200, seed=1), vae.images(150)
    config = LikelihoodConfig(num_images=None, num_samples=100)
    scores = likelihood_scores(vae, train, val, accelerator, config, batch_size=64)
    assert json.loads(json.dumps(scores)) == scores
    assert all(isinstance(scores[name], float) for name in VARIATIONAL_SCORES)
    assert scores["eval/nll_nats"] == pytest.approx(-vae.log_prob(vae.from_uint8(val.images)).mean().item(), abs=1e-2)
    assert scores["eval/nll_bits_per_dim"] == vae.likelihood.bits_per_dim(scores["eval/nll_nats"], 16)
    assert scores["eval/active_units"] == 2
    parts = scores["eval/mutual_information_nats"] + scores["eval/marginal_kl_nats"]
    assert scores["eval/rate_nats"] == pytest.approx(parts, rel=1e-9)
    assert scores["eval/marginal_kl_nats"] == pytest.approx(
        scores["eval/dimension_kl_nats"] + scores["eval/total_correlation_nats"], rel=1e-9
    )
    protocol = scores["likelihood_protocol"]
    assert list(protocol["nll"]["bounds_nats"]) == ["1", "10", "100"]
    assert protocol["aggregate_posterior"]["mutual_information_limit_nats"] == pytest.approx(math.log(150))


def test_a_deterministic_autoencoder_gets_nulls_and_the_reason(accelerator):
    vae = VAE(ModelConfig(kind="dense", image_size=4, in_channels=1, hidden_features=(4,), variational=False)).eval()
    reader = MemoryReader(torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8))
    scores = likelihood_scores(vae, reader, reader, accelerator, LikelihoodConfig(), batch_size=8)
    assert all(scores[name] is None for name in VARIATIONAL_SCORES)
    assert "deterministic autoencoder" in scores["eval/nll_nats_reason"]
    assert scores["eval/active_units"] > 0
