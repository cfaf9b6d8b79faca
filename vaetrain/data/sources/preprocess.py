"""From an original in any format and shape to the encoded square image that goes into a shard."""

from __future__ import annotations

import importlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vaetrain.data.format.jpeg import JPEG_SIGNATURE, refuse_many_scans, simplejpeg
from vaetrain.data.format.manifest import Encoding
from vaetrain.data.sources.file_kind import HEAD_BYTES, kind_of

# Named, because Pillow would also open formats that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# What some Pillow or a plugin reads: kind of file → Pillow's name of the format, and the module that adds it.
MORE_FORMATS = {
    "AVIF": ("AVIF", None), "JPEG 2000": ("JPEG2000", None), "HEIC": ("HEIF", "pillow_heif"), "JPEG XL": ("JXL", "pillow_jxl"),
}  # fmt: skip
SUFFIXES = frozenset(
    [
        ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif",
        ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c",
        ".jpf", ".jpx", ".jxl",
    ]
)  # fmt: skip
RAW_SUFFIXES = frozenset(
    [
        ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f",
        ".3fr", ".iiq",
    ]
)  # fmt: skip
PICTURE_SUFFIXES = SUFFIXES | RAW_SUFFIXES | {".dcm"}
"""Files that are listed as pictures: those that are not read are rejected, and counted."""
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
"""Formats whose files may hold several pictures. (The second one in a camera's JPEG is a small form of the first.)"""
SMALL_FORM_OR_MASK = 0b101
"""Bits of a TIFF page's NewSubfileType."""
COLOUR_16_BIT, NUM_FRAMES = "16-bit colour", "number of frames"
"""Keys of what decode_picture notes in a picture's `info`."""

# What Pillow raises for files that are damaged or no images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
# What its readers stumble into, besides, over numbers in such files that cannot be.
STUMBLES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
# A file of some kilobytes can claim any size. These many are 0.3 GB as RGB in memory.
assert Image.MAX_IMAGE_PIXELS is not None
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
MAX_FILE_BYTES = 1 << 30
MAX_FRAMES = 10_000
"""A PNG of a hundred bytes can claim two thousand million."""


@dataclass(frozen=True)
class Preprocessing:
    """How to make an original into a training image."""

    size: int
    """Height and width of the result, in pixels."""

    channels: int
    """3 for RGB, 1 for grayscale."""

    encoding: Encoding
    """File format, quality and crop."""

    white: float | None = None
    """Value of white in pixels of more than 8 bits; None: 65535 in 16 bits, and others are not covered."""

    def apply(self, picture: Image.Image) -> bytes:
        """The encoded image; raises ValueError for a picture that the recipe does not cover."""
        return self.encode(self.prepare(picture))

    def prepare(self, original: Image.Image) -> Image.Image:
        """The pixels to encode, and nothing else of the picture; raises ValueError for one that the recipe does not cover.

        Each of Pillow's own steps would copy a picture even where there is nothing to do, a quarter of the time of 512→128.
        """
        if self.white is not None and original.info.get(COLOUR_16_BIT):
            raise ValueError(
                "Pillow keeps the upper 8 of its 16-bit colours, so --white comes too late; make it 8-bit first"
            )
        picture = with_channels(upright(original), self.channels, self.white)
        width, height = picture.size
        if width != height:
            picture = self._square(picture)
        if picture.width != self.size:
            picture = picture.resize((self.size, self.size), Image.Resampling.LANCZOS)
        elif picture is original:
            picture = picture.copy()
        # Pillow copies comments, colour profiles and EXIF (where was this cat photographed?) unless they are gone.
        picture.info = {}
        return picture

    def encode(self, picture: Image.Image) -> bytes:
        """The file of a prepared picture."""
        encoded = io.BytesIO()
        match self.encoding.format:
            case "jpg":
                picture.save(encoded, "JPEG", quality=self.encoding.quality, subsampling=0)
            case "webp":
                picture.save(encoded, "WEBP", quality=self.encoding.quality)
            case "png":
                picture.save(encoded, "PNG")
        return encoded.getvalue()

    def _square(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        if self.encoding.crop == "none":
            raise ValueError(f"it is {width}×{height}, not square; choose --crop center or --crop pad")
        if self.encoding.crop == "center":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            return picture.crop((left, top, left + side, top + side))
        if max(width, height) ** 2 > MAX_PIXELS:
            raise ValueError(f"it is {width}×{height}, which padding would make more than {MAX_PIXELS:,} pixels")
        return ImageOps.pad(picture, (max(width, height),) * 2, color=0)


def decode_picture(content: bytes, frame: int = 0) -> Image.Image:
    """The pixels of an image file, or of one frame of it; raises one of UNREADABLE when it is damaged, not of FORMATS or
    MORE_FORMATS, or has over MAX_PIXELS."""
    if not content:
        raise ValueError("it is empty")
    if content.startswith(JPEG_SIGNATURE):
        refuse_many_scans(content)
    kind = kind_of(content[:HEAD_BYTES])
    formats = (_more_format(kind),) if kind in MORE_FORMATS else FORMATS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself gives up at twice as many
            picture = Image.open(io.BytesIO(content), formats=formats)
            if picture.format == "JPEG" and picture.mode in ("L", "RGB"):
                return _decode_jpeg(content, picture)
            frames = frames_in(content) if getattr(picture, "is_animated", False) and _num_frames(picture) else (0,)
            if frame:
                picture.seek(frame)
            is_deep = not picture.mode.startswith(("I", "F")) and any(";16" in str(tile) for tile in picture.tile)
            picture.load()
            picture.info |= {NUM_FRAMES: len(frames), COLOUR_16_BIT: is_deep}
    except UnidentifiedImageError as error:  # whose own message is a memory address
        if kind in MORE_FORMATS:
            raise ValueError(f"it begins as {kind} does, and is damaged") from error
        what = f"it is {kind}, " if kind and kind.upper() not in FORMATS else "it is "
        raise ValueError(f"{what}none of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels; shrink it first") from error
    except STUMBLES as error:
        raise ValueError(f"it is damaged: {error!r}") from error
    return picture


def suffix_of(name: str) -> str:
    """A file name's suffix in lower case."""
    return PurePosixPath(name).suffix.lower()


def refuse_unread(name: str) -> None:
    """Raise ValueError for a picture in a format that is not read, though Pillow might find some small form of it inside."""
    suffix = suffix_of(name)
    if suffix in RAW_SUFFIXES:
        raise ValueError(f"it is a camera's raw file ({suffix}), which is not read; convert it to JPEG, PNG or TIFF")
    if suffix == ".dcm":
        raise ValueError(
            "it is DICOM, which is not read; convert it to PNG or TIFF (and say its white level with --white)"
        )


def frames_in(content: bytes) -> tuple[int, ...]:
    """Numbers of the pictures in a file, without the small forms and masks among a TIFF's pages; (0,) for one that is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            formats = ("AVIF",) if kind_of(content[:HEAD_BYTES]) == "AVIF" else FORMATS
            picture = Image.open(io.BytesIO(content), formats=formats)
            frames = tuple(range(_num_frames(picture))) if picture.format in ANIMATED else (0,)
            if picture.format == "TIFF" and len(frames) > 1:
                frames = tuple(frame for frame in frames if not _subfile_type(picture, frame) & SMALL_FORM_OR_MASK)
    except (*UNREADABLE, *STUMBLES, Image.DecompressionBombError):
        return (0,)
    return frames or (0,)


def _num_frames(picture: Image.Image) -> int:
    count: int = getattr(picture, "n_frames", 1)
    if count > MAX_FRAMES:
        raise ValueError(f"it says that it has {count:,} pictures, and {MAX_FRAMES:,} are read at most")
    return count


def _subfile_type(picture: Image.Image, frame: int) -> int:
    picture.seek(frame)
    return int(picture.tag_v2.get(254, 0))  # type: ignore[attr-defined]


def brightest(picture: Image.Image) -> int | None:
    """The largest value of a picture of more than 8 bits, of 65535; None for others."""
    if picture.mode.startswith("I"):
        return int(np.asarray(picture).max())
    if picture.info.get(COLOUR_16_BIT):
        return 257 * int(np.asarray(picture.convert("RGB")).max())
    return None


@lru_cache
def _more_format(kind: str) -> str:
    name, module = MORE_FORMATS[kind]
    Image.init()
    if module is not None:
        try:
            plugin = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"it is {kind}, which Pillow alone does not read; pip install 'vaetrain[photos]', or convert it to JPEG"
            ) from error
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
    if name not in Image.OPEN:
        raise ValueError(f"it is {kind}, which this Pillow does not read; update Pillow, or convert it to JPEG")
    return name


def _decode_jpeg(content: bytes, opened: ImageFile.ImageFile) -> Image.Image:
    """The pixels of a JPEG; raises ValueError where libjpeg warns of missing or damaged data, which Pillow alone takes for grey.

    It warns where the code that follows makes no sense, so not of every wrong byte. Without simplejpeg, Pillow decodes to the
    same pixels, and such files go unnoticed.
    """
    if simplejpeg is None:
        opened.load()
        return opened
    try:
        pixels = simplejpeg.decode_jpeg(content, "GRAY" if opened.mode == "L" else "RGB", strict=True)
    except ValueError as error:
        raise ValueError(f"it is damaged or truncated: {error}") from error
    picture = Image.fromarray(pixels[..., 0] if opened.mode == "L" else pixels)
    picture.info = opened.info  # which way is up
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF data say; raises ValueError where those are damaged."""
    try:
        is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if is_turned else picture
    except STUMBLES as error:
        raise ValueError(f"its EXIF data are damaged: {error!r}") from error


def with_channels(picture: Image.Image, channels: int, white: float | None = None) -> Image.Image:
    """A picture of any mode as 8-bit RGB or grayscale, transparent parts over white.

    `white` is the value of white in pixels of 16 or 32 bits; without it, raises ValueError for those beyond 65535 and for floats.
    """
    if white is not None and picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are no numbers")
        picture = Image.fromarray((np.clip(values / white, 0, 1) * 255 + 0.5).astype(np.uint8))
    elif picture.mode.startswith("I"):
        wide = np.asarray(picture)  # Pillow's own conversion clips at 255
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(
                "its 32-bit pixels go beyond 16 bits, so what is white in them is unknown; say it with --white"
            )
        wide = wide.astype(np.uint32)  # enough for 65535 · 255, and half of what Python's own integers would take
        wide *= 255
        wide += 32767
        wide //= 65535
        picture = Image.fromarray(wide.astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("it has floating-point pixels, so what is white in them is unknown; say it with --white")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)
