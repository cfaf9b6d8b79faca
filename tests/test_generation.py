"""Scores of generated images: equal to torch-fidelity's on the same files, the same on two processes, each with its floor."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors import safe_open

from inception_weights import write_random_inception_weights
from together import script_succeeds
from torchscript_extractor import write_torchscript_extractor
from vaetrain.evaluate import EvaluateConfig, evaluate
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import FeatureExtractor, Features
from vaetrain.metrics.features import FeatureSet
from vaetrain.metrics.fidelity import FeatureGaussian, FeatureStatistics, frechet_distance
from vaetrain.metrics.generation import FidReference, inception_score, precision_recall
from vaetrain.metrics.likelihood_config import LikelihoodConfig
from vaetrain.metrics.protocol import Protocol
from vaetrain.metrics.reference import RealFeatures
from vaetrain.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def run_dir(tiny_run, tmp_path_factory) -> Path:
    """A copy of the tiny run for this file's scores."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("generation") / "run")


@pytest.fixture
def mine(tmp_path) -> Path:
    return write_torchscript_extractor(tmp_path / "mine.pt")


def unpack_samples(sample_set: Path, folder: Path) -> Path:
    """The pictures of a sample set as files."""
    folder.mkdir()
    for file in sample_set.glob("*.tar"):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    (folder / member.name).write_bytes(tar.extractfile(member).read())
    return folder


def unpack_listed(listing: Path, shards: Path, folder: Path) -> Path:
    """The listed images of a shard set as files, cut out of the shards' bytes."""
    folder.mkdir()
    for number, line in enumerate(listing.read_text().splitlines()):
        image = json.loads(line)
        content = (shards / image["shard"]).read_bytes()[image["offset"] :][: image["num_bytes"]]
        (folder / f"{number:08d}.jpg").write_bytes(content)
    return folder


def test_anybody_gets_the_same_scores_with_torch_fidelity_from_the_kept_samples_and_the_listed_images(
    run_dir, tiny_shards, accelerator, tmp_path
):
    weights = write_random_inception_weights(tmp_path / "inception.pth")
    config = EvaluateConfig(
        run_dir, out=tmp_path / "scores.json", scores=("fid",), keep_samples=tmp_path / "kept",
        fid=FidConfig(num_images=10, weights=weights, cache_dir=tmp_path / "cache"),
    )  # fmt: skip
    ours = evaluate(config, accelerator)
    assert json.loads((tmp_path / "scores.json").read_text()) == ours
    protocol = ours["fid_protocol"]
    listing = tmp_path / protocol["reference_images"]
    assert len(listing.read_text().splitlines()) == protocol["num_real"] == 10
    theirs = torch_fidelity.calculate_metrics(
        input1=str(unpack_samples(tmp_path / "kept", tmp_path / "samples")),
        input2=str(unpack_listed(listing, tiny_shards, tmp_path / "real")),
        fid=True, kid=True, isc=True, prc=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), kid_subset_size=protocol["kid_subset_size"],
        cuda=False, batch_size=5, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert theirs["frechet_inception_distance"] > 1
    assert ours["eval/fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["eval/kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    # Their deviation is that of subsets of the same images, which is only a part of the error.
    assert ours["eval/kid_std_error"] > theirs["kernel_inception_distance_std"] / 10
    assert ours["eval/inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["eval/precision"] == pytest.approx(theirs["precision"], rel=1e-3)
    assert ours["eval/recall"] == pytest.approx(theirs["recall"], rel=1e-3)
    assert not protocol["weights_are_published"]
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert (manifest["count"], manifest["seed"], manifest["prior"]) == (10, 0, "standard")
    assert {**manifest, **protocol["samples"]} == manifest
    assert sum(shard["num_images"] for shard in manifest["shards"]) == 10


def test_two_processes_give_the_same_scores_as_one_and_find_its_features_in_the_cache(
    run_dir, mine, accelerator, tmp_path
):
    cache = tmp_path / "cache"
    fid = FidConfig(num_images=37, extractor=str(mine), cache_dir=cache)
    config = EvaluateConfig(
        run_dir, out=tmp_path / "one.json", batch_size=4, scores=("fid", "rfid"), keep_samples=tmp_path / "one", fid=fid
    )
    one = evaluate(config, accelerator)
    for path in cache.iterdir():  # those of the val split remain
        with safe_open(path, "pt") as file:
            is_train = json.loads(file.metadata()["key"])["split"] == "train"
        if is_train:
            path.unlink()
    printed = script_succeeds(
        "vaetrain/evaluate.py", "--run", run_dir, "--out", tmp_path / "two.json", "--batch-size", 4,
        "--scores", "fid", "rfid", "--keep-samples", tmp_path / "two", "--fid.num-images", 37, "--fid.extractor", mine,
        "--fid.cache-dir", cache, num_processes=2,
    )  # fmt: skip
    assert printed.count("extracted now") == 2
    assert "23 read from" in printed
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["provenance"]["num_processes"] == 2
    numbers = [name for name in one if name.startswith("eval/")]
    assert len(numbers) == 13
    assert one["eval/fid_gap"] == one["eval/fid_val"] - one["eval/fid_train"]
    assert one["fid_protocol"]["num_gap"] == 18  # a quarter of the 74 training images, for want of 4 times 23
    for name in numbers:
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    for protocol in ("fid_protocol", "rfid_protocol"):
        line = one[protocol]["fid_against_count"]["fids"]
        assert two[protocol]["fid_against_count"]["fids"] == pytest.approx(line, rel=1e-6)
    samples = [unpack_samples(tmp_path / kept, tmp_path / f"{kept}-png") for kept in ("one", "two")]
    names = sorted(path.name for path in samples[0].iterdir())
    assert len(names) == 37
    assert all((samples[0] / name).read_bytes() == (samples[1] / name).read_bytes() for name in names)
    shards = {path.name for path in (tmp_path / "two").iterdir()}
    assert shards == {"rank-0000-000000.tar", "rank-0001-000000.tar", "manifest.json", "provenance.json"}


def test_a_second_evaluation_extracts_no_real_image_again(run_dir, mine, accelerator, tmp_path, monkeypatch):
    seen: list[int] = []
    call = FeatureExtractor.__call__

    def counting(self, images):
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", counting)

    def images_seen(**options) -> int:
        seen.clear()
        fid = FidConfig(num_images=20, extractor=str(mine), cache_dir=tmp_path / "cache", **options)
        evaluate(EvaluateConfig(run_dir, out=tmp_path / "scores.json", scores=("fid", "rfid"), fid=fid), accelerator)
        return sum(seen)

    samples, reference, floor, held_out, val, reconstructions = 20, 20, 20, 20, 23, 23
    assert images_seen() == samples + reference + floor + held_out + val + reconstructions
    assert images_seen() == samples + reconstructions
    assert (
        images_seen(seed=1) == samples + reference + floor + held_out + reconstructions
    )  # val is whole, whatever the seed


def test_every_fid_stands_beside_its_floor_and_extrapolation(run_dir, mine, accelerator, tmp_path):
    fid = FidConfig(num_images=40, extractor=str(mine), cache_dir=tmp_path)
    scores = evaluate(EvaluateConfig(run_dir, out=tmp_path / "s.json", scores=("fid", "rfid"), fid=fid), accelerator)
    protocol = scores["fid_protocol"]
    assert 0 < scores["eval/fid_floor"] < scores["eval/fid"]
    assert protocol["num_floor"] == protocol["num_real"] == protocol["num_generated"] == 40
    assert protocol["name"] == "custom"
    line = protocol["fid_against_count"]
    assert (line["counts"][0], line["counts"][-1]) == (20, 40)
    _, intercept = np.polyfit(1 / np.array(line["counts"]), line["fids"], 1)
    assert scores["eval/fid_infinity"] == pytest.approx(intercept, rel=1e-6)
    assert line["fids"][-1] == pytest.approx(scores["eval/fid"], rel=1e-6)
    assert protocol["kid_subset_size"] == 20
    assert scores["eval/kid_std_error"] > 0
    assert "eval/inception_score" not in scores
    assert scores["rfid_protocol"]["num_real"] == 23
    assert scores["eval/rfid"] > 0


def test_perfect_reconstructions_have_no_rfid(run_dir, mine, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("vaetrain.model.autoencoder.VAE.reconstruct", lambda self, x: x)
    fid = FidConfig(extractor=str(mine), cache_dir=tmp_path)
    scores = evaluate(EvaluateConfig(run_dir, out=tmp_path / "s.json", scores=("rfid",), fid=fid), accelerator)
    assert abs(scores["eval/rfid"]) < 1e-9
    assert "eval/fid" not in scores
    assert "val/elbo_nats" not in scores


def test_per_class_scores_the_samples_against_the_whole_split_and_each_class(
    run_dir, mine, accelerator, tmp_path, monkeypatch
):
    monkeypatch.setattr("vaetrain.metrics.protocol.STANDARD_MIN_GENERATED", 120)

    def scores_of(protocol):
        fid = FidConfig(protocol=protocol, extractor=str(mine), cache_dir=tmp_path)
        return evaluate(EvaluateConfig(run_dir, out=tmp_path / "s.json", scores=("fid",), fid=fid), accelerator)

    scores, standard = scores_of("per-class"), scores_of("standard")
    protocol = scores["fid_protocol"]
    counts = RunDirectory(run_dir).path.joinpath("dataset.json")
    counts = json.loads(counts.read_text())["train"]["splits"]["train"]["class_counts"]
    assert protocol["per_class"] == counts
    assert sum(counts.values()) == protocol["num_real"] == 100
    assert protocol["num_generated"] == 120
    assert protocol["num_floor"] == 50
    assert protocol["fid_against_count"]["cut"] == "samples"
    for name in counts:
        assert scores[f"eval/fid/{name}"] > 0
        assert scores[f"eval/fid_floor/{name}"] > 0
        assert scores[f"eval/fid_infinity/{name}"] > 0
    assert scores["eval/fid"] == standard["eval/fid"]
    assert len({scores["eval/fid"], *(scores[f"eval/fid/{name}"] for name in counts)}) == 1 + len(counts)
    assert not [name for name in standard if name.startswith("eval/fid/")]


class Drawn(RealFeatures):
    """A split of Gaussian features in place of images: two ordinary classes and one of three images."""

    num_images = 0
    manifest = SimpleNamespace(classes=["cat", "dog", "axolotl"], fingerprint="f")

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.all = torch.randn(num_images, 4, generator=torch.Generator().manual_seed(seed))
        labels = np.arange(num_images) % 2
        labels[:3] = 2
        self.images = SimpleNamespace(selection=SimpleNamespace(index=SimpleNamespace(label=labels)))

    def features(self, positions, extractor, accelerator) -> FeatureSet:
        features = self.all[torch.from_numpy(positions)]
        statistics = FeatureStatistics.empty(4)
        statistics.update(features)
        return FeatureSet(features, statistics)


class Unchanged(FeatureExtractor):
    """An extractor of images that are features already."""

    def __init__(self) -> None:
        pass

    def __call__(self, images):
        return Features(images, None)

    def describe(self):
        return {}


def reference_of(protocol: Protocol, accelerator) -> FidReference:
    fid = FidConfig(num_images=20)
    return FidReference.open(Drawn(protocol.num_split, 0), Drawn(30, 1), protocol, fid, Unchanged(), accelerator)


def samples(num_images: int, seed: int = 2):
    return iter([(range(num_images), torch.randn(num_images, 4, generator=torch.Generator().manual_seed(seed)))])


def test_every_image_of_an_odd_split_counts_and_a_class_without_a_score_says_why(accelerator):
    reference = reference_of(Protocol("per-class", 50, 41, 41, seed=0), accelerator)
    found = reference.score(samples(50), accelerator)
    assert found["fid_protocol"]["per_class"] == {"cat": 19, "dog": 19, "axolotl": 3}
    assert found["eval/fid/axolotl"] is None
    assert found["eval/fid/axolotl_reason"] == "the train split has 3 image(s) of this class; it takes at least 4"
    cats = reference.real.all[4::2]
    assert found["eval/fid/cat"] == pytest.approx(
        frechet_distance(FeatureGaussian.of_features(next(samples(50))[1]), FeatureGaussian.of_features(cats)), rel=1e-6
    )


def test_beside_the_floor_stands_the_fid_of_as_many_images(accelerator):
    protocol = Protocol("standard", 50, 41, 41, seed=0)
    found = reference_of(protocol, accelerator).score(samples(50), accelerator)
    real = Drawn(41, 0).all[torch.from_numpy(protocol.halves()[0])]
    assert found["eval/fid_at_num_floor"] == pytest.approx(
        frechet_distance(FeatureGaussian.of_features(next(samples(50))[1][:20]), FeatureGaussian.of_features(real)),
        rel=1e-6,
    )
    enough = reference_of(Protocol("custom", 20, 41, 20, seed=0), accelerator).score(samples(20), accelerator)
    assert "eval/fid_at_num_floor" not in enough  # eval/fid is of as many already


@pytest.mark.parametrize("name", ["custom", "per-class"])
def test_what_concerns_real_images_alone_is_computed_once(accelerator, monkeypatch, name):
    num_distances = []

    def counting(a, b):
        num_distances.append(1)
        return frechet_distance(a, b)

    for module in ("generation", "fidelity", "fid_gap"):
        monkeypatch.setattr(f"vaetrain.metrics.{module}.frechet_distance", counting)
    size = 20 if name == "custom" else 41
    reference = reference_of(Protocol(name, size, 41, size, seed=0), accelerator)
    assert len(num_distances) == (1 if name == "custom" else 1 + 2)  # floors
    num_distances.clear()
    found = reference.score(samples(size), accelerator)
    line, gap, at_num_floor = len(found["fid_protocol"]["fid_against_count"]["counts"]), 1 + 4, 1
    assert len(num_distances) == (line + gap if name == "custom" else 3 * line + gap + at_num_floor)
    seconds = found["fid_protocol"]["seconds"]
    assert min(seconds.values()) > 0
    assert seconds.keys() == {"distances_of_real_images", "distances"}


def test_without_weights_the_other_scores_are_written_and_fid_alone_fails(run_dir, accelerator, tmp_path):
    out = tmp_path / "scores.json"
    few = LikelihoodConfig(num_images=4, num_samples=20)
    scores = evaluate(EvaluateConfig(run_dir, out=out, likelihood=few), accelerator)
    for name in ("eval/fid", "eval/rfid", "eval/kid", "eval/precision", "eval/recall"):
        assert scores[name] is None
        assert "--fid.weights FILE" in scores[f"{name}_reason"]
    assert json.loads(out.read_text())["val/psnr_db"] > 0
    for alone in (("fid",), ("rfid", "fid"), ("lpips", "fid")):
        with pytest.raises(ValueError, match=r"--scores .*no weights .* were given.*weights-inception-2015-12-05"):
            evaluate(EvaluateConfig(run_dir, out=out, scores=alone), accelerator)
    with pytest.raises(ValueError, match=r"--scores lpips: .*--lpips\.heads"):
        evaluate(EvaluateConfig(run_dir, out=out, scores=("lpips",)), accelerator)
    with pytest.raises(ValueError, match=r"--keep-samples .*samples are drawn for FID, and no weights"):
        evaluate(EvaluateConfig(run_dir, out=out, keep_samples=tmp_path / "kept"), accelerator)


def test_what_cannot_be_scored_is_refused_before_anything_is_computed(
    run_dir, mine, accelerator, tmp_path, monkeypatch
):
    monkeypatch.setattr(FeatureExtractor, "__call__", None)
    monkeypatch.setattr("vaetrain.evaluation.evaluator.validate", None)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").touch()
    fid = FidConfig(num_images=20, extractor=str(mine), cache_dir=tmp_path)
    with pytest.raises(FileExistsError, match="kept holds something else"):
        evaluate(EvaluateConfig(run_dir, keep_samples=kept, fid=fid), accelerator)
    with pytest.raises(ValueError, match="the train split has 100 images"):
        evaluate(EvaluateConfig(run_dir, scores=("fid",), fid=FidConfig(extractor=str(mine))), accelerator)
    with pytest.raises(ValueError, match="--scores names none"):
        EvaluateConfig(run_dir, scores=())
    with pytest.raises(ValueError, match="only --scores fid draws samples"):
        EvaluateConfig(run_dir, scores=("elbo",), keep_samples=kept)


def test_kept_samples_are_whole_or_absent_and_the_same_ones_are_not_written_twice(
    run_dir, mine, accelerator, tmp_path, monkeypatch
):
    kept = tmp_path / "kept"
    fid = FidConfig(num_images=20, extractor=str(mine), cache_dir=tmp_path / "cache")
    config = EvaluateConfig(run_dir, out=tmp_path / "s.json", scores=("fid",), keep_samples=kept, fid=fid)

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("vaetrain.sampling.save_samples.write_manifest", killed)
        with pytest.raises(Killed):
            evaluate(config, accelerator)
    assert not kept.exists()
    evaluate(config, accelerator)
    assert not kept.with_name("kept.partial").exists()
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    evaluate(config, accelerator)
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    with pytest.raises(FileExistsError, match="kept holds something else"):
        evaluate(EvaluateConfig(run_dir, seed=1, scores=("fid",), keep_samples=kept, fid=fid), accelerator)


def test_precision_is_of_the_samples_and_recall_of_the_real_images():
    """Samples that cover a corner of the real images are precise and recall little."""
    real = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    scores, _ = precision_recall(0.4 + 0.2 * torch.rand(200, 2, generator=torch.Generator().manual_seed(1)), real)
    assert scores["eval/precision"] > 0.9
    assert scores["eval/recall"] < 0.2


def test_the_inception_score_counts_classes():
    logits = 100 * torch.eye(5).repeat(400, 1)
    assert inception_score(logits)[0]["eval/inception_score"] == pytest.approx(5, rel=0.02)
    assert inception_score(None) == ({}, {})
