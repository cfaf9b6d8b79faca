"""Somebody else's tars, indexed where they lie: every reader gives the pixels that Pillow gives, and nothing is copied."""

import io
import itertools
import json
import shutil
import tarfile
import tempfile
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from test_readers import served
from vaetrain.data.config import DataConfig
from vaetrain.data.format.manifest import Manifest
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.order import BatchLayout, crop_places, seen_before
from vaetrain.data.readers.read_plan import ReadPlan
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.readers.resize import decode_resized
from vaetrain.data.sharding.index_shards import IndexConfig, closing_line, index_shards, places_of

CPU = torch.device("cpu")
SIZES = [(40, 24), (24, 40), (16, 16), (100, 70), (17, 16), (16, 90)]


@pytest.fixture(autouse=True)
def folder_of_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def encoded(number, kind="JPEG"):
    pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tar(path, files, tar_format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(number):
    kind = "PNG" if number % 4 == 3 else "JPEG"
    key = (
        f"very/long/{'k' * 120}/" * (number % 5 == 4) + f"sample.{number:04d}"
    )  # a dot in a key, PAX and GNU long names
    key = key.replace(".", "-") if number % 2 else f"v{number}"
    return [
        (f"{key}.{'png' if kind == 'PNG' else 'jpg'}", encoded(number, kind)),
        (f"{key}.cls", str(number % 3).encode()),
        (f"{key}.json", json.dumps({"caption": "x" * 50}).encode()),
    ]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """36 images to train on in three tars of three dialects, 6 to validate on in another folder's one."""
    folder = tmp_path_factory.mktemp("wds") / "my data"
    for shard, tar_format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        samples = [sample(number) for number in range(12 * shard, 12 * shard + 12)]
        if tar_format == tarfile.USTAR_FORMAT:
            samples = [[(name.replace("k" * 120, "k" * 90), content) for name, content in each] for each in samples]
        write_tar(folder / f"train.{shard}.tar", itertools.chain(*samples), tar_format)
    write_tar(folder / "val" / "0.tar", itertools.chain(*(sample(number) for number in range(36, 42))))
    return folder


@pytest.fixture(scope="module")
def indexed(tars, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexed") / "set"
    index_shards(IndexConfig(str(tars), out, workers=1))
    return out


def opened(shards, kind, split="train", **options):
    config = DataConfig(train=str(shards), reader=kind, resize="shorter-side", image_size=16, **options)
    return closing(open_reader(config, split, device=CPU))


def by_pillow(content, size=16):
    """The shorter side resized, the middle cut out; of JPEGs more than twice as large, decoded at a reduced scale."""
    picture = Image.open(io.BytesIO(content))
    if picture.format == "JPEG":
        picture.draft("RGB", (size, size))
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture).transpose(2, 0, 1)


def test_what_is_indexed(tars, indexed):
    manifest = ShardSet.open(indexed).manifest
    assert manifest.classes == ("0", "1", "2")
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 36, "val": 6}
    assert [shard.name for shard in manifest.splits["train"].shards] == [f"train.{shard}.tar" for shard in range(3)]
    assert not list(indexed.glob("*.tar"))
    line = closing_line(IndexConfig(str(tars), indexed), manifest)
    assert "36 train and 6 val images (0 14, 1 14, 2 14) in 4 tars, 84 other files left out" in line
    again = index_shards(IndexConfig(str(tars), indexed, workers=1))
    assert again == manifest == Manifest.read(indexed / "manifest.json")


@pytest.mark.parametrize("kind", ["indexed", "stream", "resident", "decoded"])
def test_readers_give_what_pillow_makes_of_each_image(indexed, kind):
    with opened(indexed, kind, "train") as reader:
        assert (reader.manifest.image_size, reader.num_images) == (16, 36)
        batches = [
            *reader.eval_batches(7, 0, 1),
            *itertools.islice(reader.train_batches(0, 0, BatchLayout(12, 6, 0, 1)), 12),
        ]
    # Images of a tar come in its order, which is that of the numbers.
    for batch in batches:
        for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
            number = int(index)
            assert int(label) == number % 3
            assert np.array_equal(image, by_pillow(encoded(number, "PNG" if number % 4 == 3 else "JPEG")))


@pytest.mark.parametrize("cached", [False, True])
def test_tars_behind_urls(tars, indexed, tmp_path, cached):
    with served(tars) as url:
        place = f"{url}/train.{{0..2}}.tar"
        manifest = index_shards(IndexConfig(place, tmp_path / "set", val=f"{url}/val/0.tar", workers=1))
        # The same data, wherever they lie, but for what their tars are called.
        here = ShardSet.open(indexed).manifest
        assert [shard.sha256 for shard in manifest.splits["train"].shards] == [
            shard.sha256 for shard in here.splits["train"].shards
        ]
        options = {"cache_dir": tmp_path / "cache", "verify": "full"} if cached else {}
        with opened(tmp_path / "set", "auto", **options) as remote, opened(indexed, "stream") as local:
            assert remote.description.startswith("stream (--data.reader auto, the shards are behind a URL")
            layout = BatchLayout(12, 6, 0, 1)
            for there, here in itertools.islice(
                zip(remote.train_batches(1, 12, layout), local.train_batches(1, 12, layout), strict=True), 9
            ):
                assert torch.equal(there.images, here.images)
                assert torch.equal(there.indices, here.indices)
        with pytest.raises(ValueError, match="indexed needs local shards"):
            opened(tmp_path / "set", "indexed")


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_random_crops_depend_on_the_seed_and_the_images_seen_alone(indexed, kind):
    def run(images_seen, num_batches, seed=3, rank=0, num_processes=1, micro=4):
        with opened(indexed, kind, crop="random") as reader:
            batches = reader.train_batches(seed, images_seen, BatchLayout(8, micro, rank, num_processes))
            return list(itertools.islice(batches, num_batches))

    whole = run(0, 12)
    resumed = run(16, 8)
    for before, after in zip(whole[4:], resumed, strict=True):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.indices, after.indices)
    if kind == "indexed":  # the order of a stream depends on the number of its processes
        ranks = [run(0, 6, rank=rank, num_processes=2) for rank in range(2)]
        for step in range(6):
            assert torch.equal(
                torch.cat([ranks[0][step].images, ranks[1][step].images]),
                torch.cat([b.images for b in whole[2 * step : 2 * step + 2]]),
            )
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in whole:
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            seen.setdefault(index, []).append(image)
    cuts = [images for index, images in seen.items() if index % 6 in (0, 1, 3) and len(images) > 1]
    assert cuts
    assert any(not torch.equal(images[0], images[1]) for images in cuts), "another cut in each epoch"


def test_places_of_crops_are_even_and_differ():
    layout = BatchLayout(8, 2, 1, 2)
    assert [seen_before(number, layout).tolist() for number in range(4)] == [[4, 5], [6, 7], [12, 13], [14, 15]]
    places = crop_places(0, np.arange(100_000))
    assert places.min() >= 0
    assert places.max() < 1
    assert np.abs(np.histogram(places, 10)[0] - 10_000).max() < 500
    assert not np.array_equal(places, crop_places(1, np.arange(100_000)))
    assert crop_places(0, np.arange(3)).tolist() == [
        (value >> 11) / 2**53 for value in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    ]


def test_resizing_turns_pictures_upright_and_refuses_bombs_and_damage():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, exif=exif.tobytes())
    out = np.zeros((16, 16, 3), np.uint8)
    decode_resized(buffer.getvalue(), out)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    left = (turned.width - 20) // 2
    cut = turned.crop((left, 0, left + 20, 20)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(out, np.asarray(cut))
    with pytest.raises(ValueError, match="not a readable image"):
        decode_resized(buffer.getvalue()[:-200], out)
    bomb = bytearray(buffer.getvalue())
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="pixels"):
        decode_resized(bomb, out)


def test_a_set_of_many_sizes_is_not_read_without_resizing(indexed):
    with pytest.raises(ValueError, match=r"pass --data\.resize shorter-side"):
        open_reader(DataConfig(train=str(indexed)), "train", device=CPU)
    with pytest.raises(ValueError, match=r"--data\.crop random cuts each image anew"):
        opened(indexed, "resident", crop="random")


def test_own_shards_of_another_size_are_resized_too(tiny_shards):
    config = DataConfig(train=str(tiny_shards), reader="indexed", resize="shorter-side", image_size=8)
    with closing(open_reader(config, "train", device=CPU)) as reader:
        first = reader.first(1)
        shard_set = ShardSet.open(tiny_shards)
        assert reader.manifest.fingerprint != shard_set.manifest.fingerprint
        assert first.images.shape == (1, 3, 8, 8)
    unchanged = open_reader(replace(config, image_size=16), "train", device=CPU)
    assert unchanged.manifest == shard_set.manifest


def test_verification_finds_what_was_changed(tars, indexed, tmp_path):
    copy = shutil.copytree(tars, tmp_path / "wds")
    index_shards(IndexConfig(str(copy), tmp_path / "set", workers=1))
    shard_set = ShardSet.open(tmp_path / "set")
    assert shard_set.manifest.fingerprint == ShardSet.open(indexed).manifest.fingerprint, "wherever they lie"
    shard_set.verify(full=True)
    tar = copy / "train.0.tar"
    sound = tar.read_bytes()
    offset = int(shard_set.index("train").offset[1])
    tar.write_bytes(sound[:offset] + bytes(200) + sound[offset + 200 :])
    shard_set.verify()
    with pytest.raises(ValueError, match=rf"train\.0\.tar: the image at byte {offset} does not decode"):
        shard_set.verify(full=True)
    with (
        pytest.raises(ValueError, match=r"^train\.0\.tar in .*sample 1 .*not a readable image"),
        opened(tmp_path / "set", "indexed") as reader,
    ):
        list(reader.eval_batches(4, 0, 1))
    write_tar(tar, [(name.replace("v0", "v9"), content) for name, content in itertools.chain(*map(sample, range(12)))])
    tar.write_bytes(tar.read_bytes().ljust(len(sound), b"\0")[: len(sound)])
    with pytest.raises(ValueError, match=r"train\.0\.tar holds other files than when it was indexed"):
        shard_set.verify(full=True)
    tar.unlink()
    with pytest.raises(ValueError, match=r"train\.0\.tar is missing"), opened(tmp_path / "set", "indexed"):
        pass


def test_what_cannot_be_indexed_is_refused_by_name(tmp_path):
    write_tar(tmp_path / "short" / "a.tar", itertools.chain(*map(sample, range(4))))
    content = (tmp_path / "short" / "a.tar").read_bytes()
    (tmp_path / "short" / "a.tar").write_bytes(content[:2000])
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    write_tar(tmp_path / "none" / "c.tar", [("x.npy", b"1")])
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "mixed" / "train-0.tar", sample(0))
    shutil.copy(tmp_path / "b.tar", tmp_path / "mixed" / "train-1.tgz")
    for src, message in [
        ("mixed", r"train-1\.tgz cannot be indexed: it is gzip, and only plain tars are read in place"),
        ("short", r"short/a\.tar cannot be indexed: unexpected end of data"),
        ("b.tar", r"b\.tar cannot be indexed: it is gzip, and only plain tars are read in place"),
        ("none", "has no images"), ("empty", r"holds no \.tar"), ("nothing", "does not exist"),
        ("x{0..9999999}.tar", "more than 1,000,000 tars"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            index_shards(IndexConfig(str(tmp_path / src), tmp_path / "out", workers=1))
    for src in ("file:///etc/x.tar", "pipe:cat x.tar", "http://h/"):
        with pytest.raises((ValueError, FileNotFoundError)):
            places_of(src)
    assert places_of("s3://b/{train,val}-{08..10}.tar")[:4] == [
        "s3://b/train-08.tar", "s3://b/train-09.tar", "s3://b/train-10.tar", "s3://b/val-08.tar",
    ]  # fmt: skip


def test_a_manifest_that_leads_elsewhere_is_of_version_2_and_local(indexed, tmp_path):
    text = (indexed / "manifest.json").read_text()
    for place in ("../x.tar", "file:///x.tar", "pipe:cat", "a\\nb"):
        content = json.loads(text)
        content["splits"]["val"]["shards"][0]["url"] = place
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="neither an absolute path nor the URL"):
            Manifest.read(tmp_path / "manifest.json")
    content = json.loads(text) | {"format_version": 1, "image_size": 16}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format_version 2"):
        Manifest.read(tmp_path / "manifest.json")
    with served(indexed) as url, pytest.raises((ValueError, FileNotFoundError), match="points at shards elsewhere"):
        opened(url, "stream")


def test_the_plan_of_reading_them(indexed):
    config = DataConfig(train=str(indexed), num_workers=2, resize="shorter-side", image_size=16)
    plan = ReadPlan.of(config, num_processes=2, global_batch_size=8, micro_batch_size=None)
    assert (plan.steps_per_epoch, plan.train.reader, plan.val.num_images) == (4, "resident", 6)
