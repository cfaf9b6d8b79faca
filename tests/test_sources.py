import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from vaetrain.data.format.manifest import Crop, Encoding
from vaetrain.data.sources.idx import read_idx
from vaetrain.data.sources.open_source import open_source
from vaetrain.data.sources.preprocess import UNREADABLE, Preprocessing, decode_picture, with_channels
from vaetrain.data.sources.source import ImageSource


def write_image(file: Path, colour: tuple[int, int, int] = (200, 100, 50)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(file)


def layout(source: ImageSource) -> list[tuple[str, str, str | None]]:
    listing = source.listing()
    return [(item.source, listing.classes[item.label], item.split) for item in listing.items]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dog/2.png", "cat/1.png", "cat/more/0.JPG"):
        write_image(tmp_path / "pets" / name)
    (tmp_path / "pets" / "cat" / "readme.txt").write_text("cats")
    (tmp_path / "pets" / ".DS_Store").write_text("")
    return tmp_path / "pets"


def pack_tar(folder: Path, file: Path, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:
        tar.add(folder, folder.name)
    return file


def pack_zip(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder.parent))
    return file


PETS = [("cat/1.png", "cat", None), ("cat/more/0.JPG", "cat", None), ("dog/2.png", "dog", None)]


def test_folder_zip_and_tars_of_it_are_the_same_originals(folder: Path, tmp_path: Path) -> None:
    sources = [
        folder,
        pack_zip(folder, tmp_path / "a.zip"),
        pack_tar(folder, tmp_path / "a.tar"),
        pack_tar(folder, tmp_path / "b.tar.gz", "w:gz"),
        pack_tar(folder, tmp_path / "c.tgz", "w:gz"),
        pack_tar(folder, tmp_path / "d.tar.xz", "w:xz"),
    ]
    for path in sources:
        source = open_source(str(path))
        listing = source.listing()
        assert layout(source) == PETS
        ignored = {Path(each.source).name: each.reason for each in listing.ignored}
        assert ignored == {"readme.txt": "no images", ".DS_Store": "hidden"}
        staged = source.staged(tmp_path / "staged.tar", listing.items)
        for item in listing.items:
            picture, extra = staged.open(item)
            expected = Image.open(folder / item.source)
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
            assert extra == {}


def test_splits_are_recognised_below_wrapping_folders(tmp_path: Path) -> None:
    for name in ("afhq/train/cat/0.png", "afhq/train/dog/1.png", "afhq/test/cat/2.png"):
        write_image(tmp_path / "data" / name)
    assert layout(open_source(str(tmp_path / "data"))) == [
        ("test/cat/2.png", "cat", "val"),
        ("train/cat/0.png", "cat", "train"),
        ("train/dog/1.png", "dog", "train"),
    ]
    write_image(tmp_path / "data/afhq/val/cat/3.png")
    assert [split for *_, split in layout(open_source(str(tmp_path / "data")))] == ["test", "train", "train", "val"]
    write_image(tmp_path / "data/afhq/extra/cat/4.png")
    with pytest.raises(ValueError, match="has extra beside its splits"):
        open_source(str(tmp_path / "data")).listing()


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_image(tmp_path / "train/0.png")
    write_image(tmp_path / "plane/1.png")
    assert open_source(str(tmp_path)).listing().classes == ("plane", "train")


def test_images_without_class_folders_are_one_class_named_after_the_source(tmp_path: Path) -> None:
    write_image(tmp_path / "whiskers" / "0.png")
    assert layout(open_source(str(tmp_path / "whiskers"))) == [("0.png", "whiskers", None)]
    packed = pack_tar(tmp_path / "whiskers", tmp_path / "mine.tar.gz", "w:gz")
    assert layout(open_source(str(packed))) == [("whiskers/0.png", "whiskers", None)]


def test_ambiguous_and_empty_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "stray.png")
    with pytest.raises(ValueError, match=r"class folders, but stray\.png lies in none"):
        open_source(str(folder)).listing()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        open_source(str(tmp_path / "empty")).listing()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(ValueError, match=r"notes\.txt is no source of images"):
        open_source(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_truncated_archives_are_refused(folder: Path, tmp_path: Path, suffix: str, kept: float) -> None:
    file = tmp_path / f"pets{suffix}"
    if suffix == ".zip":
        pack_zip(folder, file)
    else:
        pack_tar(folder, file, "w:gz" if suffix == ".tar.gz" else "w")
    content = file.read_bytes().rstrip(b"\0")  # a tar this small is mostly padding
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"pets\.(zip|tar|tar\.gz) is (damaged|no source)"):
        open_source(str(file)).listing()


def test_a_zip_that_needs_a_version_that_there_is_not_is_refused(folder: Path, tmp_path: Path) -> None:
    content = bytearray(pack_zip(folder, tmp_path / "pets.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 200  # "version needed to extract", in the central directory
    (tmp_path / "pets.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"pets\.zip is damaged or no archive: zip file version 20\.0"):
        open_source(str(tmp_path / "pets.zip")).listing()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
@pytest.mark.parametrize("magic", [b"ustar  \0", bytes(8)])
def test_a_tar_of_impossible_sizes_is_named(tmp_path: Path, kind: bytes, magic: bytes) -> None:
    entry = tarfile.TarInfo("cat/1.png")
    entry.type, entry.size = kind, 1 << 70
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[257:265], header[148:156] = magic, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "pets.tar").write_bytes(bytes(header) + bytes(2048))
    with pytest.raises(ValueError, match=r"pets\.tar is (damaged|no source)"):
        open_source(str(tmp_path / "pets.tar")).listing()


def test_a_file_without_a_name_in_a_tar_is_passed_over(folder: Path, tmp_path: Path) -> None:
    file = pack_tar(folder, tmp_path / "pets.tar")
    before = open_source(str(file)).listing()
    with tarfile.open(file, "a") as archive:
        archive.addfile(tarfile.TarInfo("/"))
    listing = open_source(str(file)).listing()
    assert listing.items == before.items
    assert len(listing.ignored) == len(before.ignored) + 1


def test_links_in_a_tar_are_rejected_by_name(folder: Path, tmp_path: Path) -> None:
    file = pack_tar(folder, tmp_path / "pets.tar")
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("pets/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
        archive.addfile(link)
    source = open_source(str(file))
    [item] = [item for item in source.listing().items if item.source.endswith("link.png")]
    with pytest.raises(ValueError, match=r"it is a link to \.\./\.\./\.\./etc/passwd, which the archive does not hold"):
        source.open(item)


def test_a_compressed_tar_without_its_end_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = pack_tar(folder, tmp_path / "pets.tar").read_bytes().rstrip(b"\0")
    plain += bytes(-len(plain) % 512)  # the last file is whole, the end mark is missing
    (tmp_path / "pets.tar.gz").write_bytes(gzip.compress(plain))
    source = open_source(str(tmp_path / "pets.tar.gz"))
    assert len(source.listing().items) == 3
    with pytest.raises(ValueError, match=r"staged\.tar is damaged"):
        source.staged(tmp_path / "staged.tar", source.listing().items)


def test_linked_folders_are_read_and_loops_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(folder / name)
    (folder / "cat" / "loop").symlink_to(folder / "cat")
    assert layout(open_source(str(tmp_path / "linked"))) == PETS


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, compress: bool) -> None:
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
        name = f"{part}-{kind}-ubyte"
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path: Path, compress: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    write_idx(tmp_path, "train", images, labels, compress)
    with pytest.raises(FileNotFoundError, match="lacks t10k-labels-idx1-ubyte"):
        open_source(str(tmp_path)).listing()
    write_idx(tmp_path, "t10k", images[:2], labels[:2], compress)
    source = open_source(str(tmp_path))
    listing = source.listing()
    assert listing.classes == tuple("0123456789")
    assert [(item.split, item.label) for item in listing.items] == [
        *(("train", label) for label in labels.tolist()),
        ("val", 3),
        ("val", 1),
    ]
    picture, _ = source.open(listing.items[4])
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), images[4])


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    images = np.zeros((4, 28, 28), dtype=np.uint8)
    write_idx(tmp_path, "train", images, np.zeros(4, dtype=np.uint8), compress=False)
    file = tmp_path / "train-images-idx3-ubyte"
    content = file.read_bytes()
    for damaged, message in (
        (content[:-1], r"says \[4, 28, 28\] of itself but has 3,151 bytes"),
        (content[:10], r"says \[4\] of itself"),
        (b"", "magic number is missing, not 2051"),
        (b"\x00\x00\x08\x01" + content[4:], "magic number is 2049, not 2051"),
        (gzip.compress(content), "magic number is"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_idx(file, 3)
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(content[:16] + os.urandom(4 * 28 * 28))[:300])
    with pytest.raises(ValueError, match="no intact gzip file"):
        read_idx(packed, 3)
    packed.write_bytes(
        gzip.compress(content + bytes(100_000_000), 1)
    )  # it says 3,152 bytes of itself: no more are unpacked
    tracemalloc.start()
    with pytest.raises(ValueError, match="has 3,153 bytes or more"):
        read_idx(packed, 3)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_idx_counts_and_labels_must_agree(tmp_path: Path) -> None:
    images = np.zeros((4, 28, 28), dtype=np.uint8)
    write_idx(tmp_path, "t10k", images, np.zeros(4, dtype=np.uint8), compress=True)
    write_idx(tmp_path, "train", images, np.array([0, 1, 2], dtype=np.uint8), compress=True)
    with pytest.raises(ValueError, match="train has 4 images and 3 labels"):
        open_source(str(tmp_path)).listing()
    write_idx(tmp_path, "train", images, np.array([0, 1, 2, 10], dtype=np.uint8), compress=True)
    with pytest.raises(ValueError, match="labels up to 10"):
        open_source(str(tmp_path)).listing()


def recipe(size: int, channels: int = 3, crop: Crop = "center") -> Preprocessing:
    return Preprocessing(size, channels, Encoding("png", None, None, crop=crop))


def apply(picture: Image.Image, recipe: Preprocessing) -> np.ndarray:
    return np.asarray(decode_picture(recipe.apply(picture)))


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert with_channels(clear, 3).getpixel((0, 0)) == (255, 255, 255)
    assert with_channels(half, 3).getpixel((0, 0)) == (127, 127, 127)
    assert with_channels(palette, 1).getpixel((0, 0)) == 255


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    encoded = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)).save(encoded, "PNG")
    picture = decode_picture(encoded.getvalue())
    assert np.asarray(with_channels(picture, 1)).tolist() == [[0, 100], [200, 255]]
    assert np.asarray(with_channels(picture, 3)).shape == (2, 2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "RGBA", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_has_the_channels_asked_for(mode: str, channels: int) -> None:
    picture = with_channels(Image.new("RGB", (2, 2), "white").convert(mode), channels)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    assert np.all(np.asarray(picture) == 255)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        with_channels(Image.new("F", (2, 2)), 3)


def test_orientation_of_the_camera_is_applied() -> None:
    upright = np.zeros((4, 4), dtype=np.uint8)
    upright[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90° clockwise to see it upright
    encoded = io.BytesIO()
    Image.fromarray(np.rot90(upright)).save(encoded, "PNG", exif=exif)
    assert np.array_equal(apply(decode_picture(encoded.getvalue()), recipe(4, channels=1)), upright)


def test_pictures_that_are_not_square() -> None:
    wide = np.repeat(np.array([[1, 1, 2, 3, 4, 5, 5]], dtype=np.uint8), 4, axis=0)
    picture = Image.fromarray(wide)
    assert apply(picture, recipe(4, channels=1)).tolist() == [[1, 2, 3, 4]] * 4
    padded = apply(picture, recipe(7, channels=1, crop="pad"))
    assert padded[3].tolist() == wide[0].tolist()
    assert padded[0].tolist() == padded[6].tolist() == [0] * 7
    with pytest.raises(ValueError, match="7×4, not square; choose --crop"):
        apply(picture, recipe(4, crop="none"))


def test_shrinking_is_antialiased() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    small = apply(Image.fromarray(checks.astype(np.uint8)), recipe(16, channels=1))
    assert small.min() > 120
    assert small.max() < 135


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_nothing_but_pixels_is_kept(image_format: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(encoded, "JPEG", exif=exif, icc_profile=profile, comment=b"SECRET")
    encoding = Encoding(image_format, None if image_format == "png" else 95, None)
    content = Preprocessing(8, 3, encoding).apply(decode_picture(encoded.getvalue()))
    assert b"SECRET" not in content
    assert decode_picture(content).info.keys().isdisjoint({"exif", "icc_profile", "comment"})


def test_jpeg_keeps_the_full_resolution_of_colour() -> None:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    sizes = {}
    for quality in (50, 95):
        encoded = Preprocessing(16, 3, Encoding(quality=quality)).apply(colours)
        picture = Image.open(io.BytesIO(encoded))
        assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3
        sizes[quality] = np.abs(np.asarray(picture).astype(int) - np.asarray(colours)).mean()
    assert sizes[95] < sizes[50] < 60


def test_files_without_an_end_or_a_beginning_are_rejected_one_by_one(tmp_path: Path) -> None:
    write_image(tmp_path / "pets" / "good.png")
    os.mkfifo(tmp_path / "pets" / "pipe.png")
    (tmp_path / "pets" / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "pets" / "empty.png").write_bytes(b"")
    with (tmp_path / "pets" / "huge.png").open("wb") as file:
        file.truncate(2 << 30)  # no block of it is on the disk
    source = open_source(str(tmp_path / "pets"))
    reasons = {}
    for item in source.listing().items:
        try:
            source.open(item)
        except ValueError as error:
            reasons[item.source] = str(error)
    assert reasons == {
        "broken.png": "it is no file, or a link to none",
        "empty.png": "it is empty",
        "huge.png": "it has 2,147,483,648 bytes, more than 1,073,741,824",
        "pipe.png": "it is no file, or a link to none",
    }


@pytest.mark.parametrize("side", [9_500, 14_000])
def test_small_files_of_huge_pictures_are_refused_before_they_are_unpacked(side: int) -> None:
    encoded = io.BytesIO()
    Image.new("1", (side, side)).save(encoded, "PNG")
    assert len(encoded.getvalue()) < 30_000
    with pytest.raises(ValueError, match="more than 89,478,485 pixels"):
        decode_picture(encoded.getvalue())
    with pytest.raises(ValueError, match="it is 1×9500, which padding would make more than"):
        recipe(4, crop="pad").apply(Image.new("L", (1, 9500)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_truncated_files_of_every_format_are_refused(image_format: str) -> None:
    encoded = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(encoded, image_format)
    for kept in (0.1, 0.5, 0.8):
        with pytest.raises(UNREADABLE):
            decode_picture(encoded.getvalue()[: int(len(encoded.getvalue()) * kept)])


def test_files_that_are_no_images_say_so_without_an_address_in_memory() -> None:
    with pytest.raises(ValueError, match="it is none of JPEG, PNG"):
        decode_picture(b"not an image")


def test_a_folder_that_cannot_be_listed_is_not_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"pets/dog cannot be listed: Permission denied; make it readable"):
        open_source(str(folder)).listing()
