"""Encoded bytes to pixels: every format, by every decoder that may be installed."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaetrain.data.format import decode
from vaetrain.data.format.decode import decode_into


@pytest.fixture(params=["simplejpeg", "torchvision"])
def jpeg_decoder(request, monkeypatch):
    if request.param == "torchvision":
        monkeypatch.setattr(decode, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg", reason="an optional extra: pip install vaetrain[fast]")


def encoded(file_format: str, pixels: np.ndarray, mode: str = "RGB", **how) -> bytearray:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, file_format, **how)
    return bytearray(file.getvalue())


def gradient() -> np.ndarray:
    return (np.add.outer(np.arange(0, 160, 10), np.arange(0, 80, 5))[..., None] + [0, 10, 20]).astype(np.uint8)


def noise(size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", [{"subsampling": "4:4:4"}, {"subsampling": "4:2:0"}, {"progressive": True}])
def test_jpegs_decode_to_pillow_s_pixels(channels, how):
    mode = "L" if channels == 1 else "RGB"
    content = encoded("JPEG", gradient(), mode, **how)
    out = np.empty((16, 16, channels), dtype=np.uint8)
    decode_into(content, out)
    assert np.array_equal(out, np.asarray(Image.open(io.BytesIO(content))).reshape(out.shape))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_other_formats_decode_to_pillow_s_pixels(file_format, channels):
    mode = "L" if channels == 1 else "RGB"
    content = encoded(file_format, gradient(), mode)
    out = np.empty((16, 16, channels), dtype=np.uint8)
    decode_into(content, out)
    assert np.array_equal(out, np.asarray(Image.open(io.BytesIO(content)).convert(mode)).reshape(out.shape))


@pytest.mark.usefixtures("jpeg_decoder")
def test_a_batch_is_written_in_place_and_nowhere_else():
    batch = np.full((3, 16, 16, 3), 7, dtype=np.uint8)
    decode_into(encoded("JPEG", noise()), batch[1])
    assert (batch[[0, 2]] == 7).all()
    assert not (batch[1] == 7).all()


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@given(data=st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_are_an_error_or_pixels_but_never_end_the_process(file_format, data):
    # One wrong byte in a PNG is enough for torchvision's decoder to end the process.
    content = encoded(file_format, noise())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        content[at] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):
        decode_into(content, np.empty((16, 16, 3), dtype=np.uint8))


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_bytes_are_an_error(file_format):
    content = encoded(file_format, noise(64))
    for length in range(0, len(content) * 3 // 4, 97):
        with pytest.raises(ValueError, match=r"not a readable|pixels, not"):
            decode_into(content[:length], np.empty((64, 64, 3), dtype=np.uint8))


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_another_size_than_the_manifest_s_is_an_error(file_format):
    with pytest.raises(ValueError, match="16×16 pixels, not 8×16 as the manifest says"):
        decode_into(encoded(file_format, noise()), np.empty((16, 8, 3), dtype=np.uint8))


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("before", [b"", b"garbage", b"\xff\xd0", b"\xff\xff\xff"])
def test_jpegs_that_claim_to_be_huge_are_never_decoded(before):
    content = encoded("JPEG", noise())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xdc" * 2
    content[frame:frame] = before
    with pytest.raises(ValueError, match=r"65500×65500 pixels, not 16×16|extraneous bytes"):
        decode_into(content, np.empty((16, 16, 3), dtype=np.uint8))


def test_what_is_no_image_is_said_without_an_address():
    with pytest.raises(ValueError, match=r"it begins as none of JPEG, PNG, WebP$"):
        decode_into(bytes(100), np.empty((8, 8, 3), np.uint8))


def test_a_png_of_16_bits_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), dtype=np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="16 bits"):
        decode_into(bytearray(file.getvalue()), np.empty((16, 16, 1), dtype=np.uint8))
