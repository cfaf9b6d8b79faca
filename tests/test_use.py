"""What one does with a trained model: sample it, score it, export it, load it."""

import json
import tarfile

import pytest
import safetensors.torch
import torch

import vaetrain
from latent_scenario import read_a_share
from together import run_script, script_succeeds, succeed_together
from vaetrain.data.readers.order import BatchLayout
from vaetrain.encode import EncodeConfig, encode
from vaetrain.evaluate import EvaluateConfig, evaluate
from vaetrain.export import export
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.runs.directory import RunDirectory
from vaetrain.sample import SampleConfig, sample

QUICK = LikelihoodConfig(num_images=4, num_samples=20)


def read_samples(folder):
    """Every picture of a sample set, by name."""
    pictures = {}
    for file in folder.glob("*.tar"):
        with tarfile.open(file) as tar:
            pictures |= {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".png")}
    return pictures


def test_samples_are_the_same_on_one_and_two_processes(copy_of_tiny_run, accelerator, tmp_path):
    run_dir = copy_of_tiny_run()
    one, two, more = tmp_path / "one", tmp_path / "two", tmp_path / "more"
    sample(SampleConfig(run_dir, one, num_images=10, batch_size=4), accelerator)
    sample(SampleConfig(run_dir, more, num_images=13, batch_size=4), accelerator)
    script_succeeds(
        "vaetrain/sample.py", "--run", run_dir, "--num-images", 10, "--batch-size", 4, "--out", two, num_processes=2
    )
    assert {path.name for path in two.iterdir()} == {
        "rank-0000-000000.tar",
        "rank-0001-000000.tar",
        "manifest.json",
        "provenance.json",
    }
    assert len(read_samples(one)) == 10
    assert read_samples(one) == read_samples(two)
    assert read_samples(one).items() <= read_samples(more).items()
    manifest = json.loads((two / "manifest.json").read_text())
    assert (manifest["count"], manifest["seed"], manifest["prior"], manifest["temperature"]) == (10, 0, "standard", 1.0)
    assert sum(shard["num_images"] for shard in manifest["shards"]) == 10
    assert manifest["training"]["config"]["run_dir"] == str(RunDirectory(run_dir).config().run_dir)


def test_latents_are_the_same_on_one_and_two_processes(copy_of_tiny_run, accelerator, tmp_path):
    run_dir, options = copy_of_tiny_run(), {"batch_size": 10, "images_per_file": 20}
    encode(EncodeConfig(run_dir, tmp_path / "one", flip=True, **options), accelerator)
    arguments = (
        "--run",
        run_dir,
        "--out",
        tmp_path / "two",
        "--flip",
        True,
        "--batch-size",
        10,
        "--images-per-file",
        20,
    )
    said = script_succeeds("vaetrain/encode.py", *arguments, num_processes=2)
    assert "100 train and 23 val latents 4 × 8 × 8 in fp32 written" in said
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir() if file.name != "provenance.json"}
    assert {"train-000004.tar", "val-000001.tar", "manifest.json", "index.safetensors"} <= files.keys()
    assert {file.name for file in (tmp_path / "two").iterdir()} == {*files, "provenance.json"}
    assert {name: (tmp_path / "two" / name).read_bytes() for name in files} == files
    succeed_together(read_a_share, tmp_path / "two", tmp_path)
    shares = [safetensors.torch.load_file(tmp_path / f"share-{rank}.safetensors") for rank in (0, 1)]
    alone = vaetrain.LatentReader.open(tmp_path / "one").train_batches(1, 0, BatchLayout.of(20, None, 0, 1))
    for number in range(2):
        batch = next(alone)
        assert torch.cat([share[f"z.{number}"] for share in shares]).equal(batch.z)
        assert torch.cat([share[f"indices.{number}"] for share in shares]).equal(batch.indices)


def test_another_seed_draws_others_and_a_sample_set_is_not_overwritten(copy_of_tiny_run, accelerator, tmp_path):
    run_dir = copy_of_tiny_run()
    sample(SampleConfig(run_dir, tmp_path / "a", num_images=3), accelerator)
    sample(SampleConfig(run_dir, tmp_path / "b", num_images=3, seed=1), accelerator)
    assert not set(read_samples(tmp_path / "a").values()) & set(read_samples(tmp_path / "b").values())
    with pytest.raises(FileExistsError, match=r"sample set \(seed was 0, now 2\); choose another --out"):
        sample(SampleConfig(run_dir, tmp_path / "a", num_images=3, seed=2), accelerator)


def test_scores(copy_of_tiny_run, accelerator):
    run_dir = copy_of_tiny_run()
    scores = evaluate(EvaluateConfig(run_dir, likelihood=QUICK), accelerator)
    last = RunDirectory(run_dir).metrics()[-1]
    for name in ("elbo_nats", "distortion_nats", "rate_nats", "bits_per_dim", "mse", "psnr_db", "ssim"):
        assert scores[f"val/{name}"] == pytest.approx(last[f"val/{name}"], rel=1e-4)
    assert scores["eval/fid"] is None
    assert "--fid.weights" in scores["eval/fid_reason"]
    assert json.loads((run_dir / "evaluation.json").read_text()) == scores


def test_a_deterministic_autoencoder_has_no_elbo(train_tiny, accelerator):
    run_dir = train_tiny("--model.variational", "False", epochs=1)
    scores = evaluate(EvaluateConfig(run_dir, likelihood=QUICK), accelerator)
    assert scores["val/elbo_nats"] is None
    assert scores["val/bits_per_dim"] is None
    assert scores["val/rate_nats"] == 0


def test_an_export_loads_without_the_run(copy_of_tiny_run, accelerator, tmp_path):
    run_dir, out = copy_of_tiny_run(), tmp_path / "export"
    evaluate(EvaluateConfig(run_dir, likelihood=QUICK), accelerator)
    assert str(out) in script_succeeds("tools/export.py", run_dir, out)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "README.md", "provenance.json"}
    trained = vaetrain.load(run_dir)
    run_dir.rename(tmp_path / "elsewhere")
    shipped = vaetrain.load(out)
    for vae in (trained, shipped):  # as they were trained
        assert vae.encoder.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = trained.from_uint8(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    assert torch.equal(shipped.sample(3, seed=1), trained.sample(3, seed=1))
    assert torch.equal(shipped.reconstruct(x), trained.reconstruct(x))
    card = (out / "README.md").read_text()
    content = json.loads((out / "config.json").read_text())
    assert content["dataset"]["train"]["fingerprint"] in card
    assert f"| val/psnr_db | {content['scores']['val/psnr_db']:.4f} |" in card
    with pytest.raises(FileExistsError, match="choose another folder"):
        export(tmp_path / "elsewhere", out)


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run directory"):
        vaetrain.load(tmp_path)
    outcome = run_script("tools/export.py", tmp_path, tmp_path / "out")
    assert outcome.exit_codes == [1]
    assert "is no run directory" in outcome.printed[0]
