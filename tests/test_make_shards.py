import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from test_sources import pack_tar, pack_zip, write_idx
from vaetrain.command_line import parse, plain
from vaetrain.data.format.manifest import Manifest
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.sharding import make_shards as sharding
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import closing_line, make_shards
from vaetrain.data.sharding.plan import ShardingPlan
from vaetrain.data.sharding.task import IMAGES_PER_PIECE, SampleChunk, ShardTask

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="real images are not in ../shared/data")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """20 cats and 10 dogs, 24×20 pixels of noise."""
    rng = np.random.default_rng(0)
    for i in range(30):
        file = tmp_path / "pets" / ("dog" if i % 3 == 2 else "cat") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pets"


def make(src: Path | str, out: Path, **options: Any) -> Manifest:
    return make_shards(ShardingConfig(str(src), out, **{"size": 16, "workers": 1, "images_per_shard": 8} | options))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def records(out: Path, split: str) -> list[dict[str, Any]]:
    found = []
    for shard in ShardSet.open(out).manifest.splits[split].shards:
        with tarfile.open(out / shard.name) as tar:
            found += [json.load(tar.extractfile(info)) for info in tar if info.name.endswith(".json")]
    return found


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> int:
    """Run a tool in this process, which has paid for the imports; its exit code."""
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_manifest_and_samples_of_a_folder(pets: Path, tmp_path: Path) -> None:
    manifest = make(pets, tmp_path / "out", val_count=9)
    assert manifest.classes == ("cat", "dog")
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 21, "val": 9}
    assert [shard.num_images for shard in manifest.splits["train"].shards] == [8, 8, 5]
    assert (manifest.image_size, manifest.channels, manifest.encoding.format) == (16, 3, "jpg")
    ShardSet.open(tmp_path / "out").verify(full=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "manifest.json", "index.safetensors", "val-000000.tar", "val-000001.tar",
        "train-000000.tar", "train-000001.tar", "train-000002.tar",
    }  # fmt: skip
    train, val = records(tmp_path / "out", "train"), records(tmp_path / "out", "val")
    for record in train + val:
        assert record["source"].split("/")[0] == record["class"] == manifest.classes[record["label"]]
    assert len({record["source"] for record in train + val}) == 30
    assert [record["label"] for record in train] == ShardSet.open(tmp_path / "out").index("train").label.tolist()
    assert closing_line(tmp_path / "out", manifest) == (
        f"21 train and 9 val images (cat 20, dog 10), 0 rejected, 0 groups of duplicates, written to {tmp_path / 'out'}"
    )


def test_keys_count_on_over_pieces_and_shards(tmp_path: Path) -> None:
    make("faces", tmp_path / "out", num_images=2 * IMAGES_PER_PIECE + 6, images_per_shard=IMAGES_PER_PIECE + 3)
    names = []
    for shard in ("train-000000.tar", "train-000001.tar"):
        with tarfile.open(tmp_path / "out" / shard) as tar:
            names.append([name for name in tar.getnames() if name.endswith(".jpg")])
    assert [len(each) for each in names] == [IMAGES_PER_PIECE + 3] * 2
    assert names[0] + names[1] == [f"{number:08d}.jpg" for number in range(2 * IMAGES_PER_PIECE + 6)]
    ShardSet.open(tmp_path / "out").verify(full=True)


def test_validation_is_the_last_part_of_one_seeded_shuffle(pets: Path, tmp_path: Path) -> None:
    names = {}
    for name, options in {"all": {}, "few": {"val_count": 5}, "many": {"val_count": 9}, "other": {"seed": 1}}.items():
        make(pets, tmp_path / name, **options)
        splits = ShardSet.open(tmp_path / name).manifest.splits
        names[name] = [[record["source"] for record in records(tmp_path / name, split)] for split in splits]
    (shuffled,) = names["all"]
    assert names["few"] == [shuffled[:-5], shuffled[-5:]]
    assert names["many"] == [shuffled[:-9], shuffled[-9:]]
    assert names["other"][0] != shuffled != sorted(shuffled)


@pytest.mark.parametrize(
    ("share", "num_images", "num_val"),
    [
        ("10%", 30, 3), ("10%", 54, 5), ("12.5%", 20, 3), ("12.4%", 20, 2), ("0.001%", 30, 1), ("99.9%", 30, 29),
        ("50%", 2, 1), ("1%", 2, 1), ("99%", 2, 1), (".5%", 4653, 23), ("10 %", 30, 3), ("29%", 50, 15),
    ],
)  # fmt: skip
def test_a_share_is_rounded_and_leaves_an_image_on_either_side(share: str, num_images: int, num_val: int) -> None:
    config = ShardingConfig("faces", Path("out"), size=8, num_images=num_images, val_count=share)
    numbers = {name: len(items) for name, (_, items) in ShardingPlan.of(config).splits.items()}
    assert numbers == {"train": num_images - num_val, "val": num_val}


@pytest.mark.parametrize("asked", [1, "10%"])
def test_one_image_is_too_few_to_share(pets: Path, tmp_path: Path, asked: int | str) -> None:
    for file in sorted(pets.glob("*/*"))[1:]:
        file.unlink()
    with pytest.raises(ValueError, match=rf"--val-count {asked} needs an image to train on and one to validate on, and .*"
                       r" has 1; give it more, or leave out --val-count"):  # fmt: skip
        make(pets, tmp_path / "out", val_count=asked)


def test_a_share_gives_the_data_of_its_number_and_is_on_record(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, share = (make(pets, tmp_path / name, val_count=asked) for name, asked in (("count", 3), ("share", "10%")))
    assert share.tool.arguments == count.tool.arguments | {"val_count": "10%"}
    assert (share.fingerprint, share.tool.plan) == (count.fingerprint, count.tool.plan)
    made, expected = content(tmp_path / "share"), content(tmp_path / "count")
    assert {name for name in expected if made[name] != expected[name]} == {"manifest.json"}
    again = make(pets, tmp_path / "again", val_count=share.tool.arguments["val_count"])
    assert again == share
    capsys.readouterr()
    make(pets, tmp_path / "count", val_count="10%")
    assert capsys.readouterr().err == f"{tmp_path / 'count'} is already complete\n"


def test_numbers_make_the_plans_that_they_always_made() -> None:
    """Or a rerun would refuse shard sets made before."""
    plan = ShardingPlan.of(ShardingConfig("faces", Path("out"), size=16, num_images=12, val_count=3))
    assert plan.digest == "df0eb8bba4d7f45840dcabfacae66d7bbcf3064941f8e215a3a27a13cfdd98ac"


def test_shares_and_numbers_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    def parsed(*arguments: str) -> int | str | None:
        return parse(ShardingConfig, None, ["a", "b", "--size", "8", *arguments], flags=True).val_count

    assert parsed() is None
    assert parsed("--val-count", "None") is None
    for value, written in ((500, "500"), ("10%", "10%"), ("2.5%", "2.5%")):
        assert parsed("--val-count", written) == value
        (tmp_path / "a.yaml").write_text(f"val_count: {written}\n")
        assert parsed("--config", str(tmp_path / "a.yaml")) == value
        config = ShardingConfig("a", Path("b"), size=8, val_count=value)
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"val_count": plain(config)["val_count"]}))
        assert parsed("--config", str(tmp_path / "a.yaml")) == value
    assert parsed("--config", str(tmp_path / "a.yaml"), "--val-count", "7") == 7


@pytest.mark.parametrize("written", ["0%", "100%", "-5%", "ten"])
def test_a_share_that_is_none_is_refused_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], written: str
) -> None:
    assert run(monkeypatch, "make_shards", "faces", tmp_path / "out", "--size", 8, "--val-count", written) == 2
    assert f"--val-count is {written}; " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_zip_and_tars_give_the_same_data_as_the_folder(pets: Path, tmp_path: Path) -> None:
    expected = make(pets, tmp_path / "folder", val_count=9)
    for src in (
        pack_zip(pets, tmp_path / "a.zip"),
        pack_tar(pets, tmp_path / "a.tar"),
        pack_tar(pets, tmp_path / "b.tar.gz", "w:gz"),
    ):
        out = tmp_path / src.stem
        shutil.rmtree(out, ignore_errors=True)
        assert make(src, out, val_count=9).fingerprint == expected.fingerprint
        assert not (out / ".partial").exists()


def test_number_of_workers_does_not_change_a_byte(pets: Path, tmp_path: Path) -> None:
    make(pets, tmp_path / "one", val_count=9)
    make(pets, tmp_path / "two", val_count=9, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_unfinished_shards_are_completed_to_the_same_bytes(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(pets, tmp_path / "whole", val_count=9)
    write_shard, written = sharding.write_shard, []

    def fail_on_the_third(task: ShardTask, pieces: Iterable[SampleChunk]) -> Any:
        written.append(task.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_shard(task, pieces)

    monkeypatch.setattr(sharding, "write_shard", fail_on_the_third)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(pets, out, val_count=9)
    assert written == ["train-000000", "train-000001", "train-000002"]
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        ShardSet.open(out)
    (out / "train-000000.tar").write_bytes(b"half of it")
    make(pets, out, val_count=9)
    assert written[3:] == ["train-000000", "train-000002", "val-000000", "val-000001"]
    assert content(out) == content(tmp_path / "whole")


def test_unfinished_shards_of_other_arguments_are_made_anew(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(pets, tmp_path / "whole", size=12)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "_describe", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            make(pets, tmp_path / "out", images_per_shard=2)
    make(pets, tmp_path / "out", size=12)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_killed_command_leaves_nothing_vouched_for_and_goes_on(tmp_path: Path) -> None:
    arguments = ("faces", tmp_path / "out", "--size", 48, "--num-images", 90, "--images-per-shard", 3)
    command = [sys.executable, "tools/make_shards.py", *map(str, arguments)]
    process = subprocess.Popen([*command, "--workers", "2"], cwd=ROOT)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob(".partial/train-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(list((tmp_path / "out").glob("train-*.tar"))) < 30
    assert not (tmp_path / "out" / "manifest.json").exists()
    result = subprocess.run([*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout == (
        f"90 train images (cat 30, dog 30, wild 30), 0 rejected, 0 groups of duplicates, written to {tmp_path / 'out'}\n"
    ), result.stderr
    make("faces", tmp_path / "whole", size=48, num_images=90, images_per_shard=3)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_rerun_of_a_finished_one_says_so_and_other_arguments_are_refused(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    manifest = make(pets, out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    (out / ".partial").mkdir()  # as a kill after the manifest would leave it
    assert make(pets, out, workers=2) == manifest
    assert capsys.readouterr().err == f"{out} is already complete\n"
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"other arguments .* name a new folder, or delete it"):
        make(pets, out, size=17)
    (out / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing"):
        make(pets, out)
    next(pets.glob("cat/*")).unlink()
    with pytest.raises(FileExistsError, match="from other originals"):
        make(pets, out)


def test_a_folder_with_something_else_in_it_is_left_alone(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "train-000000.tar").write_text("precious")
    for out in (tmp_path / "home", tmp_path / "home" / "train-000000.tar"):
        with pytest.raises(FileExistsError, match="is not empty and holds no shard set"):
            make(pets, out)
    assert (tmp_path / "home" / "train-000000.tar").read_text() == "precious"


def test_images_that_cannot_be_read_are_listed_and_refused(pets: Path, tmp_path: Path) -> None:
    (pets / "cat" / "00.png").write_bytes((pets / "cat" / "00.png").read_bytes()[:200])
    (pets / "dog" / "02.png").write_text("no picture")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"2 image\(s\) cannot be read.*rejected\.jsonl.*--max-rejected 2"):
        make(pets, out)
    assert not (out / "manifest.json").exists()
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {each["source"]: each["reason"] for each in rejected} == {
        "cat/00.png": "image file is truncated",
        "dog/02.png": "it is none of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM",
    }
    manifest = make(pets, out, max_rejected=2)
    assert manifest.splits["train"].class_counts == {"cat": 19, "dog": 9}
    ShardSet.open(out).verify(full=True)
    assert closing_line(out, manifest).startswith("28 train images (cat 19, dog 9), 2 rejected, ")


def test_a_mended_image_is_read_again(pets: Path, tmp_path: Path) -> None:
    whole = make(pets, tmp_path / "whole")
    file = pets / "cat" / "00.png"
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="1 image"):
        make(pets, tmp_path / "out")
    file.write_bytes(content)
    assert make(pets, tmp_path / "out").fingerprint == whole.fingerprint
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_a_split_without_a_readable_image_is_refused(pets: Path, tmp_path: Path) -> None:
    for file in pets.glob("*/*"):
        file.write_text("no picture")
    with pytest.raises(ValueError, match="no image of the train split can be read"):
        make(pets, tmp_path / "out", max_rejected=30)


def test_splits_of_the_source_are_used(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "afhq").mkdir()
    shutil.copytree(pets, tmp_path / "afhq" / "train")
    shutil.copytree(pets / "dog", tmp_path / "afhq" / "test" / "dog")
    manifest = make(tmp_path / "afhq", tmp_path / "out")
    assert manifest.splits["train"].class_counts == {"cat": 20, "dog": 10}
    assert manifest.splits["val"].class_counts == {"cat": 0, "dog": 10}
    for option in ({"val_count": 3}, {"val_count": "10%"}, {"val_src": str(pets)}):
        with pytest.raises(ValueError, match=r"has splits of its own \(train, val\); leave out --val-"):
            make(tmp_path / "afhq", tmp_path / "other", **option)


def test_validation_from_another_source(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets / "dog", tmp_path / "more" / "dog")
    manifest = make(pets, tmp_path / "out", val_src=str(tmp_path / "more"))
    assert manifest.splits["val"].class_counts == {"cat": 0, "dog": 10}
    assert {record["label"] for record in records(tmp_path / "out", "val")} == {1}
    shutil.copytree(pets / "dog", tmp_path / "more" / "wolf")
    with pytest.raises(ValueError, match="classes that SRC lacks: wolf"):
        make(pets, tmp_path / "other", val_src=str(tmp_path / "more"))
    flat = make(pets / "cat", tmp_path / "flat", val_src=str(pets / "dog"))
    assert flat.classes == ("cat",)
    assert flat.splits["val"].class_counts == {"cat": 10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_count": 30}, "--val-count 30 leaves no training image of the 30 there are; try --val-count 10%"),
        ({"val_count": 500}, "--val-count 500 leaves no training image of the 30 there are; try --val-count 10%"),
        ({"val_count": 0}, "--val-count is 0; it must be at least 1"),
        ({"val_count": "0%"}, "--val-count is 0%; a share must be above 0% and below 100%, such as 10%"),
        ({"val_count": "100%"}, "--val-count is 100%; a share must be above 0% and below 100%, such as 10%"),
        ({"val_count": "-5%"}, "--val-count is -5%; a share must be above 0% and below 100%, such as 10%"),
        (
            {"val_count": "ten"},
            "--val-count is ten; it must be a number of images, such as 500, or a share, such as 10%",
        ),
        ({"val_count": "nan%"}, "--val-count is nan%; it must be a number of images"),
        ({"val_count": "10%", "val_src": "x"}, "give one of them"),
        ({"val_count": 3, "val_src": "x"}, "give one of them"),
        ({"num_images": 3}, "--num-images says how many faces"),
        ({"size": 0}, "--size is 0"),
        ({"quality": 101}, "--quality is 101"),
        ({"images_per_shard": 0}, "--images-per-shard is 0"),
        ({"max_rejected": -1}, "--max-rejected is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"gray": True, "format": "webp"}, "WebP has no grayscale"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    pets: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(pets, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def decoded(out: Path, split: str = "train") -> list[Image.Image]:
    shard_set = ShardSet.open(out)
    index = shard_set.index(split)
    shards = shard_set.manifest.splits[split].shards
    pictures = []
    for shard, offset, num_bytes in zip(index.shard, index.offset, index.num_bytes, strict=True):
        content = shard_set.path(shards[shard]).read_bytes()[offset : offset + num_bytes]
        pictures.append(Image.open(io.BytesIO(content)))
    return pictures


def test_pixels_are_those_of_the_originals(pets: Path, tmp_path: Path) -> None:
    make(pets, tmp_path / "out", size=20, format="png")
    sources = [record["source"] for record in records(tmp_path / "out", "train")]
    for source, picture in zip(sources, decoded(tmp_path / "out"), strict=True):
        original = np.asarray(Image.open(pets / source))
        assert np.array_equal(np.asarray(picture), original[:, 2:22])


def test_gray(pets: Path, tmp_path: Path) -> None:
    manifest = make(pets, tmp_path / "out", gray=True)
    assert manifest.channels == 1
    assert manifest.encoding.subsampling is None
    assert {picture.mode for picture in decoded(tmp_path / "out")} == {"L"}
    ShardSet.open(tmp_path / "out").verify(full=True)


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_formats(pets: Path, tmp_path: Path, image_format: str) -> None:
    manifest = make(pets, tmp_path / "out", format=image_format)
    assert manifest.encoding.quality == (None if image_format == "png" else 95)
    ShardSet.open(tmp_path / "out").verify(full=True)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert tar.getnames()[:2] == [f"00000000.{image_format}", "00000000.json"]


def test_idx_files_become_lossless_grayscale(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"train": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), "t10k": np.zeros((5, 28, 28), np.uint8)}
    (tmp_path / "mnist").mkdir()
    for part, images in arrays.items():
        write_idx(tmp_path / "mnist", part, images, np.arange(len(images), dtype=np.uint8) % 10, compress=True)
    manifest = make(tmp_path / "mnist", tmp_path / "out", size=28)
    assert (manifest.channels, manifest.encoding.format, manifest.classes) == (1, "png", tuple("0123456789"))
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 20, "val": 5}
    for record, picture in zip(records(tmp_path / "out", "train"), decoded(tmp_path / "out"), strict=True):
        number = int(record["source"].removeprefix("train/"))
        assert record["class"] == str(number % 10)
        assert np.array_equal(np.asarray(picture), arrays["train"][number])
    with pytest.raises(ValueError, match="WebP has no grayscale"):
        make(tmp_path / "mnist", tmp_path / "webp", size=28, format="webp")


def test_faces_carry_the_factors_that_made_them(tmp_path: Path) -> None:
    manifest = make("faces", tmp_path / "out", size=16, num_images=12, val_count=3)
    assert manifest.classes == ("cat", "dog", "wild")
    assert {name: split.num_images for name, split in manifest.splits.items()} == {"train": 9, "val": 3}
    for record in records(tmp_path / "out", "train"):
        assert record["face"]["class_name"] == record["class"]
        assert record["source"].startswith("faces/0/")
    assert make("faces", tmp_path / "seed1", num_images=12, val_count=3, seed=1).fingerprint != manifest.fingerprint


def test_faces_are_three_thousand_unless_told() -> None:
    assert ShardingPlan.of(ShardingConfig("faces", Path("out"), size=64)).num_images == 3000


def test_commands_end_in_one_line_or_a_message(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "make_shards", pets, out, "--size", 16, "--val-count", 6, "--gray", "--workers", 1) == 0
    said = capsys.readouterr()
    assert (
        said.out
        == f"24 train and 6 val images (cat 20, dog 10), 0 rejected, 0 groups of duplicates, written to {out}\n"
    )
    assert said.err == ""
    assert run(monkeypatch, "make_shards", pets, out, "--size", 32) == 1
    assert capsys.readouterr().err.startswith(f"error: {out} holds a shard set made with other arguments")
    assert run(monkeypatch, "verify_shards", out, "--full") == 0
    said = capsys.readouterr()
    assert f"fingerprint {ShardSet.open(out).manifest.fingerprint}" in said.out
    assert "val: 6 images (cat 4, dog 2)" in said.out
    assert said.out.endswith("OK: every file and every image\n")
    (out / "val-000000.tar").unlink()
    assert run(monkeypatch, "verify_shards", out) == 1
    said = capsys.readouterr()
    assert "val-000000.tar is missing" in said.err
    assert "OK" not in said.out


@pytest.mark.shared_data
@shared_data
def test_real_photographs(tmp_path: Path) -> None:
    manifest = make(SHARED / "afhq_sample", tmp_path / "out", size=64, val_count=9)
    assert manifest.classes == ("cat", "dog", "wild")
    assert sum(split.num_images for split in manifest.splits.values()) == 54
    ShardSet.open(tmp_path / "out").verify(full=True)


@pytest.mark.shared_data
@shared_data
def test_real_mnist_is_planned_whole() -> None:
    plan = ShardingPlan.of(ShardingConfig(os.fspath(SHARED / "mnist"), Path("out"), size=28))
    assert {name: len(items) for name, (_, items) in plan.splits.items()} == {"train": 60_000, "val": 10_000}
