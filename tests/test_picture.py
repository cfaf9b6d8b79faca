"""Little files of every kind, through the whole command."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from test_make_shards import decoded, make, records
from vaetrain import progress_bar
from vaetrain.data.format.manifest import Encoding
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.sharding.make_shards import closing_line
from vaetrain.data.sources.preprocess import Preprocessing, decode_picture, simplejpeg
from vaetrain.progress_bar import ProgressBar

SIDE = 16


def ramp() -> np.ndarray:
    """A picture that tells all orientations and channels apart, smooth enough for JPEG."""
    y, x = np.mgrid[:SIDE, :SIDE] * 15
    return np.stack([x, y, (x + y) // 2], axis=2).astype(np.uint8)


def sharded(folder: Path, out: Path, **options: object) -> dict[str, np.ndarray]:
    """The pixels that the files of a folder became."""
    make(folder, out, **{"size": SIDE, "format": "png"} | options)
    sources = [record["source"] for record in records(out, "train")]
    return {source: np.asarray(picture) for source, picture in zip(sources, decoded(out), strict=True)}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_all_orientations_of_a_camera(tmp_path: Path, suffix: str) -> None:
    upright = Image.fromarray(ramp())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    (tmp_path / "pets").mkdir()
    for orientation in range(1, 9):
        stored = upright.transpose(undo[orientation]) if orientation in undo else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = (
            {"lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
        )
        stored.save(tmp_path / "pets" / f"{orientation}{suffix}", exif=exif, **options)
    found = sharded(tmp_path / "pets", tmp_path / "out")
    assert len(found) == 8
    for name, pixels in found.items():
        assert np.abs(pixels.astype(int) - ramp()).max() <= (6 if suffix == ".jpg" else 0), name


def test_every_kind_of_pixel(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    colour = Image.fromarray(ramp())
    gray = colour.convert("L")
    left_half = Image.fromarray(np.repeat([[255] * (SIDE // 2) + [0] * (SIDE // 2)], SIDE, axis=0).astype(np.uint8))
    wide = np.asarray(gray).astype(np.uint16) * 257
    expected = {}

    def add(name: str, picture: Image.Image, pixels: Image.Image, **options: object) -> None:
        picture.save(folder / name, **options)
        expected[name] = np.asarray(pixels.convert("RGB")).astype(int)

    add("rgb.bmp", colour, colour)
    add("gray.png", gray, gray)
    add("gray.jpg", gray, gray, quality=100)
    add("gray.pgm", gray, gray)
    add("bit.png", gray.convert("1"), gray.convert("1"))
    add("bit.tif", gray.convert("1"), gray.convert("1"))
    add("palette.png", colour.quantize(64), colour.quantize(64))
    add("palette.gif", gray.quantize(256), gray.quantize(256))
    cmyk = colour.convert("CMYK")
    add("cmyk.tif", cmyk, cmyk)
    add("cmyk.jpg", cmyk, cmyk, quality=100, subsampling=0)
    add("wide.png", Image.fromarray(wide), gray)
    add("wide.tif", Image.fromarray(wide), gray)
    add("wide-big-endian.tif", Image.frombytes("I;16B", gray.size, wide.astype(">u2").tobytes()), gray)
    white = Image.new("RGB", gray.size, "white")
    over_white = Image.composite(colour, white, left_half)
    colour_alpha, gray_alpha = colour.copy(), gray.convert("LA")
    colour_alpha.putalpha(left_half)
    gray_alpha.putalpha(left_half)
    add("rgba.png", colour_alpha, over_white)
    add("rgba.webp", colour_alpha, over_white, lossless=True)
    add("rgba.tif", colour_alpha, over_white)
    add("la.png", gray_alpha, Image.composite(gray.convert("RGB"), white, left_half))
    see_through = Image.fromarray(np.asarray(left_half) // 255, mode=None)
    see_through.putpalette([255, 0, 0, 0, 0, 255])
    add(
        "palette-transparent.png",
        see_through,
        Image.composite(Image.new("RGB", gray.size, "blue"), white, left_half),
        transparency=0,
    )
    add(
        "palette-transparent.gif",
        see_through,
        Image.composite(Image.new("RGB", gray.size, "blue"), white, left_half),
        transparency=0,
    )

    found = sharded(folder, tmp_path / "out")
    assert found.keys() == expected.keys()
    lossy = {"cmyk.jpg": 9, "gray.jpg": 2}
    for name, pixels in found.items():
        assert np.abs(pixels - expected[name]).max() <= lossy.get(name, 0), name
    as_gray = sharded(folder, tmp_path / "gray", gray=True)
    assert {pixels.shape for pixels in as_gray.values()} == {(SIDE, SIDE)}
    assert np.array_equal(as_gray["wide.png"], np.asarray(gray))


def test_everything_that_is_no_image_is_listed_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    Image.fromarray(ramp()).save(folder / "good.png")
    whole = {}
    for suffix in ("jpg", "png"):
        encoded = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(encoded, "JPEG" if suffix == "jpg" else "PNG")
        whole[suffix] = encoded.getvalue()
    (folder / "truncated.jpg").write_bytes(whole["jpg"][: len(whole["jpg"]) // 2])
    (folder / "truncated.png").write_bytes(whole["png"][:-500])
    corrupt = bytearray(whole["png"])
    corrupt[1000:1010] = bytes(10)
    (folder / "corrupt.png").write_bytes(corrupt)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    (folder / "archive.png").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(folder / "float.tif")
    (folder / "broken-link.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("no image by name")
    names = sorted(file.name for file in folder.iterdir() if file.suffix != ".txt" and file.name != "good.png")
    with pytest.raises(ValueError, match=rf"{len(names)} image\(s\) cannot be read.*--max-rejected {len(names)}"):
        make(folder, tmp_path / "out", size=SIDE, max_rejected=len(names) - 1)
    make(folder, tmp_path / "out", size=SIDE, max_rejected=len(names))
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    reasons = {rejected["source"]: rejected["reason"] for rejected in map(json.loads, lines)}
    assert sorted(reasons) == sorted([*names, "notes.txt"])  # listed, and not counted
    assert reasons["notes.txt"].startswith("no images")
    assert f"{len(names)} rejected, 1 ignored (1 that are no images), " in closing_line(
        tmp_path / "out", ShardSet.open(tmp_path / "out").manifest
    )
    assert all(reasons.values())
    none_of_them = "it is none of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM"
    assert reasons["postscript.jpg"] == none_of_them
    assert reasons["text.jpg"] == none_of_them.replace("it is", "it is a web page,")
    assert reasons["archive.png"] == none_of_them.replace("it is", "it is zip,")
    assert reasons["empty.jpg"] == "it is empty"
    assert reasons["bomb.png"].startswith("it has more than 89,478,485 pixels")
    assert "floating-point" in reasons["float.tif"]
    assert "truncated" in reasons["truncated.jpg"]
    assert "ignored 1 file(s) that are no images, such as notes.txt" in capsys.readouterr().err


def holed(content: bytes) -> bytes:
    """Forty bytes of the scan are zero, as from a disk that lost a block."""
    middle = len(content) // 2
    return content[:middle] + bytes(40) + content[middle + 40 :]


def ended_early(content: bytes) -> bytes:
    """Half of it, with a proper end."""
    return content[: len(content) // 2] + b"\xff\xd9"


@pytest.mark.skipif(simplejpeg is None, reason="without simplejpeg Pillow decodes these to grey")
@pytest.mark.parametrize("damage", [holed, ended_early])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_whose_data_are_damaged_is_no_training_image(damage, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(encoded, "JPEG", quality=90)
    assert decode_picture(encoded.getvalue()).mode == mode
    Image.open(io.BytesIO(damage(encoded.getvalue()))).load()  # Pillow sees nothing
    with pytest.raises(ValueError, match="it is damaged or truncated: "):
        decode_picture(damage(encoded.getvalue()))


@pytest.mark.skipif(simplejpeg is None, reason="compares simplejpeg with Pillow")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_both_decoders_of_originals_give_the_same_pixels_the_right_way_up(mode, subsampling):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    encoded, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).convert(mode).save(encoded, "JPEG", quality=90, subsampling=subsampling, exif=exif)
    ours, pillows = decode_picture(encoded.getvalue()), Image.open(encoded)
    assert np.array_equal(np.asarray(ours), np.asarray(pillows))
    recipe = Preprocessing(40, 3, Encoding("png", None, None, crop="center"))
    assert recipe.prepare(ours).tobytes() == recipe.prepare(pillows).tobytes()
    assert ours.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize("shape", [(SIDE, 3 * SIDE), (3 * SIDE, SIDE), (SIDE, SIDE)])
def test_crop_and_pad(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    (tmp_path / "pets").mkdir()
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "pets" / "0.png")
    top, left = ((side - SIDE) // 2 for side in shape)
    (central,) = sharded(tmp_path / "pets", tmp_path / "center").values()
    assert np.array_equal(central, pixels[top : top + SIDE, left : left + SIDE])
    (padded,) = sharded(tmp_path / "pets", tmp_path / "pad", size=max(shape), crop="pad").values()
    assert np.array_equal(padded, np.asarray(ImageOps.pad(picture, (max(shape),) * 2)))
    assert padded.sum(dtype=np.int64) == pixels.sum(dtype=np.int64)  # all of it, and black
    if shape[0] != shape[1]:
        with pytest.raises(ValueError, match=r"not square; choose --crop center or --crop pad"):
            make(tmp_path / "pets", tmp_path / "none", crop="none")


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("size", [16, 9])
def test_prepared_pictures_are_as_pillow_makes_them_by_hand(image_format: str, size: int) -> None:
    """Steps that would only copy are left out: the bytes must be those of the plain way."""
    content = io.BytesIO()
    Image.fromarray(ramp()).save(content, "JPEG", comment=b"SECRET")
    recipe = Preprocessing(size, 3, Encoding(image_format, None if image_format == "png" else 90, None))
    by_hand = Image.open(io.BytesIO(content.getvalue())).convert("RGB").crop((0, 0, SIDE, SIDE))
    if size != SIDE:
        by_hand = by_hand.resize((size, size), Image.Resampling.LANCZOS)
    by_hand.info = {}
    encoded = io.BytesIO()
    options = {"jpg": {"quality": 90, "subsampling": 0}, "png": {}, "webp": {"quality": 90}}[image_format]
    by_hand.save(encoded, {"jpg": "JPEG"}.get(image_format, image_format), **options)
    picture = decode_picture(content.getvalue())
    assert recipe.apply(picture) == encoded.getvalue()
    assert picture.info["comment"] == b"SECRET"  # the original is left as it was


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What each kind of work counts, at its end: when it speaks is progress_bar's own affair."""
    close = ProgressBar.close

    def telling(bar: ProgressBar, **options: bool) -> None:
        print(bar.line(), file=sys.stderr)
        close(bar, **options)

    monkeypatch.setattr(progress_bar, "SECONDS_TO_FIRST_LINE", 600)
    monkeypatch.setattr(ProgressBar, "close", telling)
    make("faces", tmp_path / "out", num_images=70, images_per_shard=40, val_count=10, group_duplicates=True)
    lines = [line.partition(" images, ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["looking for duplicates: 70 of 70", "sharding: 70 of 70"]


def test_progress_is_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress_bar, "SECONDS_TO_BAR", 0)
    make("faces", tmp_path / "out", num_images=9, images_per_shard=4)
    assert "sharding: 100%|" in capsys.readouterr().err
