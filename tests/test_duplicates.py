import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from test_make_shards import content, make, pets, records, run  # noqa: F401 (pets is a fixture)
from test_make_share import share
from test_sources import pack_tar
from vaetrain.data.sharding import duplicates
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.duplicates import duplicate_groups, find_groups
from vaetrain.data.sharding.image_hash import IMAGE_HASH, likenesses, thumbnail_of
from vaetrain.data.sharding.val_split import split_train_val


def photo(seed: int, side: int = 96) -> Image.Image:
    """Smooth blobs of colour, as photographs are at small scale."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def likeness_of(pictures: list[Image.Image]) -> np.ndarray:
    return likenesses([thumbnail_of(picture.mode.encode() + picture.tobytes(), picture) for picture in pictures])


def groups(pictures: list[Image.Image], similarity: float = 0.99) -> list[int]:
    return find_groups(likeness_of(pictures), similarity).tolist()


def test_the_same_picture_scaled_encoded_and_brightened_is_found(tmp_path: Path) -> None:
    picture = photo(0, 200)
    picture.save(tmp_path / "low.jpg", quality=25)
    small = picture.resize((96, 96), Image.Resampling.LANCZOS)
    variants = [
        Image.open(tmp_path / "low.jpg").resize((96, 96), Image.Resampling.LANCZOS),
        picture.resize((100, 100), Image.Resampling.BILINEAR).resize((96, 96), Image.Resampling.LANCZOS),
        ImageEnhance.Brightness(small).enhance(1.04),
        small.copy(),
    ]
    others = [photo(seed) for seed in range(1, 40)]
    assert groups([small, *variants, *others]) == [0] * 5 + list(range(5, 44))


def test_turned_inverted_and_shifted_pictures_are_other_pictures() -> None:
    picture = photo(0)
    others = [
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        picture.transpose(Image.Transpose.ROTATE_90),
        picture.point(lambda level: 255 - level),
        picture.crop((12, 12, 96, 96)).resize((96, 96)),
    ]
    assert groups([picture, *others]) == [0, 1, 2, 3, 4]


def test_plain_pictures_are_no_near_duplicates() -> None:
    plain = [Image.new("RGB", (32, 32), (level, level, level)) for level in range(0, 250, 2)]
    rng = np.random.default_rng(0)
    faint = [Image.fromarray(rng.integers(0, 3, (32, 32, 3), dtype=np.uint8)) for _ in range(50)]
    specks = []
    for position in range(0, 32, 4):  # black, but for a square somewhere else
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[position : position + 4, position : position + 4] = 255
        specks.append(Image.fromarray(pixels))
    pictures = [*plain, *faint, *specks]
    assert groups(pictures) == list(range(len(pictures)))
    black = Image.new("RGB", (32, 32))
    assert groups([black, *pictures, black])[-1] == 0  # the same image is, however plain


def test_another_sky_of_the_same_gradient_is_another_picture() -> None:
    ramp = np.linspace(0, 60, 32)[:, None] + np.zeros((32, 32))
    skies = [Image.fromarray((ramp + level).astype(np.uint8)) for level in (0, 30, 100)]
    assert groups(skies) == [0, 1, 2]


def test_chains_are_one_group_and_of_kind_near_unless_all_are_the_same() -> None:
    first, other = photo(0), photo(1)
    chain = [Image.blend(first, other, 0.05 * step) for step in range(3)]
    assert groups([chain[0], chain[2]], similarity=0.999) == [0, 1]
    pictures = [chain[2], photo(2), chain[1], chain[0], photo(2)]
    names = [("train", "c2"), ("val", "x"), ("train", "c1"), ("val", "c0"), ("val", "y")]
    found = list(duplicate_groups(likeness_of(pictures), names, 0.99))
    assert [(group.kind, group.images) for group in found] == [
        ("near", (names[0], names[2], names[3])),
        ("exact", (names[1], names[4])),
    ]
    assert found[0].splits == ("train", "val")
    assert list(duplicate_groups(np.zeros(0, IMAGE_HASH), [], 0.99)) == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60))
def test_no_pair_within_three_bits_is_missed(seed: int, num_images: int) -> None:
    """Against all pairs compared one by one."""
    rng = np.random.default_rng(seed)
    likeness = np.zeros(num_images, IMAGE_HASH)
    likeness["digest"] = np.arange(num_images)
    likeness["thumbnail"] = rng.integers(0, 256, 256)
    originals = rng.integers(0, 2**64, 3, dtype=np.uint64)
    flips = rng.integers(0, 64, (num_images, rng.integers(1, 8)), dtype=np.uint64)
    likeness["phash"] = rng.choice(originals, num_images) ^ np.bitwise_xor.reduce(np.uint64(1) << flips, axis=1)
    found = {tuple(sorted(pair)) for pair in duplicates._near_pairs(likeness, 0.99).T.tolist()}
    distance = np.bitwise_count(likeness["phash"][:, None] ^ likeness["phash"])
    for a in range(num_images):
        for b in range(a):
            if distance[a, b] <= 3:
                assert (b, a) in found
            if distance[a, b] > duplicates.MAX_BITS:
                assert (b, a) not in found


def test_every_band_leads_to_its_pairs() -> None:
    """Three flipped bits, none in the one band that is left the same."""
    for same in range(4):
        likeness = np.zeros(2, IMAGE_HASH)
        likeness["digest"] = [1, 2]
        likeness["thumbnail"] = np.arange(256)
        likeness["phash"] = 0x0123456789ABCDEF
        likeness["phash"][1] ^= np.uint64(sum(1 << (16 * band + 5) for band in range(4) if band != same))
        assert find_groups(likeness, 0.99).tolist() == [0, 0]
        likeness["phash"][1] ^= np.uint64(1 << (16 * same))
        assert find_groups(likeness, 0.99).tolist() == [0, 1]


def test_equal_hashes_are_not_enough() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(-1, 1, 256)
    thumbnails = [
        128 + 20 * ramp,
        128 + 60 * ramp,  # correlates, of another contrast
        148 + 20 * ramp,  # correlates, brighter
        128 + rng.integers(-6, 7, 256),  # is near in levels, shows something else
        128 + rng.integers(-6, 7, 256),
        130 + 21 * ramp,  # the first one again
    ]
    likeness = np.zeros(len(thumbnails), IMAGE_HASH)
    likeness["digest"] = np.arange(len(thumbnails))
    likeness["thumbnail"] = np.rint(thumbnails)
    assert find_groups(likeness, 0.99).tolist() == [0, 1, 2, 3, 4, 0]


def test_seventy_thousand_images_take_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs would be 2.4 billion; here no more than a handful an image are looked at closely."""
    rng = np.random.default_rng(0)
    num_images = 70_000
    likeness = np.zeros(num_images, IMAGE_HASH)
    likeness["digest"] = np.arange(num_images)
    likeness["thumbnail"] = rng.integers(0, 256, (num_images, 256), dtype=np.uint8)
    likeness["phash"] = rng.integers(0, 2**64, num_images, dtype=np.uint64)
    likeness[1::1000] = likeness[::1000]
    likeness["digest"] = np.arange(num_images)
    compared = []
    are_alike = duplicates._Looks.are_alike
    monkeypatch.setattr(
        duplicates._Looks,
        "are_alike",
        lambda self, a, b, least: compared.append(len(a)) or are_alike(self, a, b, least),
    )
    expected = np.arange(num_images)
    expected[1::1000] = expected[::1000]
    assert np.array_equal(find_groups(likeness, 0.99), expected)
    assert sum(compared) < num_images / 10
    likeness["phash"] = 0  # all in one band, and all different
    compared.clear()
    assert np.array_equal(find_groups(likeness[:2000], 0.99), expected[:2000])
    assert sum(compared) <= 4 * duplicates.MAX_NEIGHBOURS * 2000


@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.data())
@settings(deadline=None)
def test_dealing_keeps_groups_whole_and_the_count_where_it_can(labels: list[int], data: st.DataObject) -> None:
    group = np.array(labels)
    num_val = data.draw(st.integers(1, len(group) - 1))
    is_val = split_train_val(group, num_val)
    for number in set(labels):
        assert len(set(is_val[group == number].tolist())) == 1
    sums = {0}
    for size in np.unique(group, return_counts=True)[1].tolist():
        sums |= {total + size for total in sums}
    assert is_val.sum() == max(total for total in sums if total <= num_val)


def test_without_duplicates_the_last_images_validate() -> None:
    assert split_train_val(np.arange(9), 3).tolist() == [False] * 6 + [True] * 3
    assert split_train_val(np.array([0, 1, 2, 3, 4, 2]), 3).tolist() == [False, False, True, False, True, True]


@pytest.fixture
def twins(pets: Path) -> Path:  # noqa: F811
    """The pets, of noise, and six photographs of which each lies there four times: twice the same file, larger, and as JPEG."""
    for number in range(6):
        picture = photo(number, 64)
        for copy in ("a", "b"):
            picture.save(pets / "cat" / f"twin{number}{copy}.png")
        picture.resize((128, 128), Image.Resampling.BICUBIC).save(pets / "dog" / f"twin{number}c.png")
        picture.save(pets / "dog" / f"twin{number}d.jpg", quality=60)
    return pets


def duplicates_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()]


def test_duplicates_are_reported_and_the_shards_stay_as_they_were(
    twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(twins, out, val_count=10)
    found = duplicates_in(out)
    assert {group["kind"] for group in found} == {"near"}
    assert sorted(len(group["images"]) for group in found) == [4] * 6
    straddling = sum(len(group["splits"]) > 1 for group in found)
    assert straddling > 0
    for group in found:
        assert group["splits"] == list(dict.fromkeys(image["split"] for image in group["images"]))
        assert len({image["source"].split("twin")[1][0] for image in group["images"]}) == 1
    message = f"{straddling} group(s) of duplicates are in more than one split, listed in {out / 'duplicates.jsonl'}"
    assert message + "; --group-duplicates keeps them together" in capsys.readouterr().err
    sources = {split: {record["source"] for record in records(out, split)} for split in ("train", "val")}
    for group in found:
        for image in group["images"]:
            assert image["source"] in sources[image["split"]]


@pytest.mark.parametrize("packed", [False, True])
def test_groups_do_not_straddle_when_asked(twins: Path, tmp_path: Path, packed: bool) -> None:
    src = pack_tar(twins, tmp_path / "pets.tar.gz", "w:gz") if packed else twins
    for seed in range(3 if not packed else 1):
        out = tmp_path / f"out{seed}"
        asked = "18.5%" if seed == 1 else 10
        manifest = make(src, out, val_count=asked, group_duplicates=True, seed=seed)
        assert manifest.splits["val"].num_images == 10
        assert [group["splits"] for group in duplicates_in(out) if len(group["splits"]) > 1] == []
        assert len(duplicates_in(out)) == 6
    assert sorted(entry.name for entry in tmp_path.glob(".*")) == []  # what was unpacked to look at it


def test_groups_are_the_same_for_any_workers_and_tasks(twins: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_count": 10, "group_duplicates": True}
    make(twins, tmp_path / "whole", **options)
    make(twins, tmp_path / "two", **options, workers=2)
    assert share(twins, tmp_path / "shared", 0, 2, **options) is None
    assert share(twins, tmp_path / "shared", 1, 2, **options) is not None
    expected = content(tmp_path / "whole")
    assert content(tmp_path / "two") == content(tmp_path / "shared") == expected
    assert "duplicates.jsonl" in expected


def test_images_that_cannot_be_read_are_in_no_group(twins: Path, tmp_path: Path) -> None:
    (twins / "cat" / "twin0a.png").write_text("no picture")
    manifest = make(twins, tmp_path / "out", val_count=10, group_duplicates=True, max_rejected=1)
    assert sum(split.num_images for split in manifest.splits.values()) == 53
    found = duplicates_in(tmp_path / "out")
    assert sorted(len(group["images"]) for group in found) == [3, 4, 4, 4, 4, 4]
    for group in found:
        assert len(group["splits"]) == 1
        assert len({image["source"].split("twin")[1][0] for image in group["images"]}) == 1


def test_splits_of_the_source_stay_and_are_reported(
    twins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(twins, tmp_path / "data" / "train")
    (tmp_path / "data" / "test" / "cat").mkdir(parents=True)
    shutil.copy(twins / "cat" / "00.png", tmp_path / "data" / "test" / "cat")
    make(tmp_path / "data", tmp_path / "out")
    (straddling,) = [group for group in duplicates_in(tmp_path / "out") if len(group["splits"]) > 1]
    assert straddling["kind"] == "exact"
    assert {image["source"] for image in straddling["images"]} == {"train/cat/00.png", "test/cat/00.png"}
    said = capsys.readouterr().err
    assert "1 group(s) of duplicates are in more than one split" in said
    assert "--group-duplicates" not in said  # which could not help


def test_groups_larger_than_the_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    for number in range(3):
        for copy in range(4):
            photo(number).save(folder / f"{number}{copy}.png")
    manifest = make(folder, tmp_path / "out", val_count=6, group_duplicates=True)
    assert manifest.splits["val"].num_images == 4
    assert "groups of duplicates are kept whole: 4 images for validation, not 6" in capsys.readouterr().err
    with pytest.raises(ValueError, match="every group of duplicates has more than --val-count 3 images"):
        make(folder, tmp_path / "none", val_count=3, group_duplicates=True)
    with pytest.raises(ValueError, match=r"every group of duplicates has more than --val-count 25% \(3\) images"):
        make(folder, tmp_path / "none", val_count="25%", group_duplicates=True)


def test_the_command_counts_groups(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "make_shards", twins, out, "--size", 16, "--workers", 1) == 0
    assert capsys.readouterr().out.endswith(f"0 rejected, 6 groups of duplicates, written to {out}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_duplicates": True}, "--group-duplicates is about what --val-count deals out"),
        ({"near_duplicates": 1.0}, "--near-duplicates is 1.0; it must be between 0 and 1"),
        ({"near_duplicates": 0.0}, "--near-duplicates is 0.0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardingConfig("faces", Path("out"), size=16, **options)


def test_plans_without_groups_are_those_of_older_versions() -> None:
    """So that shards that an older version has begun are completed, and found complete."""
    from vaetrain.data.sharding.plan import ShardingPlan

    plan = ShardingPlan.of(ShardingConfig("faces", Path("out"), size=64, val_count=300))
    assert plan.digest == "c9dfe7c4397f41b9fcdc66236c888c01bcda2e910622f0d0e5865fd2ff6249df"
