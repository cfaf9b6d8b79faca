"""Images encoded into files, verified, and read in the order of images."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from safetensors import safe_open

import vaetrain
from launching import run_here
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.indexed import IndexedReader
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.selection import Selection
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.data.sharding.plan import ShardingConfig
from vaetrain.distributed.randomness import noise_of_training
from vaetrain.encode import EncodeConfig, encode
from vaetrain.export import load_run, weights_sha256
from vaetrain.latents import encoding
from vaetrain.latents.latent_set import LatentSet
from vaetrain.latents.reader import LatentReader
from vaetrain.model.posterior import PointMass

SIZES = {"batch_size": 10, "images_per_file": 30}
LAYOUTS = ("webdataset", "safetensors")


def image_reader(shards, split="train"):
    return IndexedReader(
        Selection.of(ShardSet.open(shards), split), num_workers=0, device=torch.device("cpu"), reason="a test", timeout_s=60.0
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoded(tiny_run, accelerator, tmp_path_factory):
    """The latents of the tiny run in both layouts, with twins, in fp32. Do not write; copy."""
    folders = {layout: tmp_path_factory.mktemp("latents") / layout for layout in LAYOUTS}
    for layout, folder in folders.items():
        encode(EncodeConfig(tiny_run, folder, flip=True, layout=layout, **SIZES), accelerator)
    return folders


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "provenance.json"
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("resident_gib", [4.0, 0.0])
@torch.no_grad()
def test_latents_are_the_posteriors_of_the_images(encoded, tiny_run, tiny_shards, layout, resident_gib):
    vae = vaetrain.load(tiny_run)
    for split, count in (("train", 100), ("val", 23)):
        latents = LatentReader.open(encoded[layout], split, resident_gib=resident_gib)
        assert latents.in_memory == (resident_gib > 0)
        assert latents.num_images == count
        images = list(image_reader(tiny_shards, split).eval_batches(10, 0, 1))
        for batch, source in zip(latents.eval_batches(10), images, strict=True):
            posterior = vae.encode(vae.from_uint8(source.images))
            torch.testing.assert_close(batch.posterior.mean, posterior.mean, atol=1e-6, rtol=0)
            torch.testing.assert_close(batch.posterior.logvar, posterior.logvar, atol=1e-6, rtol=0)
            assert batch.labels.equal(source.labels)
            assert batch.indices.equal(source.indices)
        twin = vae.encode(vae.from_uint8(images[0].images.flip(-1)))
        stored = LatentSet.open(encoded[layout]).split(split)
        rows = np.empty((10, stored.record.num_bytes), np.uint8)
        stored.read(np.arange(10), rows)
        parts = stored.record.unpack(torch.from_numpy(rows))
        torch.testing.assert_close(parts["mean_flip"], twin.mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(parts["logvar_flip"], twin.logvar, atol=1e-6, rtol=0)
        assert not torch.allclose(parts["mean_flip"], parts["mean"], atol=1e-3)


def test_webdataset_reads_the_tars_without_us(encoded):
    latents = LatentReader.open(encoded["webdataset"])
    first = latents.first(30)
    tar = str(encoded["webdataset"] / "train-000000.tar")
    samples = list(webdataset.WebDataset(tar, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:08d}" for number in range(30)]
    for number, sample in enumerate(samples):
        tensors = safetensors.torch.load(sample["safetensors"])
        assert tensors.keys() == {"mean", "logvar", "mean_flip", "logvar_flip"}
        assert tensors["mean"].equal(first.posterior.mean[number])
        assert tensors["logvar"].equal(first.posterior.logvar[number])
        label = int(first.labels[number])
        assert json.loads(sample["json"]) == {"label": label, "class": ("cat", "dog")[label], "index": number}


def test_trainers_of_lightningdit_read_the_tensors(encoded):
    """As their dataset does: the files of a folder by name, a slice of each tensor, statistics of `latents`."""
    folder, latents = encoded["safetensors"] / "train", LatentReader.open(encoded["safetensors"])
    files = sorted(folder.glob("*.safetensors"))
    places = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            places += [(file, row) for row in range(opened.get_slice("labels").get_shape()[0])]
    stats = torch.load(folder / "latents_stats.pt", weights_only=True)
    whole = next(latents.eval_batches(100))
    assert stats["mean"].shape == stats["std"].shape == (1, 4, 1, 1)
    means = whole.posterior.mean.double()
    torch.testing.assert_close(stats["mean"], means.mean(dim=(0, 2, 3), keepdim=True).float())
    torch.testing.assert_close(stats["std"], means.std(dim=(0, 2, 3), correction=0, keepdim=True).float())
    assert len(places) == 100
    for position in (0, 29, 30, 99):
        file, row = places[position]
        with safe_open(file, framework="pt") as opened:
            for name in ("latents", "latents_flip"):
                feature = (opened.get_slice(name)[row : row + 1] - stats["mean"]) / stats["std"]
                assert feature.shape == (1, 4, 8, 8)
            assert opened.get_slice("latents")[row : row + 1].equal(whole.posterior.mean[position : position + 1])
            assert opened.get_slice("labels")[row : row + 1].item() == whole.labels[position]
            assert opened.get_slice("index")[row : row + 1].item() == position


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_all_training_latents(encoded, layout):
    latents = LatentReader.open(encoded[layout], "val")
    posterior = next(LatentReader.open(encoded[layout]).eval_batches(100)).posterior
    mean = posterior.mean.double().mean(dim=(0, 2, 3))
    variance = posterior.mean.double().var(dim=(0, 2, 3), correction=0) + posterior.logvar.double().exp().mean(
        dim=(0, 2, 3)
    )
    statistics = latents.manifest.statistics
    assert statistics.num_images == 100
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(statistics.std, variance.sqrt(), rtol=1e-12)
    z = next(latents.eval_batches(23)).z
    torch.testing.assert_close(latents.denormalize(latents.normalize(z)), z)
    many = torch.cat([next(LatentReader.open(encoded[layout]).eval_batches(100, seed=seed)).z for seed in range(20)])
    normal = latents.normalize(many)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (normal.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02


@pytest.mark.parametrize("resident_gib", [4.0, 0.0])
def test_the_order_is_that_of_images_on_any_number_of_processes(encoded, tiny_shards, resident_gib):
    latents = LatentReader.open(encoded["webdataset"], resident_gib=resident_gib)
    whole = BatchLayout.of(20, None, 0, 1)
    images = image_reader(tiny_shards).train_batches(3, 0, whole)
    batches = list(itertools.islice(latents.train_batches(3, 0, whole), 12))
    for batch, source in zip(batches, images, strict=False):
        assert batch.indices.equal(source.indices)
        assert batch.labels.equal(source.labels)
    shares = [latents.train_batches(3, 40, BatchLayout.of(20, 5, rank, 2)) for rank in (0, 1)]
    for batch in batches[2:]:
        parts = [next(share) for share in shares for _ in range(2)]
        assert torch.cat([part.indices for part in parts]).equal(batch.indices)
        assert torch.cat([part.z for part in parts]).equal(batch.z), "a resume on two processes draws the same z"
    with pytest.raises(ValueError, match=r"cannot start after 30 images"):
        latents.train_batches(3, 30, whole)


def test_z_and_twin_are_drawn_anew_at_every_position(encoded):
    latents = LatentReader.open(encoded["webdataset"])
    layout = BatchLayout.of(100, None, 0, 1)
    as_it_is = next(latents.eval_batches(100)).posterior.mean
    drawn, mirrored = [], []
    for batch in itertools.islice(latents.train_batches(5, 0, layout), 20):
        order = batch.indices.argsort()
        noise = (batch.z - batch.posterior.mean) / (0.5 * batch.posterior.logvar).exp()
        drawn.append(noise[order])
        mirrored.append((batch.posterior.mean != as_it_is[batch.indices]).flatten(1).any(1)[order])
    noise, coins = torch.stack(drawn), torch.stack(mirrored).double()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert not noise[0].allclose(noise[1], atol=0.1)
    assert abs(coins.mean() - 0.5) < 0.05, "of 2,000 throws"
    assert 0 < coins[:, 0].sum() < 20, "the same image, epoch by epoch"
    again = next(latents.train_batches(5, 300, layout))
    assert ((again.z - again.posterior.mean) / (0.5 * again.posterior.logvar).exp())[again.indices.argsort()].equal(
        noise[3]
    )
    assert not next(latents.train_batches(6, 300, layout)).z.equal(again.z)
    own, _ = noise_of_training(5, slice(0, 100), latents.latent_shape, torch.device("cpu"))
    first = next(latents.train_batches(5, 0, layout))
    met = (first.z - first.posterior.mean) / (0.5 * first.posterior.logvar).exp()
    assert abs((own * met).mean()) < 0.03, "a second stage's own noise of the same seed is another"


def test_evaluation_covers_each_latent_once(encoded):
    latents = LatentReader.open(encoded["safetensors"], "val")
    shares = [list(latents.eval_batches(4, rank, 2, seed=1)) for rank in (0, 1)]
    indices = torch.cat([batch.indices for share in shares for batch in share])
    assert sorted(indices.tolist()) == list(range(23))
    z = torch.cat([batch.z for share in shares for batch in share])[indices.argsort()]
    assert z.equal(next(latents.eval_batches(23, seed=1)).z)
    assert not z.equal(next(latents.eval_batches(23, seed=2)).z)


def test_a_reader_knows_its_encoder(encoded, tiny_run):
    trained = load_run(tiny_run)
    LatentReader.open(encoded["webdataset"]).check_encoder(weights_sha256(tiny_run, trained))
    with pytest.raises(
        ValueError, match=r"encoded by weights with SHA-256 .*encode its images with vaetrain/encode.py"
    ):
        LatentReader.open(encoded["webdataset"]).check_encoder(weights_sha256(tiny_run, trained, "raw"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_command_goes_on_where_it_stopped(encoded, tiny_run, accelerator, tmp_path, layout):
    config = EncodeConfig(tiny_run, tmp_path / "killed", flip=True, layout=layout, **SIZES)
    made = []
    parts_of = encoding.posterior_parts

    def die_later(*arguments, **options):
        if len(made) == 8:
            raise Killed
        made.append(1)
        return parts_of(*arguments, **options)

    with patch.object(encoding, "posterior_parts", die_later), pytest.raises(Killed):
        encode(config, accelerator)
    assert not (config.out / "manifest.json").exists()
    before = {
        path: path.stat().st_ino for path in config.out.rglob("*0000*.*") if path.suffix in (".tar", ".safetensors")
    }
    assert len(before) == 2, "two files of three batches each were whole"
    with pytest.raises(FileExistsError, match=r"beginning of another latent set .record was .*fp32.*, now .*bf16"):
        encode(replace(config, dtype="bf16"), accelerator)
    made[:] = []
    with patch.object(encoding, "posterior_parts", lambda *a, **o: (made.append(1), parts_of(*a, **o))[1]):
        encode(config, accelerator)
    assert len(made) == 13 - 6, "13 batches in all"
    assert {path: path.stat().st_ino for path in before} == before, "whole files are kept"
    assert contents(config.out) == contents(encoded[layout])
    made[:] = []
    encode(config, accelerator)
    assert not made, "a set that is whole is left alone"
    with pytest.raises(FileExistsError, match=r"already holds a latent set .*weights"):
        encode(replace(config, weights="raw"), accelerator)


def test_what_belongs_to_somebody_else_is_left_alone(tiny_run, accelerator, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no latent set"):
        encode(EncodeConfig(tiny_run, tmp_path), accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_shards_finds_what_is_damaged(encoded, tmp_path, capsys, layout):
    def verdict(folder):
        code = run_here("tools/verify_shards.py", folder, "--full")
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = verdict(encoded[layout])
    assert code == 0, said
    assert "OK: every file, every latent and their statistics" in said
    assert "train: 100 latents (cat 69, dog 31), 4 files" in said
    name = LatentSet.open(encoded[layout]).manifest.splits["train"].shards[1].name

    damaged = shutil.copytree(encoded[layout], tmp_path / "damaged")
    content = bytearray((damaged / name).read_bytes())
    content[-3000] ^= 1
    (damaged / name).write_bytes(content)
    code, said = verdict(damaged)
    assert code == 1
    assert f"{name} has another SHA-256" in said

    (damaged / name).write_bytes(content[:-512])
    (damaged / LatentSet.open(damaged).manifest.splits["val"].shards[0].name).unlink()
    code, said = verdict(damaged)
    assert code == 1
    assert "2 problem(s)" in said
    assert "is missing" in said
    with pytest.raises(ValueError, match=r"2 problem\(s\)"):
        LatentReader.open(damaged)

    manifest = LatentSet.open(encoded[layout]).manifest
    wrong = replace(manifest.statistics, std=tuple(1.001 * std for std in manifest.statistics.std))
    lying = shutil.copytree(encoded[layout], tmp_path / "lying")
    replace(manifest, statistics=wrong, fingerprint="").write(lying)
    code, said = verdict(lying)
    assert code == 1
    assert "have statistics" in said
    (lying / "manifest.json").write_text((encoded[layout] / "manifest.json").read_text().replace('"val"', '"test"'))
    code, said = verdict(lying)
    assert code == 1
    assert "fingerprint does not match" in said


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2**-8), ("fp16", 2**-11)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_that_of_the_numbers_stored(
    encoded, tiny_run, accelerator, tmp_path, layout, dtype, tolerance
):
    encode(EncodeConfig(tiny_run, tmp_path / "half", flip=True, dtype=dtype, layout=layout, **SIZES), accelerator)
    LatentSet.open(tmp_path / "half").verify(full=True)
    stored, exact = (
        next(LatentReader.open(folder).eval_batches(100)) for folder in (tmp_path / "half", encoded[layout])
    )
    assert stored.z.dtype == torch.float32
    assert not stored.posterior.mean.equal(exact.posterior.mean)
    torch.testing.assert_close(stored.posterior.mean, exact.posterior.mean, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(stored.posterior.logvar, exact.posterior.logvar, rtol=tolerance, atol=1e-6)
    mean = LatentSet.open(tmp_path / "half").manifest.statistics.mean
    np.testing.assert_allclose(mean, stored.posterior.mean.double().mean(dim=(0, 2, 3)), rtol=1e-12)


def test_latents_that_do_not_fit_their_precision_are_refused(tiny_run, accelerator, tmp_path):
    parts_of = encoding.posterior_parts

    def far_out(*arguments, **options):
        parts = parts_of(*arguments, **options)
        parts["mean"][3] = 1e6
        return parts

    with (
        patch.object(encoding, "posterior_parts", far_out),
        pytest.raises(ValueError, match=r"image 3 of the train.*in fp16"),
    ):
        encode(EncodeConfig(tiny_run, tmp_path / "out", dtype="fp16"), accelerator)


def test_a_deterministic_encoder_has_no_variance_and_a_vector_no_tensors(train_tiny, accelerator, tmp_path):
    run = train_tiny("--model.variational", False, "--model.latent", "vector", "--data.classes", "cat", epochs=1)
    encode(EncodeConfig(run, tmp_path / "out"), accelerator)
    latents = LatentReader.open(tmp_path / "out")
    batch = next(latents.train_batches(0, 0, BatchLayout.of(20, None, 0, 1)))
    assert isinstance(batch.posterior, PointMass)
    assert batch.z.equal(batch.posterior.mean)
    assert batch.z.shape == (20, 4)
    assert latents.std.shape == (4,)
    assert (latents.num_images, latents.manifest.kept_classes, batch.labels.any()) == (69, ("cat",), False)
    with pytest.raises(ValueError, match=r"latents \(c, h, w\), and this model's are \(4,\)"):
        encode(EncodeConfig(run, tmp_path / "tensors", layout="safetensors", flip=True), accelerator)
    still = replace(latents.manifest.statistics, std=(1.0, 0.0, 1.0, 1.0))
    replace(latents.manifest, statistics=still, fingerprint="").write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"channel\(s\) \[1\] have the same value everywhere"):
        LatentReader.open(tmp_path / "out").normalize(batch.z)


def test_images_of_another_size_are_encoded(tiny_run, accelerator, tmp_path, tiny_shards):
    originals = Path(tiny_shards).parent / "originals"
    make_shards(ShardingConfig(str(originals), tmp_path / "shards", size=24, val_count=20, workers=1))
    encode(EncodeConfig(tiny_run, tmp_path / "out", data=str(tmp_path / "shards")), accelerator)
    latents = LatentReader.open(tmp_path / "out")
    assert latents.latent_shape == (4, 12, 12)
    assert latents.manifest.image_size == 24
    make_shards(ShardingConfig(str(originals), tmp_path / "odd", size=15, val_count=20, workers=1))
    with pytest.raises(ValueError, match=r"15×15 pixels: height and width must be multiples of 2"):
        encode(EncodeConfig(tiny_run, tmp_path / "none", data=str(tmp_path / "odd")), accelerator)


def test_what_cannot_be_written_is_refused(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"no multiple of --batch-size 50; the nearest that work are 100 and 150"):
        EncodeConfig(tiny_run, tmp_path / "out", images_per_file=120)
    with pytest.raises(ValueError, match=r"pass --flip True"):
        EncodeConfig(tiny_run, tmp_path / "out", layout="safetensors")
    with pytest.raises(FileNotFoundError, match=r"vaetrain/encode.py --run RUN"):
        LatentReader.open(tmp_path / "out")
