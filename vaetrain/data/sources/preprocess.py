"""From an original in any format and shape to the encoded square image that goes into a shard."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vaetrain.data.format.jpeg import simplejpeg
from vaetrain.data.format.manifest import Encoding

# Named, because Pillow would also open formats that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)

# What Pillow raises for files that are damaged or no images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
# What its readers stumble into, besides, over numbers in such files that cannot be.
STUMBLES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
# A file of some kilobytes can claim any size. These many are 0.3 GB as RGB in memory.
assert Image.MAX_IMAGE_PIXELS is not None
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Preprocessing:
    """How to make an original into a training image."""

    size: int
    """Height and width of the result, in pixels."""

    channels: int
    """3 for RGB, 1 for grayscale."""

    encoding: Encoding
    """File format, quality and crop."""

    def apply(self, picture: Image.Image) -> bytes:
        """The encoded image; raises ValueError for a picture that the recipe does not cover."""
        return self.encode(self.prepare(picture))

    def prepare(self, original: Image.Image) -> Image.Image:
        """The pixels to encode, and nothing else of the picture; raises ValueError for one that the recipe does not cover.

        Each of Pillow's own steps would copy a picture even where there is nothing to do, a quarter of the time of 512→128.
        """
        picture = with_channels(_upright(original), self.channels)
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


def decode_picture(content: bytes) -> Image.Image:
    """The pixels of an image file; raises one of UNREADABLE when it is damaged, not of FORMATS, or has over MAX_PIXELS."""
    if not content:
        raise ValueError("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself gives up at twice as many
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
            if picture.format == "JPEG" and picture.mode in ("L", "RGB"):
                return _decode_jpeg(content, picture)
            picture.load()
    except UnidentifiedImageError as error:  # whose own message is a memory address
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels; shrink it first") from error
    except STUMBLES as error:
        raise ValueError(f"it is damaged: {error!r}") from error
    return picture


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


def _upright(picture: Image.Image) -> Image.Image:
    try:
        is_turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if is_turned else picture
    except STUMBLES as error:
        raise ValueError(f"its EXIF data are damaged: {error!r}") from error


def with_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A picture of any mode as 8-bit RGB or grayscale, transparent parts over white; raises ValueError for float pixels."""
    if picture.mode.startswith("I"):
        wide = np.asarray(picture)  # Pillow's own conversion clips at 255
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its 32-bit pixels go beyond 16 bits, so what is white in them is unknown")
        wide = wide.astype(np.uint32)  # enough for 65535 · 255, and half of what Python's own integers would take
        wide *= 255
        wide += 32767
        wide //= 65535
        picture = Image.fromarray(wide.astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("it has floating-point pixels, so what is white in them is unknown")
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)
