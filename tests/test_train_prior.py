"""train_prior.py as a user has it: trained on a run's latents, exact on processes and resumes, found by all that draws."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

import flow_matching_scenario
import vaetrain
from flow_matching_scenario import prior_config
from together import succeed_together
from vaetrain.encode import EncodeConfig, encode
from vaetrain.evaluate import EvaluateConfig, evaluate
from vaetrain.export import export, load_run
from vaetrain.preflight import check_prior_training
from vaetrain.priors.config import PriorFitConfig
from vaetrain.priors.flow_matching.stage import FlowMatchingStage
from vaetrain.priors.saved import prior_file, prior_of_run
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.sample import SampleConfig, sample
from vaetrain.train import train
from vaetrain.train_prior import SecondStage
from vaetrain.training.logger import RunLogger

QUICK = PriorFitConfig(flow_steps=1, gmm_components=(1,))


@pytest.fixture(scope="module")
def first_stage(tiny_run, accelerator, tmp_path_factory):
    """A run of one's own, and its latents."""
    folder = tmp_path_factory.mktemp("first_stage")
    run = shutil.copytree(tiny_run, folder / "run")
    encode(EncodeConfig(run, folder / "latents", flip=True), accelerator)
    return run, folder / "latents"


@pytest.fixture
def train_prior(first_stage, accelerator, tmp_path):
    """Train a small prior in this process; returns its run directory."""
    run, latents = first_stage

    def run_training(*arguments, name="prior"):
        config = prior_config(
            "--first-stage",
            run,
            "--data.latents",
            latents,
            "--run-dir",
            tmp_path / name,
            "--train.epochs",
            2,
            *arguments,
        )
        train(config, accelerator, kind=SecondStage)
        accelerator.free_memory()
        return config.run_dir

    return run_training


def records(run_dir, split):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def test_two_processes_train_like_one_and_accumulation_like_a_whole_batch(first_stage, tmp_path):
    run, latents = first_stage
    results = []
    for num_processes in (1, 2):
        out = tmp_path / str(num_processes)
        out.mkdir()
        succeed_together(flow_matching_scenario.train_small, str(run), str(latents), out, num_processes=num_processes)
        results.append(json.loads((out / "results.json").read_text()))
    one, two = results
    assert len(one["plain"]["losses"]) == 20
    assert one["plain"]["held_out"][-1] < one["plain"]["held_out"][0]
    for found in (two["plain"], one["accumulated"], two["accumulated"]):
        for name in ("losses", "held_out", "norm"):
            assert found[name] == pytest.approx(one["plain"][name], rel=1e-5), name
        assert found["apart"] == 0


def test_a_killed_training_resumes_bit_for_bit(train_prior):
    whole = train_prior("--checkpoint.every-steps", 3, name="whole")
    log = RunLogger.log_training

    def die(self, progress, *arguments, **options):
        log(self, progress, *arguments, **options)
        if progress.step == 8:
            raise KeyboardInterrupt

    with patch.object(RunLogger, "log_training", die), pytest.raises(KeyboardInterrupt):
        train_prior("--checkpoint.every-steps", 3, name="killed")
    assert list_checkpoints(whole.parent / "killed" / "checkpoints")[-1].name == "step-00000006"
    killed = train_prior("--checkpoint.every-steps", 3, name="killed")
    for name in ("model", "ema", "optimizer"):
        ends = [load_file(list_checkpoints(run / "checkpoints")[-1] / f"{name}.safetensors") for run in (whole, killed)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    for split, metric in (("train", "train/loss"), ("val", "val/flow_loss")):
        assert [each[metric] for each in records(whole, split)] == [each[metric] for each in records(killed, split)]


def test_another_network_or_other_latents_are_refused(train_prior, first_stage, accelerator, tmp_path):
    train_prior()
    with pytest.raises(ValueError, match=r"was trained with --model\.\* NetworkConfig\(width=32"):
        train_prior("--model.width", 16)
    run, _ = first_stage
    encode(EncodeConfig(run, tmp_path / "raw", weights="raw"), accelerator)
    with pytest.raises(ValueError, match="was encoded by weights with SHA-256"):
        train_prior("--data.latents", tmp_path / "raw", name="other")


def test_the_best_weights_lie_beside_the_first_stages_checkpoint(train_prior, first_stage):
    run, _ = first_stage
    prior_run = train_prior()
    trained = load_run(run)
    prior = prior_of_run(run, trained)
    losses = [record["val/flow_loss"] for record in records(prior_run, "val")]
    best = list_checkpoints(prior_run / "checkpoints")[losses.index(min(losses)) - len(losses)]
    weights = load_file(best / "ema.safetensors")
    assert all(torch.equal(prior.model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert prior.classes == ("cat", "dog")
    assert (prior_run / "figures" / "samples.png").is_file()
    assert (prior_run / "figures" / "losses.png").is_file()
    provenance = json.loads((best / "provenance.json").read_text())
    assert provenance["git_revision"] is None or len(provenance["git_revision"]) == 40
    assert json.loads((best / "dataset.json").read_text())["train"]["encoder"]["checkpoint"] == str(trained.checkpoint)


def test_everything_that_draws_finds_it(train_prior, first_stage, accelerator, tmp_path, capsys):
    run, _ = first_stage
    train_prior()
    vae = vaetrain.load(run)
    dogs = vae.sample(4, class_="dog", seed=3)
    assert torch.equal(dogs, vaetrain.load(run).sample(4, class_="dog", seed=3))
    assert not torch.equal(dogs, vae.sample(4, class_="cat", seed=3))

    sample(
        SampleConfig(run, tmp_path / "set", 6, seed=3, prior="flow-matching", class_="dog", batch_size=4), accelerator
    )
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert (manifest["prior"], manifest["class"], manifest["steps"], manifest["solver"]) == (
        "flow-matching",
        "dog",
        30,
        "heun",
    )
    assert manifest["prior_facts"]["details"]["images_seen"] <= 200
    with pytest.raises(ValueError, match="no class 'bird': it knows cat, dog"):
        sample(SampleConfig(run, tmp_path / "birds", 6, prior="flow-matching", class_="bird"), accelerator)

    trained = load_run(run)
    out = export(run, tmp_path / "export", prior=prior_file(run, trained, "flow-matching"))
    shipped = vaetrain.load(out)
    torch.testing.assert_close(shipped.sample(4, class_="dog", seed=3), dogs)
    tensors = load_file(out / "flow-matching.safetensors")
    save_file(tensors, out / "flow-matching.safetensors")  # without its facts
    with pytest.raises(ValueError, match=r"flow-matching\.safetensors is damaged or no prior"):
        vaetrain.load(out)

    evaluate(
        EvaluateConfig(run, out=tmp_path / "scores.json", scores=("elbo",), priors=("all",), fit=QUICK),
        accelerator,
    )
    table = json.loads((tmp_path / "scores.json").read_text())["priors"]
    assert list(table) == ["standard", "gaussian", "gmm", "flow", "flow-matching", "mean-code", "random-code"]
    assert table["flow-matching"]["heldout_nats_per_dim"] is not None


def test_without_one_it_is_left_out_of_all_and_named_when_asked_for(tiny_run, accelerator, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"train_prior\.py --first-stage .* trains one"):
        sample(SampleConfig(run, tmp_path / "set", 6, prior="flow-matching"), accelerator)
    with pytest.raises(ValueError, match="no prior that knows classes was trained"):
        vaetrain.load(run).sample(2, class_="cat")
    assert vaetrain.load(run).prior is None
    evaluate(
        EvaluateConfig(run, out=tmp_path / "scores.json", scores=("elbo",), priors=("all",), fit=QUICK), accelerator
    )
    assert "flow-matching" not in json.loads((tmp_path / "scores.json").read_text())["priors"]
    assert "left out of all priors" in capsys.readouterr().out


def test_latents_are_encoded_at_the_start_where_none_are_given(tiny_run, accelerator, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = prior_config("--first-stage", run, "--train.epochs", 1)
    assert config.run_dir == run / "priors" / "flow-matching"
    with patch.object(FlowMatchingStage, "draw"):
        train(config, accelerator, kind=SecondStage)
    accelerator.free_memory()
    manifest = json.loads((config.run_dir / "latents" / "manifest.json").read_text())
    assert manifest["flipped"] is True
    assert "url" not in manifest["splits"]["train"]["shards"][0]  # whose absence older sets' fingerprints depend on
    assert vaetrain.load(run).prior is not None


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            ("--first-stage", "RUN", "--data.latents", "NOWHERE"),
            FileNotFoundError,
            "does not exist; vaetrain/encode.py",
        ),
        (("--first-stage", "NOWHERE"), FileNotFoundError, "no run directory"),
        (("--first-stage", "RUN", "--train.global-batch-size", "4000"), ValueError, "4000|4,000"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_torch(arguments, error, match, tiny_run, tmp_path):
    places = {"RUN": tiny_run, "NOWHERE": tmp_path / "nowhere"}
    with pytest.raises(error, match=match):
        check_prior_training(prior_config(*(places.get(each, each) for each in arguments), "--run-dir", tmp_path / "p"))


def test_settings_of_another_prior_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--class, --steps: only --prior flow-matching has it, and --prior is gmm"):
        SampleConfig(tmp_path, tmp_path, prior="gmm", class_="cat", steps=10)
