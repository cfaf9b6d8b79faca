"""What people really have (hubs, NAS boxes, phones, scanners): read right, or refused by name, and never wrong in silence."""

import gzip
import io
import json
import os
import struct
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from test_make_shards import decoded, make
from vaetrain.data.sharding.make_shards import closing_line
from vaetrain.data.sources.open_source import open_source
from vaetrain.data.sources.split_names import said_split


def photo(number: int, mode: str = "RGB") -> Image.Image:
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).convert(mode)


def fill(root: Path, names: Iterable[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo(number).save(root / name)
    return root


def found(src: Path, **options: str) -> set[tuple[str, str | None]]:
    """Class and split of all originals."""
    listing = open_source(str(src), **options).listing()
    return {(listing.classes[item.label], item.split) for item in listing.items}


CATS_AND_DOGS = {(name, split) for name in ("cat", "dog") for split in ("train", "val")}


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing"), ("Training", "Test"), ("seg_train", "seg_test"),
        ("train", "dev"), ("train2017", "val2017"), ("training_set", "test_set"), ("TrainSet", "ValSet"),
        ("trainset", "testset"), ("train-images", "validation-images"), ("partial-train", "validation"),
        ("imagesTr", "imagesTs"), ("Training", "PublicTest"), ("train_64x64", "valid_64x64"), ("trainval", "test"),
        ("train", "holdout"), ("pets_train", "pets_eval"), ("1_train", "2_test"),
    ],
)  # fmt: skip
def test_split_folders_in_any_usual_spelling(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / "a", [f"{split}/{name}/0.png" for split in (train, val) for name in ("cat", "dog")])
    assert found(tmp_path / "a") == CATS_AND_DOGS
    assert {split for _, split in found(tmp_path / "a", splits="none")} == {None}


def test_other_places_of_splits(tmp_path: Path) -> None:
    fill(tmp_path / "twice", [f"seg_{s}/seg_{s}/{name}/0.png" for s in ("train", "test") for name in ("cat", "dog")])
    fill(tmp_path / "below", [f"{name}/{split}/0.png" for split in ("train", "test") for name in ("cat", "dog")])
    fill(tmp_path / "inside", [f"{split}/images/{name}/0.png" for split in ("train", "val") for name in ("cat", "dog")])
    for name in ("twice", "below", "inside"):
        assert found(tmp_path / name) == CATS_AND_DOGS
    fill(tmp_path / "domains", [f"{split}{domain}/0.png" for split in ("train", "test") for domain in "AB"])
    assert found(tmp_path / "domains") == {(domain, split) for domain in "AB" for split in ("train", "val")}
    fill(tmp_path / "three", [f"{split}/cat/0.png" for split in ("Train", "Dev", "Test")])
    assert found(tmp_path / "three") == {("cat", "train"), ("cat", "val"), ("cat", "test")}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/0.png", "test/a/0.png", "unlabeled/a/0.png"], "has unlabeled beside its splits"),
        (["train/0.png", "unlabeled/0.png"], "has unlabeled beside train, which looks like a split"),
        (["Training/a/0.png", "More/a/0.png"], "has More beside Training"),
        (["train/a/0.png", "train/b/0.png", "rest/a/0.png"], "has rest beside train"),
        (["cat/0.png", "dog/0.png", "test/0.png"], "has cat, dog beside test, which looks held out"),
        (["val/a/0.png", "test/a/0.png"], "none to train on beside test, val"),
        (
            ["a/b/train/0.png", "a/b/test/0.png", "a/c/d/0.png", "e/0.png"],
            r"look like splits inside a/b \(test, train\)",
        ),
        (["train_day/0.png", "train_night/0.png", "test_day/0.png"], "several of one split"),
        (["train/a/images/0.png", "train/b/images/0.png", "val/images/0.png"], r"classes that train lacks \(images\)"),
        (["train/a/0.png", "test/a/0.png", "test/b/0.png"], r"classes that train lacks \(b\), such as test/b/0\.png"),
    ],
)
def test_what_looks_like_splits_and_is_not_clear_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(str(fill(tmp_path / "a", names))).listing()


@pytest.mark.parametrize(
    "classes",
    [
        ("train", "plane"),
        ("valid", "invalid"),
        ("tr", "de"),
        ("train station", "test tube", "cat"),
        ("contest", "latest"),
    ],
)
def test_classes_that_are_called_nearly_so_are_classes(tmp_path: Path, classes: tuple[str, ...]) -> None:
    fill(tmp_path / "a", [f"{name}/0.png" for name in classes])
    assert found(tmp_path / "a") == {(name, None) for name in classes}
    assert said_split("trainable") is said_split("contest") is None


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets", [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)])


def packed(pets: Path, file: Path, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        archive.add(pets, pets.name)
    return file


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.TGZ", "a.tbz2", "a.zip", "nosuffix"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_what_its_bytes_say(pets: Path, tmp_path: Path, name: str, mode: str) -> None:
    assert found(packed(pets, tmp_path / name, mode)) == {("cat", None), ("dog", None)}


def test_tars_that_libraries_unpack(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = packed(pets, tmp_path / "a.tar").read_bytes()
    zstd = pytest.importorskip("backports.zstd")
    lz4 = pytest.importorskip("lz4.frame")
    half = len(plain) // 2
    (tmp_path / "a.tar.zst").write_bytes(
        zstd.compress(plain[:half]) + zstd.compress(plain[half:])
    )  # as pzstd writes it
    (tmp_path / "a.tar.lz4").write_bytes(lz4.compress(plain))
    for file in (tmp_path / "a.tar.zst", tmp_path / "a.tar.lz4"):
        assert make(file, tmp_path / f"out{file.suffix}").splits["train"].num_images == 6
    (tmp_path / "a.tar.zst").write_bytes((tmp_path / "a.tar.zst").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.tar\.zst is damaged"):
        open_source(str(tmp_path / "a.tar.zst")).listing()


@pytest.mark.parametrize(
    ("head", "kind"), [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07", "RAR"), (b"\x28\xb5\x2f\xfd", "zstd")]
)
def test_archives_that_are_not_read_are_called_by_their_kind(
    tmp_path: Path, head: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vaetrain.data.sources import archives

    monkeypatch.setitem(archives.DECOMPRESSORS, "zstd", {"no.such": lambda module, path: None})
    (tmp_path / "a.zip").write_bytes(head + bytes(1000))
    with pytest.raises(ValueError, match=rf"a\.zip is (compressed with )?{kind}"):
        open_source(str(tmp_path / "a.zip"))


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_backslashes_between_folders(tmp_path: Path, kind: str) -> None:
    names = [f"photos\\{split}\\{name}\\0.png" for split in ("train", "test") for name in ("cat", "dog")]
    encoded = io.BytesIO()
    photo(0).save(encoded, "PNG")
    src = tmp_path / "made"
    if kind == "folder":
        fill(src, names)
    elif kind == "zip":
        with zipfile.ZipFile(src, "w") as archive:
            for name in names:
                info = zipfile.ZipInfo(name)
                info.filename = name
                archive.writestr(info, encoded.getvalue())
    else:
        with tarfile.open(src, "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(encoded.getvalue())
                tar.addfile(info, io.BytesIO(encoded.getvalue()))
    assert found(src) == CATS_AND_DOGS


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_a_tar_are_the_files_they_lead_to(pets: Path, tmp_path: Path, mode: str) -> None:
    (pets / "best").mkdir()
    os.link(pets / "cat" / "0.png", pets / "best" / "hard.png")
    (pets / "best" / "soft.png").symlink_to("../dog/1.png")
    out = tmp_path / "out"
    manifest = make(packed(pets, tmp_path / "a.tar", mode), out, format="png")
    assert manifest.splits["train"].class_counts == {"best": 2, "cat": 3, "dog": 3}
    assert closing_line(out, manifest).startswith("8 train images")


def test_what_is_left_out_is_counted_with_its_reason(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(pets, ["cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/x.png", "#recycle/y.png", "thumbs/cat/0.png"])
    (pets / "masks").mkdir()
    for n in range(3):
        photo(n, "L").point(lambda v: 255 * (v > 128)).save(pets / "masks" / f"{n}.png")
    (pets / ".DS_Store").write_bytes(b"x")
    (pets / "cat" / "notes.txt").write_text("x")
    (pets / "cat" / "0.NEF").write_bytes(b"raw, beside 0.png")
    manifest = make(pets, tmp_path / "out")
    num_files = sum(len(names) for *_, names in os.walk(pets))
    said = closing_line(tmp_path / "out", manifest)
    assert said.startswith("6 train images (cat 3, dog 3), 0 rejected, 10 ignored (")
    assert num_files == 6 + 0 + 10
    for part in (
        "4 that are thumbnails or trash of file managers", "3 that are masks or label maps", "1 that are hidden",
        "1 that are no images", "1 that are raw forms of pictures that are read",
    ):  # fmt: skip
        assert part in said
    assert "ignored 3 file(s) that are masks or label maps, such as masks/0.png (.png 3)" in capsys.readouterr().err


def test_photographs_in_a_class_called_mask_are_no_masks(tmp_path: Path) -> None:
    fill(tmp_path / "a", [f"{name}/{n}.png" for name in ("mask", "no_mask") for n in range(3)])
    assert found(tmp_path / "a") == {("mask", None), ("no_mask", None)}
    for name in ("mask", "vase"):  # drawings have few colours, too
        (tmp_path / "b" / name).mkdir(parents=True)
        for n in range(3):
            photo(n, "L").point(lambda v: 255 * (v > 128)).save(tmp_path / "b" / name / f"{n}.png")
    assert found(tmp_path / "b") == {("mask", None), ("vase", None)}


def test_frames_are_counted_or_all_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "stacks"
    src.mkdir()
    for name in ("a.tif", "b.gif", "c.webp", "d.png"):
        pages = [photo(n) for n in range(3)]
        pages[0].save(
            src / name, save_all=True, append_images=pages[1:], **({"lossless": True} if name == "c.webp" else {})
        )
    photo(9).save(src / "e.png")
    manifest = make(src, tmp_path / "first")
    assert "4 file(s) hold 8 more pictures than the first" in capsys.readouterr().err
    assert "5 train images (stacks 5), 0 rejected, 8 more frames in their files" in closing_line(
        tmp_path / "first", manifest
    )
    for source in (src, packed(src, tmp_path / "a.tar.gz", "w:gz")):
        out = tmp_path / f"all-{source.name}"
        manifest = make(source, out, frames="all", format="png", size=32)
        assert manifest.splits["train"].num_images == 13
        made = {np.asarray(picture).tobytes() for picture in decoded(out)}
        assert {np.asarray(photo(n)).tobytes() for n in (0, 1, 2, 9)} <= made
        assert "more frames" not in closing_line(out, manifest)


def test_pictures_in_formats_that_are_not_read_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vaetrain.data.sources import preprocess

    monkeypatch.setitem(preprocess.MORE_FORMATS, "HEIC", ("HEIF", "no_such_plugin"))
    monkeypatch.setitem(preprocess.MORE_FORMATS, "JPEG XL", ("JXL", "no_such_plugin"))
    src = fill(tmp_path / "phone", ["0.jpg"])
    (src / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(500))
    (src / "2.jxl").write_bytes(b"\xff\x0a" + bytes(500))
    (src / "3.CR2").write_bytes(b"II*\0" + bytes(500))
    (src / "4.dcm").write_bytes(bytes(128) + b"DICM" + bytes(500))
    (src / "5.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (src / "1.MOV").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"5 image\(s\) cannot be read"):
        make(src, tmp_path / "out")
    manifest = make(src, tmp_path / "out", max_rejected=5)
    reasons = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    said = {each["source"]: each["reason"] for each in reasons}
    assert "HEIC, which Pillow alone does not read; pip install 'vaetrain[photos]'" in said["IMG_1.HEIC"]
    assert "JPEG XL, which" in said["2.jxl"]
    assert "raw file" in said["3.CR2"]
    assert "DICOM" in said["4.dcm"]
    assert "Git LFS pointer" in said["5.jpg"]
    assert "1 train images (phone 1), 5 rejected, 1 ignored (1 that are no images)" in closing_line(
        tmp_path / "out", manifest
    )


@pytest.mark.parametrize("suffix", ["avif", "jp2", "heic", "jxl"])
def test_newer_formats_are_read(tmp_path: Path, suffix: str) -> None:
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if suffix == "jxl":
        pytest.importorskip("pillow_jxl")
    fill(tmp_path / "a", [f"{n}.{suffix}" for n in range(2)])
    manifest = make(tmp_path / "a", tmp_path / "out", format="png", size=32)
    assert manifest.splits["train"].num_images == 2
    made = sorted(np.asarray(picture).mean() for picture in decoded(tmp_path / "out"))
    assert np.allclose(made, sorted(np.asarray(photo(n)).mean() for n in range(2)), atol=3)


@pytest.mark.parametrize(("bits", "white"), [(10, 1023), (12, 4095), (14, 16383)])
def test_twelve_bits_in_sixteen_are_told_and_made_white(
    tmp_path: Path, bits: int, white: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scans").mkdir()
    for n in range(2):
        grey = np.asarray(photo(n, "L")).astype(np.uint32) * white // 255
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "scans" / f"{n}.png")
    make(tmp_path / "scans", tmp_path / "dark", gray=True)
    assert f"if their pixels have {bits} bits, say --white {white}" in capsys.readouterr().err
    make(tmp_path / "scans", tmp_path / "light", gray=True, white=float(white), format="png", size=32)
    assert "--white" not in capsys.readouterr().err
    made = sorted(int(np.asarray(picture).sum()) for picture in decoded(tmp_path / "light"))
    assert np.allclose(made, sorted(int(np.asarray(photo(n, "L")).sum()) for n in range(2)), rtol=0.01)


def test_numbers_with_a_white_level_are_pictures(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.linspace(0, 2, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a" / "0.tif")
    make(tmp_path / "a", tmp_path / "out", gray=True, white=1.0, format="png", size=8)
    (picture,) = decoded(tmp_path / "out")
    assert np.asarray(picture).reshape(-1)[[0, 16, 63]].tolist() == [0, 130, 255]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    photo(number).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("label", [("cls", "{}"), ("json", '{{"label": {}}}'), ("txt", "{}")])
def test_shards_of_webdataset(tmp_path: Path, label: tuple[str, str]) -> None:
    suffix, text = label
    (tmp_path / "wds").mkdir()
    for shard, name in enumerate(("train-000000", "train-000001", "val-000000")):
        with tarfile.open(tmp_path / "wds" / f"{name}.tar", "w") as archive:
            for n in range(4):
                add(archive, f"{n:04d}.png", encoded(4 * shard + n))
                add(archive, f"{n:04d}.{suffix}", text.format(2 + 8 * (n % 2)).encode())
                add(archive, f"{n:04d}.depth.png", encoded(n))
    manifest = make(tmp_path / "wds", tmp_path / "out")
    assert manifest.classes == ("2", "10")
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": {"2": 4, "10": 4}, "val": {"2": 2, "10": 2},
    }  # fmt: skip
    assert "24 ignored (24 that are labels, captions or other parts of samples)" in closing_line(
        tmp_path / "out", manifest
    )


def test_captions_are_no_labels_and_a_missing_label_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for n in range(3):
            add(archive, f"{n}.png", encoded(n))
            add(archive, f"{n}.txt", f"a picture of {n}".encode())
            add(archive, f"{n}.json", b'{"caption": "x"}')
    assert found(tmp_path / "photos.tar") == {("photos", None)}
    with tarfile.open(tmp_path / "photos.tar", "a") as archive:
        add(archive, "0.cls", b"1")
    with pytest.raises(ValueError, match=r"labels in \.cls files, such as 0\.cls, but none for 1\.png"):
        open_source(str(tmp_path / "photos.tar")).listing()


def write_idx(folder: Path, template: str, labels: range, compress: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = np.arange(len(labels) * 12, dtype=np.uint8).reshape(-1, 4, 3)
        for what, array in (("images", pixels), ("labels", np.array(labels, dtype=np.uint8))):
            content = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
            name = template.format(part=part, what=what, d=array.ndim)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.mark.parametrize(
    "template",
    ["{part}-{what}-idx{d}-ubyte", "{part}-{what}.idx{d}-ubyte", "{part}-{what}-idx{d}-ubyte.gz", "{part}-{what}.idx{d}.ubyte",
     "MNIST/raw/{part}-{what}-idx{d}-ubyte", "{part}-{what}-idx{d}-ubyte/{part}-{what}-idx{d}-ubyte"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_mnist_under_its_usual_names(tmp_path: Path, template: str, kind: str) -> None:
    src = write_idx(tmp_path / "mnist", template, range(10), compress=template.endswith("gz"))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "mnist.zip", "w") as archive:
            for file in src.rglob("*"):
                archive.write(file, file.relative_to(src))
        src = tmp_path / "mnist.zip"
    elif kind == "tar.gz":
        src = packed(src, tmp_path / "mnist.tar.gz", "w:gz")
    source = open_source(str(src))
    listing = source.listing()
    assert listing.classes == tuple("0123456789")
    assert len(listing.items) == 20
    assert np.asarray(source.open(listing.items[1])[0]).tolist() == np.arange(12, 24).reshape(4, 3).tolist()


def test_emnist_is_turned_upright_and_its_letters_are_named(tmp_path: Path) -> None:
    src = write_idx(tmp_path / "emnist", "emnist-letters-{part}-{what}-idx{d}-ubyte", range(1, 4))
    for file in list(src.iterdir()):
        file.rename(src / file.name.replace("t10k", "test"))
    (src / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n")
    source = open_source(str(src))
    assert source.listing().classes == ("A", "B", "C")
    assert np.asarray(source.open(source.listing().items[0])[0]).tolist() == np.arange(12).reshape(4, 3).T.tolist()
    write_idx(src, "emnist-digits-{part}-{what}-idx{d}-ubyte", range(10))
    with pytest.raises(ValueError, match=r"several sets .*emnist-digits, emnist-letters\); name one of its files"):
        open_source(str(src))
    assert open_source(str(src / "emnist-letters-train-images-idx3-ubyte")).listing().classes == ("A", "B", "C")
    with pytest.raises(ValueError, match=r"labels up to 26, and MNIST's are 0 to 9; .*emnist-letters-train"):
        open_source(str(write_idx(tmp_path / "renamed", "{part}-{what}-idx{d}-ubyte", range(1, 27)))).listing()


def test_names_of_sources(tmp_path: Path) -> None:
    for name, expected in (
        (".photos", "photos"),
        ("photos.v2", "photos.v2"),
        ("-photos", "-photos"),
        ("a (1)", "a (1)"),
    ):
        assert found(fill(tmp_path / name, ["0.png"])) == {(expected, None)}
    packed(fill(tmp_path / "x", ["0.png", "1.png"]), tmp_path / "y")
    hidden = fill(tmp_path / "hidden", [".cat/0.png", ".dog/0.png"])
    with pytest.raises(ValueError, match=r"2 images are hidden \(\.cat, \.dog\): rename"):
        open_source(str(hidden)).listing()


def test_names_that_look_equal_are_one_class(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    fill(tmp_path / "both", [f"{forms[0]}/0.png", f"{forms[1]}/1.png", "tea/0.png"])
    listing = open_source(str(tmp_path / "both")).listing()
    assert listing.classes == (forms[0], "tea")
    assert any("2 Unicode forms of 'café'" in note for note in listing.notes)
    manifest = make(
        fill(tmp_path / "train", [f"{forms[1]}/0.png"]),
        tmp_path / "out",
        val_src=str(fill(tmp_path / "val", [f"{forms[0]}/0.png"])),
    )
    assert manifest.classes == (forms[1],)  # as it always was
    assert manifest.splits["val"].num_images == 1
    from vaetrain.data.readers.selection import count_images

    assert count_images(manifest, "train", (forms[0],), "out") == 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "train.zip",
            r"1 other file\(s\): train\.zip \(\.zip 1\); name an archive: python tools/make_shards\.py \S*train\.zip OUT",
        ),
        ("a/b/c.npy", "these hold arrays"),
        ("data.arrow", "to_parquet"),
        ("clip.mp4", "ffmpeg"),
        ("readme.txt", r"1 other file\(s\): readme\.txt \(\.txt 1\)$"),
    ],
)
def test_a_folder_without_images_says_what_it_has_and_what_reads_it(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path)).listing()
