"""What small files of strangers may take of memory, disk and time: docs/reliability.md has the bounds."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaetrain.data.format.decode import decode_into
from vaetrain.data.format.jpeg import MAX_SCANS
from vaetrain.data.format.tar_headers import MAX_HEADER_BYTES
from vaetrain.data.sources import archives
from vaetrain.data.sources.archives import CompressedTar, ImageZip
from vaetrain.data.sources.class_folders import Member
from vaetrain.data.sources.open_source import open_source
from vaetrain.data.sources.preprocess import decode_picture, frames_in
from vaetrain.sampling.sample_set import images_in

MIB = 1 << 20


def image(image_format: str = "PNG", size: int = 8, **options: object) -> bytes:
    encoded = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").save(encoded, image_format, **options)
    return encoded.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """512 bytes with a checksum that holds."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header: each record with its own length before it."""
    content = b""
    for key, value in records:
        body = f" {key}={value}\n".encode()
        length = len(body) + next(digits for digits in range(1, 12) if len(str(len(body) + digits)) == digits)
        content += str(length).encode() + body
    return header("x", len(content), kind) + padded(content)


PICTURE = header("cat/1.png", len(image())) + padded(image())
END = bytes(1024)


@contextmanager
def memory_below(num_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


def listed(file: Path) -> list[str]:
    return [item.source for item in open_source(str(file)).listing().items]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: header("x", 40 * MIB, tarfile.GNUTYPE_LONGNAME) + b"a" * 40 * MIB, "a header has more than 1,048,576"),
        (lambda: header("x", 40 * MIB, tarfile.GNUTYPE_LONGLINK) + b"a" * 40 * MIB, "a header has more than 1,048,576"),
        (lambda: pax(("path", "a" * 40 * MIB)), "a header has more than 1,048,576"),
        (lambda: pax(("comment", "a" * 600_000), kind=tarfile.XGLTYPE) * 2, "a header has more than 1,048,576"),
        (lambda: header("a.png", 2**40, tarfile.GNUTYPE_SPARSE), "sparse"),
        (lambda: pax(("GNU.sparse.map", "0,1"), ("GNU.sparse.size", str(2**40))), "sparse"),
        (
            lambda: pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", str(2**40))),
            "sparse",
        ),
    ],
    ids=["long name", "long link", "PAX", "global PAX", "sparse", "sparse 0.1", "sparse 1.0"],
)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_headers_are_bounded(content: Callable[[], bytes], told: str, suffix: str, tmp_path: Path) -> None:
    """40 MiB of header are 40 KB of a compressed tar."""
    file, whole = tmp_path / f"a{suffix}", content() + PICTURE + END
    file.write_bytes(whole if suffix == ".tar" else gzip.compress(whole, 1))
    del whole
    with memory_below(16 * MIB), pytest.raises(ValueError, match=rf"a\{suffix} is damaged or no archive: .*{told}"):
        listed(file)
    if suffix == ".tar":
        assert images_in(file) is None


@pytest.mark.parametrize("size", ["9" * 30, "-512"])
def test_an_extended_size_that_no_file_has_is_a_sentence(tmp_path: Path, size: str) -> None:
    (tmp_path / "a.tar").write_bytes(PICTURE + pax(("size", size)) + PICTURE + END)
    with pytest.raises(ValueError, match=r"a\.tar is damaged or no archive"):
        listed(tmp_path / "a.tar")
    assert images_in(tmp_path / "a.tar") is None


def test_a_size_that_no_file_has_is_a_sentence(tmp_path: Path) -> None:
    content = bytearray(header("cat/1.png", 0))
    content[124:136] = b"\x80" + b"\x7f" * 11  # 88 bits
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    (tmp_path / "a.tar").write_bytes(PICTURE + bytes(content) + PICTURE + END)
    with pytest.raises(ValueError, match=r"a\.tar is damaged or no archive"):
        listed(tmp_path / "a.tar")
    assert images_in(tmp_path / "a.tar") is None


def test_members_do_not_each_keep_all_global_headers(tmp_path: Path) -> None:
    records = [(f"k{number}", "v") for number in range(50_000)]
    content = pax(*records, kind=tarfile.XGLTYPE) + PICTURE * 200 + END
    assert len(content) < MAX_HEADER_BYTES
    (tmp_path / "a.tar").write_bytes(content)
    with memory_below(64 * MIB):
        assert listed(tmp_path / "a.tar") == ["cat/1.png"]


def test_long_names_and_small_headers_are_read(tmp_path: Path) -> None:
    long = f"{'cat' * 60}/1.png"
    content = pax(("path", long)) + PICTURE + pax(("comment", "x"), kind=tarfile.XGLTYPE) + PICTURE + END
    (tmp_path / "a.tar").write_bytes(content)
    assert sorted(listed(tmp_path / "a.tar")) == ["cat/1.png", long]


def test_a_compressed_tar_becomes_a_hundred_times_as_large_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = PICTURE + header("cat/2.png", 30 * MIB) + bytes(30 * MIB) + END
    file = tmp_path / "a.tar.gz"
    file.write_bytes(gzip.compress(content))
    assert len(listed(file)) == 2  # up to a gibibyte whatever the ratio
    monkeypatch.setattr(archives, "ALWAYS_UNPACKED_BYTES", MIB)
    with pytest.raises(ValueError, match=r"a.tar.gz .*becomes larger than [\d,]+ bytes; unpack it yourself"):
        listed(file)
    with pytest.raises(ValueError, match="becomes larger than"):
        CompressedTar(file).staged(tmp_path / "staged", [])
    assert (tmp_path / "staged").stat().st_size <= 100 * file.stat().st_size


def test_members_of_a_zip_are_read_up_to_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", bytes(40 * MIB))
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 10 * MIB)
    [item] = open_source(str(file)).listing().items
    with memory_below(8 * MIB):
        assert list(ImageZip(file).peek([Member("cat/1.png", "cat/1.png", 40 * MIB)])) == [b""]
        with pytest.raises(ValueError, match="it has 41,943,040 bytes"):
            ImageZip(file).open(item)


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of some bytes, is there so often."""
    content = image("JPEG", 64, progressive=True)
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + last * count + content[-2:]


def test_a_jpeg_of_thousands_of_scans_is_not_decoded() -> None:
    """Each takes 30 ms of a picture of 4000×4000, where 31 bytes are enough for one."""
    for use in (decode_picture, lambda content: decode_into(content, np.empty((64, 64, 3), np.uint8))):
        use(with_scans(0))
        with pytest.raises(ValueError, match=f"more than {MAX_SCANS} scans"):
            use(with_scans(2000))


def test_scans_are_those_of_the_picture_alone() -> None:
    """Not of small forms of it among its metadata, nor of the video that some cameras put after it."""
    content = image("JPEG", 64, progressive=True)
    scans = b"\xff\xda" * 1000
    metadata = b"\xff\xe5" + struct.pack(">H", len(scans) + 2) + scans
    decode_into(content[:2] + metadata + content[2:] + scans, np.empty((64, 64, 3), np.uint8))


def test_a_png_that_claims_many_pictures_takes_no_memory() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    content = image()
    claimed = content[:33] + chunk(b"acTL", struct.pack(">II", 5_000_000, 0)) + content[33:]
    with memory_below(8 * MIB):
        assert frames_in(claimed) == (0,)
        with pytest.raises(ValueError, match="pictures, and 10,000 are read at most"):
            decode_picture(claimed)
