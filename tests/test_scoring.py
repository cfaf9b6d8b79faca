"""All groups of scores together, as evaluate.py takes them."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lpips_weights import write_random_lpips_weights
from together import script_succeeds
from torchscript_extractor import write_torchscript_extractor
from vaetrain.command_line import parse
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.evaluate import evaluate, main
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.exit_codes import EXIT_INCOMPLETE
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.priors.config import FITTED_PRIORS, PRIOR_NAMES, PriorFitConfig
from vaetrain.runs.directory import RunDirectory
from vaetrain.sample import SampleConfig, sample

QUICK = {
    "num_pictures": 12,
    "likelihood": LikelihoodConfig(num_images=4, num_samples=10),
    "fit": PriorFitConfig(gmm_components=(2,), leading_dims=4, flow_steps=20),
}


@pytest.fixture(scope="module")
def run_dir(tiny_run, tmp_path_factory) -> Path:
    """A copy of the tiny run for this file's scores."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("scoring") / "run")


def test_all_priors_stand_side_by_side(run_dir, accelerator, tmp_path):
    fid = FidConfig(
        num_images=20, extractor=str(write_torchscript_extractor(tmp_path / "mine.pt")), cache_dir=tmp_path / "cache"
    )
    config = EvaluateConfig(run_dir, scores=("fid", "nearest", "latents"), priors=("all",), fid=fid, **QUICK)
    scores = evaluate(config, accelerator)
    assert tuple(scores["priors"]) == FITTED_PRIORS
    assert scores["priors"]["standard"]["eval/fid"] == scores["eval/fid"]
    # Each has its own samples; a flow that has hardly been trained is the Gaussian that it starts from.
    assert len({row["eval/fid"] for row in scores["priors"].values()}) >= len(FITTED_PRIORS) - 1
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


def small_fid(tmp_path) -> FidConfig:
    extractor = tmp_path / "mine.pt"
    if not extractor.exists():
        write_torchscript_extractor(extractor)
    return FidConfig(num_images=20, extractor=str(extractor), cache_dir=tmp_path / "cache")


def numbers(scores):
    return {name: value for name, value in scores.items() if name.startswith("eval/")}


def test_a_sample_set_scores_as_samples_drawn_now_do_on_one_and_two_processes(run_dir, accelerator, tmp_path):
    fid, scores = small_fid(tmp_path), ("fid", "nearest")
    drawn = tmp_path / "drawn"
    sample(SampleConfig(run_dir, drawn, 23, batch_size=4, images_per_shard=5, temperature=0.5), accelerator)
    options = {"scores": scores, "fid": fid, "batch_size": 4, **QUICK}
    given = evaluate(EvaluateConfig(run_dir, tmp_path / "given.json", samples=drawn, **options), accelerator)
    now = evaluate(EvaluateConfig(run_dir, tmp_path / "now.json", temperature=0.5, **options), accelerator)
    warm = evaluate(EvaluateConfig(run_dir, tmp_path / "warm.json", **options), accelerator)
    assert numbers(given) == pytest.approx(numbers(now), rel=1e-6)  # batches end where shards do, and round otherwise
    assert warm["eval/fid"] != now["eval/fid"]
    assert warm["eval/nearest_pixel_distance_ratio"] != now["eval/nearest_pixel_distance_ratio"]
    manifest = json.loads((drawn / "manifest.json").read_text())
    for protocol in (given["fid_protocol"], given["nearest_protocol"]):
        assert protocol["samples"].pop("read_from") == str(drawn)
        assert {**manifest, **protocol["samples"]} == manifest
        assert protocol["samples"]["temperature"] == 0.5
    assert now["fid_protocol"]["samples"].items() <= {**manifest, "count": 20}.items()
    script_succeeds(
        "vaetrain/evaluate.py", "--run", run_dir, "--out", tmp_path / "two.json", "--samples", drawn, "--scores", *scores,
        "--batch-size", 4, "--num-pictures", 12, "--fid.num-images", 20, "--fid.extractor", fid.extractor,
        "--fid.cache-dir", fid.cache_dir, num_processes=2,
    )  # fmt: skip
    two = json.loads((tmp_path / "two.json").read_text())
    assert numbers(two) == pytest.approx(numbers(given), rel=1e-6)
    lines = [(tmp_path / f"{name}.nearest.jsonl").read_text() for name in ("given", "now", "two")]
    assert lines[0] == lines[1]
    found, found_by_two = ([json.loads(line) for line in text.splitlines()] for text in lines[1:])
    assert len(found) == 12
    assert [line["feature"]["index"] for line in found_by_two] == [line["feature"]["index"] for line in found]


def test_a_sample_set_that_cannot_be_scored_is_refused(run_dir, tiny_run, accelerator, tmp_path, monkeypatch):
    drawn, options = tmp_path / "drawn", {"scores": ("fid",), "fid": small_fid(tmp_path), "out": tmp_path / "s.json"}
    sample(SampleConfig(run_dir, drawn, 19, images_per_shard=10), accelerator)
    with pytest.raises(
        ValueError, match=r"holds 19 images .* compares 20; .*--num-images 20, or .*--fid.num-images 19"
    ):
        evaluate(EvaluateConfig(run_dir, samples=drawn, **options), accelerator)
    with pytest.raises(FileNotFoundError, match=r"no finished sample set"):
        evaluate(EvaluateConfig(run_dir, samples=tmp_path, **options), accelerator)
    for refused in ({"temperature": 0.5}, {"priors": ("gmm",)}, {"keep_samples": tmp_path}):
        with pytest.raises(ValueError, match=r"drawn already; leave out --(temperature|priors|keep-samples)"):
            EvaluateConfig(run_dir, samples=drawn, **refused)
    with pytest.raises(ValueError, match="--priors random-code have no noise to scale"):
        EvaluateConfig(run_dir, priors=("random-code",), temperature=0.5)
    fewer = {**options, "fid": replace(options["fid"], num_images=19)}
    monkeypatch.setattr("vaetrain.evaluation.evaluator.weights_sha256", lambda *_: "0" * 64)
    with pytest.raises(ValueError, match=r"whose weights are not those of"):
        evaluate(EvaluateConfig(run_dir, samples=drawn, **fewer), accelerator)
    monkeypatch.undo()
    shard = drawn / "rank-0000-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"rank-0000-000001.tar is missing or not the file"):
        evaluate(EvaluateConfig(run_dir, samples=drawn, **fewer), accelerator)


def test_samples_of_several_priors_are_kept_side_by_side(run_dir, accelerator, tmp_path):
    kept, fid = tmp_path / "kept", small_fid(tmp_path)
    config = EvaluateConfig(
        run_dir, tmp_path / "s.json", scores=("fid",), priors=("gaussian", "standard"), keep_samples=kept, fid=fid, **QUICK
    )  # fmt: skip
    scores = evaluate(config, accelerator)
    assert {path.name for path in kept.iterdir()} == {"gaussian", "standard"}
    assert scores["fid_protocol"]["kept_samples"] == str(kept / "gaussian")
    manifests = {path.name: json.loads((path / "manifest.json").read_text()) for path in kept.iterdir()}
    sample(SampleConfig(run_dir, tmp_path / "drawn", 20, prior="gaussian", fit=QUICK["fit"]), accelerator)
    drawn = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert manifests["gaussian"].keys() == drawn.keys()
    for name in drawn.keys() - {"provenance", "shards"}:
        assert manifests["gaussian"][name] == drawn[name], name
    assert "nearest of 256 levels" in drawn["pixels"]
    assert drawn["prior_facts"]["prior"] == "gaussian"
    again = evaluate(
        EvaluateConfig(run_dir, tmp_path / "t.json", scores=("fid",), samples=kept / "standard", fid=fid), accelerator
    )
    assert again["eval/fid"] == scores["priors"]["standard"]["eval/fid"]


def test_scores_of_their_own_place_leave_the_runs_pictures_alone(run_dir, accelerator, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.png")}
    config = EvaluateConfig(
        run_dir, tmp_path / "mine.json", scores=("nearest", "latents"), priors=("gaussian", "standard"), **QUICK
    )  # fmt: skip
    scores = evaluate(config, accelerator)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.png")} == before
    assert {path.name for path in (tmp_path / "mine.figures").iterdir()} == {
        "priors.png", "nearest.png", "latent_interpolations.png", "latent_traversals.png", "latent_pca.png",
    }  # fmt: skip
    assert scores["priors"]["gaussian"]["heldout_nats_per_dim"] < 0
    assert scores["nearest_protocol"]["features"] == "posterior means of the model's own encoder"


def test_neighbours_are_those_in_the_features_behind_fid_extracted_once(run_dir, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("vaetrain.metrics.protocol.STANDARD_MIN_GENERATED", 120)
    seen: list[int] = []
    call = FeatureExtractor.__call__

    def counting(self, images):
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", counting)
    fid = small_fid(tmp_path)

    def images_seen(fid, **options):
        seen.clear()
        config = EvaluateConfig(run_dir, tmp_path / "s.json", scores=("fid", "nearest"), fid=fid, **QUICK, **options)
        return evaluate(config, accelerator), sum(seen)

    samples, train, val, queries = 120, 100, 23, 3 * 12
    scores, count = images_seen(replace(fid, protocol="standard", num_images=None))
    assert count == samples + train + val + queries
    assert scores["nearest_protocol"]["features"]["extractor"] == fid.extractor
    scores, count = images_seen(fid, nearest_features="extractor")
    assert count == 20 + 20 + 20 + 20 + queries + train  # samples, reference, floor, validation images
    own, count = images_seen(fid)
    assert count == 20
    assert own["eval/nearest_feature_distance_ratio"] != scores["eval/nearest_feature_distance_ratio"]
    assert "encoder" in own["nearest_protocol"]["features"]


def test_the_record_says_how_far_training_was(run_dir, accelerator, tmp_path):
    scores = evaluate(EvaluateConfig(run_dir, tmp_path / "s.json", scores=("elbo",)), accelerator)
    [last] = [record for record in RunDirectory(run_dir).metrics() if record["split"] == "val"]
    for name in ("step", "images_seen", "epoch", "split"):
        assert scores[name] == last[name]


def test_likelihood_and_lpips_are_in_the_record(run_dir, accelerator, tmp_path):
    lpips = write_random_lpips_weights(tmp_path, "vgg")
    scores = evaluate(EvaluateConfig(run_dir, scores=("likelihood", "lpips"), lpips=lpips, **QUICK), accelerator)
    assert scores["eval/lpips"] > 0
    assert len(scores["lpips_protocol"]["heads_sha256"]) == 64
    assert scores["likelihood_protocol"]["nll"]["num_samples"] == 10
    assert scores["eval/rate_nats"] == pytest.approx(
        scores["eval/mutual_information_nats"] + scores["eval/marginal_kl_nats"]
    )


def test_a_missing_file_of_weights_costs_its_own_scores_alone(run_dir, accelerator, tmp_path):
    lpips = write_random_lpips_weights(tmp_path, "alex")
    lpips.heads.unlink()
    fid = FidConfig(num_images=20, weights=tmp_path / "inception.pth")
    config = EvaluateConfig(run_dir, tmp_path / "s.json", scores=("elbo", "lpips", "fid", "rfid"), lpips=lpips, fid=fid)
    scores = evaluate(config, accelerator)
    assert scores["val/psnr_db"] > 0
    assert "alex-heads.pth is no file" in scores["eval/lpips_reason"]
    for name in ("eval/fid", "eval/kid", "eval/rfid"):
        assert scores[name] is None
        assert "inception.pth" in scores[f"{name}_reason"]
    assert scores["failed"].keys() == {"lpips", "fid", "rfid"}
    assert json.loads((tmp_path / "s.json").read_text()) == scores
    with pytest.raises(ValueError, match=r"--scores fid: .*inception\.pth"):
        evaluate(replace(config, scores=("fid",)), accelerator)
    assert json.loads((tmp_path / "s.json").read_text()) == scores


def test_the_first_prior_is_the_one_named_first():
    assert EvaluateConfig(Path("run"), priors=("gmm", "standard", "gmm")).chosen_priors == ("gmm", "standard")
    assert EvaluateConfig(Path("run"), priors=("all",)).chosen_priors == PRIOR_NAMES
    assert EvaluateConfig(Path("run"), priors=("flow", "all")).chosen_priors[:2] == ("flow", "standard")


def test_priors_are_named(run_dir):
    with pytest.raises(ValueError, match="--priors names none"):
        EvaluateConfig(run_dir, priors=())


def test_a_group_that_fails_discards_none_and_what_is_finished_is_written_at_once(
    run_dir, accelerator, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "s.json"
    written = []

    def fail(*_, **__):
        written.append(json.loads(out.read_text()))
        raise RuntimeError("the moon is in the wrong phase")

    monkeypatch.setattr("vaetrain.evaluation.evaluator.likelihood_scores", fail)
    monkeypatch.setattr("vaetrain.evaluation.latent_figures.save_traversals", fail)
    config = EvaluateConfig(run_dir, out, scores=("elbo", "likelihood", "nearest", "latents"), **QUICK)
    scores = evaluate(config, accelerator)
    before_likelihood, before_traversals = written
    assert before_likelihood["val/psnr_db"] == scores["val/psnr_db"]
    assert before_likelihood["unfinished"] == ["likelihood", "nearest", "latents"]
    assert before_traversals["unfinished"] == ["latents"]
    assert scores["eval/nll_nats"] is None
    assert scores["eval/nll_nats_reason"] == "RuntimeError: the moon is in the wrong phase"
    assert scores["eval/nearest_pixel_distance_ratio"] > 0
    assert scores["failed"].keys() == {"likelihood", "picture latent_traversals"}
    assert "unfinished" not in scores
    assert json.loads(out.read_text()) == scores
    pictures = {path.stem for path in (tmp_path / "s.figures").iterdir()}
    assert pictures == {"nearest", "latent_interpolations", "latent_pca"}
    assert "likelihood could not be measured" in capfd.readouterr().err


def test_scores_from_before_stay_until_the_new_ones_are_finished(run_dir, accelerator, tmp_path, monkeypatch):
    out, previous = tmp_path / "s.json", tmp_path / "s.previous.json"
    config = EvaluateConfig(run_dir, out, scores=("elbo", "latents"), **QUICK)
    first = evaluate(config, accelerator)

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("vaetrain.evaluation.evaluator.draw_images", kill)
        for _ in range(2):
            with pytest.raises(Killed):
                evaluate(config, accelerator)
            assert json.loads(previous.read_text()) == first
            assert json.loads(out.read_text())["unfinished"] == ["latents"]
    again = evaluate(config, accelerator)
    assert not previous.exists()
    assert again["val/psnr_db"] == first["val/psnr_db"]
    with monkeypatch.context() as patched:
        patched.setattr("vaetrain.evaluation.evaluator.validate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # nothing at all was measured
            evaluate(replace(config, scores=("elbo",)), accelerator)
    assert json.loads(out.read_text()) == again


def test_a_prior_that_cannot_be_fitted_costs_itself_alone(run_dir, accelerator, tmp_path, monkeypatch):
    def fail(*_):
        raise ArithmeticError("singular")

    for file in (run_dir / "priors").rglob("*gmm*"):
        file.unlink()
    monkeypatch.setattr("vaetrain.priors.fit.fit_mixture", fail)
    options = {"scores": ("fid",), "fid": small_fid(tmp_path), **QUICK}
    scores = evaluate(EvaluateConfig(run_dir, tmp_path / "s.json", priors=("standard", "gmm"), **options), accelerator)
    assert scores["eval/fid"] > 0
    assert scores["priors"].keys() == {"standard"}
    assert scores["failed"] == {"prior gmm": "ArithmeticError: singular"}
    with pytest.raises(ValueError, match="prior gmm: ArithmeticError: singular"):  # eval/fid would have been another's
        evaluate(EvaluateConfig(run_dir, tmp_path / "t.json", priors=("gmm", "standard"), **options), accelerator)


@pytest.mark.parametrize("asked", [("--scores", "elbo", "lpips"), ()])
def test_the_exit_code_says_whether_something_asked_for_by_name_is_missing(run_dir, tmp_path, monkeypatch, asked):
    monkeypatch.setattr("vaetrain.evaluation.evaluator.likelihood_scores", lambda *_: {})
    arguments = ["--run", run_dir, "--out", tmp_path / "s.json", "--num-pictures", 2, *asked]
    config = parse(EvaluateConfig, None, [str(argument) for argument in arguments])
    if asked:
        with pytest.raises(SystemExit) as end:
            main(config)
        assert end.value.code == EXIT_INCOMPLETE
    else:
        main(config)
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["val/psnr_db"] > 0
    assert scores["eval/lpips"] is None


@pytest.mark.parametrize("num_val", [1, 2, 3])
def test_few_validation_images_are_drawn_as_far_as_they_go(run_dir, accelerator, tmp_path, num_val):
    shards = tmp_path / "shards"
    make_shards(ShardingConfig("faces", shards, size=16, num_images=12, val_count=num_val, workers=1))
    config = EvaluateConfig(
        run_dir, tmp_path / "few.json", data=str(shards), scores=("nearest", "latents"),
        priors=("standard", "gaussian"), **QUICK,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PyTorch's and NumPy's of variances that are NaN
        warnings.simplefilter("error", RuntimeWarning)
        scores = evaluate(config, accelerator)
    numbers = [value for name, value in scores.items() if name.startswith(("eval/", "val/"))]
    assert all(value is None or math.isfinite(value) for value in numbers)
    drawn = {"priors", "nearest"}
    if num_val > 1:
        drawn |= {"latent_interpolations", "latent_traversals", "latent_pca"}
    assert {file.stem for file in (tmp_path / "few.figures").iterdir()} == drawn
