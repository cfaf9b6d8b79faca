import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vaetrain.data.format.index import pack_index
from vaetrain.data.format.manifest import Encoding, Manifest, Shard, Split, Tool
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.format.writer import ShardWriter
from vaetrain.files import sha256_of_file

SHA = "0123456789abcdef" * 4


def png(seed: int, size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def write_shard_set(folder: Path, images: list[bytes], images_per_shard: int = 3) -> ShardSet:
    with ShardWriter(folder, "train", images_per_shard) as writer:
        for i, image in enumerate(images):
            writer.write(f"{i:08d}", image, "png", {"label": i % 2, "class": "ab"[i % 2], "source": f"{i}.png"})
    index = pack_index({"train": writer.index()})
    (folder / "index.safetensors").write_bytes(index)
    counts = {"a": (len(images) + 1) // 2, "b": len(images) // 2}
    Manifest(
        format_version=1,
        image_size=8,
        channels=3,
        encoding=Encoding("png", None, None),
        classes=("a", "b"),
        splits={"train": Split(len(images), counts, tuple(writer.shards))},
        index_sha256=sha256_of_file(folder / "index.safetensors"),
        tool=Tool({"vaetrain": "0"}, {}, SHA),
    ).write(folder)
    return ShardSet.open(folder)


@pytest.fixture
def images() -> list[bytes]:
    return [png(seed) for seed in range(7)]


@pytest.fixture
def shard_set(tmp_path: Path, images: list[bytes]) -> ShardSet:
    return write_shard_set(tmp_path, images)


def test_manifest_reads_back_equal(shard_set: ShardSet) -> None:
    manifest = Manifest.read(shard_set.folder / "manifest.json")
    assert manifest == shard_set.manifest
    assert [shard.num_images for shard in manifest.splits["train"].shards] == [3, 3, 1]
    assert ShardSet.open(shard_set.folder / "manifest.json").manifest == manifest


def test_fingerprint_is_of_the_data_and_not_of_the_tool(shard_set: ShardSet) -> None:
    manifest = shard_set.manifest
    other_tool = replace(manifest, tool=Tool({"vaetrain": "9"}, {"src": "elsewhere"}, SHA), fingerprint="")
    assert other_tool.fingerprint == manifest.fingerprint
    for change in ({"image_size": 16}, {"encoding": Encoding("png", None, None, crop="pad")}, {"index_sha256": SHA}):
        assert replace(manifest, **change, fingerprint="").fingerprint != manifest.fingerprint


def test_summary_is_plain_and_without_shards(shard_set: ShardSet) -> None:
    summary = shard_set.manifest.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["splits"] == {"train": {"num_images": 7, "class_counts": {"a": 4, "b": 3}}}
    assert summary["fingerprint"] == shard_set.manifest.fingerprint


def edit(folder: Path, *keys: str | int, value: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("image_size",), "8", "image_size is '8', not int"),
        (("image_size",), True, "image_size is True, not int"),
        (("image_size",), 9, "fingerprint does not match"),
        (("channels",), 4, "channels is 4"),
        (("classes",), ["a", "a"], "none twice"),
        (("classes", 1), 5, r"classes\[1\] is 5, not str"),
        (("splits",), {}, "splits is empty"),
        (("splits", "train"), [], r"splits.train holds \[\], not a mapping"),
        (("splits", "train", "num_images"), 8, "splits.train: num_images is 8, its shards hold 7"),
        (("splits", "train", "class_counts"), {"a": 4, "c": 3}, r"names \['a', 'c'\]"),
        (("splits", "train", "shards", 1, "name"), "../other.tar", "not a plain file name"),
        (("splits", "train", "shards", 1, "sha256"), "x", "not 64 hexadecimal digits"),
        (("encoding", "format"), "gif", "encoding.format is 'gif'"),
        (("encoding", "quality"), "best", "encoding.quality is 'best', not int"),
        (("fingerprint",), "", "fingerprint is empty"),
    ],
)
def test_broken_manifest_is_refused_naming_file_and_field(
    shard_set: ShardSet, keys: tuple[str | int, ...], value: object, message: str
) -> None:
    edit(shard_set.folder, *keys, value=value)
    with pytest.raises(ValueError, match=message) as error:
        ShardSet.open(shard_set.folder)
    assert str(shard_set.folder / "manifest.json") in str(error.value)


def test_truncated_and_incomplete_manifests_are_refused(shard_set: ShardSet) -> None:
    file = shard_set.folder / "manifest.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"manifest.json is no valid manifest: .*line"):
        ShardSet.open(shard_set.folder)
    content = json.loads(text)
    del content["classes"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks classes"):
        ShardSet.open(shard_set.folder)
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a mapping"):
        ShardSet.open(shard_set.folder)


def test_newer_format_asks_for_a_newer_vaetrain(shard_set: ShardSet) -> None:
    edit(shard_set.folder, "format_version", value=3)
    with pytest.raises(ValueError, match="format_version 3, this vaetrain reads 2; update vaetrain"):
        ShardSet.open(shard_set.folder)


def test_opening_nothing_says_how_to_make_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; .*tools/make_shards\.py"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        ShardSet.open(tmp_path)


def test_unknown_split_names_those_there_are(shard_set: ShardSet) -> None:
    with pytest.raises(ValueError, match="no split val; it has train"):
        shard_set.index("val")


def test_index_points_at_exactly_the_image_bytes(shard_set: ShardSet, images: list[bytes]) -> None:
    index = shard_set.index("train")
    assert index.label.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]
    shards = shard_set.manifest.splits["train"].shards
    for i, image in enumerate(images):
        content = shard_set.path(shards[index.shard[i]]).read_bytes()
        assert content[index.offset[i] : index.offset[i] + index.num_bytes[i]] == image
        with tarfile.open(shard_set.path(shards[index.shard[i]])) as tar:
            assert tar.getmember(f"{i:08d}.png").offset_data == index.offset[i]


def test_shards_are_plain_ustar_and_padded_like_tarfiles(shard_set: ShardSet, images: list[bytes]) -> None:
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (
            ("00000006.png", images[6]),
            ("00000006.json", b'{"label":0,"class":"a","source":"6.png"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert (shard_set.folder / "train-000002.tar").read_bytes() == expected.getvalue()


def test_webdataset_reads_the_shards(shard_set: ShardSet, images: list[bytes]) -> None:
    urls = [str(shard_set.path(shard)) for shard in shard_set.manifest.splits["train"].shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(7)]
    for i, sample in enumerate(samples):
        assert np.array_equal(np.asarray(sample["png"]), np.asarray(Image.open(io.BytesIO(images[i]))))
        assert sample["json"] == {"label": i % 2, "class": "ab"[i % 2], "source": f"{i}.png"}


def test_writer_leaves_complete_shards_and_no_half_one(tmp_path: Path, images: list[bytes]) -> None:
    def write_four_and_fail() -> None:
        with ShardWriter(tmp_path, "rank-0003", 3) as writer:
            for i in range(4):
                writer.write(str(i), images[i], "png", {"index": i})
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_four_and_fail()
    assert [file.name for file in tmp_path.iterdir()] == ["rank-0003-000000.tar"]


def test_writer_refuses_keys_that_webdataset_would_cut(tmp_path: Path, images: list[bytes]) -> None:
    with ShardWriter(tmp_path, "train") as writer, pytest.raises(AssertionError, match=r"a\.v1"):
        writer.write("a.v1", images[0], "png", {"label": 0})


def test_verify_accepts_a_sound_shard_set(shard_set: ShardSet) -> None:
    shard_set.verify()
    shard_set.verify(full=True)


def test_verify_lists_every_problem(shard_set: ShardSet) -> None:
    (shard_set.folder / "train-000000.tar").unlink()
    shard = shard_set.folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match="2 problem") as error:
        shard_set.verify()
    assert "train-000000.tar is missing" in str(error.value)
    assert "train-000001.tar has 9,728 bytes, not 10,240" in str(error.value)
    assert "tools/make_shards.py" in str(error.value)


def test_only_full_verification_sees_a_changed_byte(shard_set: ShardSet) -> None:
    shard = shard_set.folder / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    shard_set.verify()
    with pytest.raises(ValueError, match=r"train-000001\.tar has another SHA-256"):
        shard_set.verify(full=True)


def test_full_verification_decodes_every_image(tmp_path: Path, images: list[bytes]) -> None:
    damaged, wrong_size = images[2][:-40], png(1, size=9)
    shard_set = write_shard_set(tmp_path, [images[0], damaged, images[1], wrong_size])
    with pytest.raises(ValueError, match="2 problem") as error:
        shard_set.verify(full=True)
    index = shard_set.index("train")
    assert f"train-000000.tar: the image at byte {index.offset[1]} does not decode" in str(error.value)
    assert f"train-000001.tar: the image at byte {index.offset[3]} is ((9, 9), 'RGB')" in str(error.value)


def test_index_of_other_data_is_refused(shard_set: ShardSet) -> None:
    file = shard_set.folder / "index.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x07")
    with pytest.raises(ValueError, match="not the index that the manifest vouches for"):
        ShardSet.open(shard_set.folder).index("train")
    file.unlink()
    with pytest.raises(ValueError, match=r"index\.safetensors does not exist"):
        ShardSet.open(shard_set.folder).verify()


def test_index_that_contradicts_the_manifest_is_refused(shard_set: ShardSet) -> None:
    shifted = replace(shard_set.index("train"), label=np.zeros(7, dtype=np.int64))
    (shard_set.folder / "index.safetensors").write_bytes(pack_index({"train": shifted}))
    sha256 = sha256_of_file(shard_set.folder / "index.safetensors")
    replace(shard_set.manifest, index_sha256=sha256, fingerprint="").write(shard_set.folder)
    with pytest.raises(ValueError, match="the train split's classes hold other numbers"):
        ShardSet.open(shard_set.folder).index("train")


def test_shard_names_stay_inside_the_folder() -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        Shard("/tmp/x.tar", 1, 1, SHA)


def test_shard_modules_do_not_import_torch() -> None:
    banned = "torch", "torchvision", "webdataset", "accelerate"
    code = f"import sys, vaetrain.data.sharding.make_shards; print([name for name in {banned} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
