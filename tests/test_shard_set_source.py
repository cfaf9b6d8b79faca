import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from test_make_shards import content, decoded, make, records
from vaetrain.data.format.shard_set import ShardSet


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faces") / "shards"
    make("faces", out, size=16, num_images=30, val_count=6)
    return out


def by_source(out: Path, *splits: str) -> dict[str, dict[str, Any]]:
    return {record["source"]: record for split in splits for record in records(out, split)}


def pixels(out: Path, *splits: str) -> dict[str, np.ndarray]:
    return {
        record["source"]: np.asarray(picture)
        for split in splits
        for record, picture in zip(records(out, split), decoded(out, split), strict=True)
    }


def test_splits_and_records_travel_along(faces: Path, tmp_path: Path) -> None:
    manifest = make(faces, tmp_path / "small", size=8)
    assert manifest.image_size == 8
    for split in ("train", "val"):
        assert by_source(tmp_path / "small", split) == by_source(faces, split)
        assert manifest.splits[split].class_counts == ShardSet.open(faces).manifest.splits[split].class_counts
    first = records(tmp_path / "small", "train")[0]
    assert first["source"].startswith("faces/0/")
    assert first["face"]["class_name"] == first["class"] == manifest.classes[first["label"]]
    originals = pixels(faces, "train")
    for source, small in pixels(tmp_path / "small", "train").items():
        expected = np.asarray(Image.fromarray(originals[source]).resize((8, 8), Image.Resampling.LANCZOS))
        assert np.abs(small.astype(int) - expected).mean() < 6  # a JPEG's error
    ShardSet.open(tmp_path / "small").verify(full=True)


def test_val_count_deals_all_images_out_anew_without_encoding_again(faces: Path, tmp_path: Path) -> None:
    manifest = make(faces, tmp_path / "out", size=16, val_count=11, images_per_shard=7)
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 19, "val": 11}
    assert by_source(tmp_path / "out", "train", "val") == by_source(faces, "train", "val")
    before, after = pixels(faces, "train", "val"), pixels(tmp_path / "out", "train", "val")
    assert all(np.array_equal(before[source], after[source]) for source in before)
    assert set(by_source(tmp_path / "out", "val")) - set(by_source(faces, "val"))
    make(faces, tmp_path / "again", size=16, val_count=11, images_per_shard=7, workers=2)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_images_are_encoded_again_when_quality_or_format_say_so(faces: Path, tmp_path: Path) -> None:
    def encoded_bytes(out: Path) -> int:
        return int(ShardSet.open(out).index("train").num_bytes.sum())

    make(faces, tmp_path / "worse", size=16, quality=20)
    assert encoded_bytes(tmp_path / "worse") < encoded_bytes(faces)
    assert make(faces, tmp_path / "png", size=16, format="png").encoding.format == "png"
    before, after = pixels(faces, "train"), pixels(tmp_path / "png", "train")
    assert all(np.array_equal(before[source], after[source]) for source in before)
    assert make(tmp_path / "png", tmp_path / "png8", size=8).encoding.format == "png"
    make(faces, tmp_path / "gray", size=16, gray=True)
    assert make(tmp_path / "gray" / "manifest.json", tmp_path / "gray8", size=8).channels == 1


def test_a_set_without_validation_validates_on_another(faces: Path, tmp_path: Path) -> None:
    make("faces", tmp_path / "plain", size=16, num_images=9)
    make("faces", tmp_path / "other", size=16, num_images=6, seed=1)
    manifest = make(tmp_path / "plain", tmp_path / "out", val_src=str(tmp_path / "other"))
    assert manifest.splits["val"].num_images == 6
    assert all(source.startswith("faces/1/") for source in by_source(tmp_path / "out", "val"))
    with pytest.raises(ValueError, match=r"has splits of its own \(train, val\); leave out --val-src"):
        make(faces, tmp_path / "no", val_src=str(tmp_path / "plain"))


def test_incomplete_and_hostile_sets_are_refused(faces: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(faces, copy)
    (copy / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        make(copy, tmp_path / "out")
    shutil.copytree(faces, copy, dirs_exist_ok=True)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"image_size": 8}))
    with pytest.raises(ValueError, match="fingerprint does not match"):
        make(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"[" * 5000, "it has no record: "),
        (b"[1]", "its record is no mapping"),
        (b"\xff{}", "it has no record: "),
        (None, "it has no record: '00000007.txt' of 2 bytes follows it"),
    ],
)
def test_samples_with_a_damaged_record_are_rejected(
    faces: Path, tmp_path: Path, record: bytes | None, reason: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(faces, copy)
    shard = copy / "train-000000.tar"
    with tarfile.open(shard) as tar:
        info = tar.getmembers()[-1]  # so that a long record hits no other sample
    damaged = bytearray(shard.read_bytes())
    header = tarfile.TarInfo(info.name if record else "00000007.txt")
    header.size = len(record or b"{}")
    damaged[info.offset : info.offset + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    damaged[info.offset_data : info.offset_data + header.size] = record or b"{}"
    shard.write_bytes(damaged[: ShardSet.open(faces).manifest.splits["train"].shards[0].num_bytes])
    with pytest.raises(ValueError, match=r"1 image\(s\) cannot be read, first train-000000\.tar:"):
        make(copy, tmp_path / "out")
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert rejected["reason"].startswith(reason)
