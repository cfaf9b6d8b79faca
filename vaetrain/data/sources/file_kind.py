"""What a file is: by its first bytes, and, where many are listed, by their names."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

HEAD_BYTES = 512
MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (257, b"ustar", "tar"),  # first, for it begins with a file's name, which may be BMW
    (0, b"\x1f\x8b", "gzip"), (0, b"BZh", "bzip2"), (0, b"\xfd7zXZ\0", "xz"), (0, b"\x5d\0\0", "lzma"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"), (0, b"\x04\x22\x4d\x18", "lz4"), (0, b"\x1f\x9d", "compress (.Z)"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"), (0, b"Rar!", "RAR"), (0, b"PK\x03\x04", "zip"),
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\x89PNG", "PNG"), (0, b"GIF8", "GIF"), (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (8, b"WEBP", "WebP"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    (4, b"ftypcrx", "a camera's raw file"), (4, b"ftyp", "a video"), (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"8BPS", "a Photoshop file"), (128, b"DICM", "DICOM"), (0, b"\x76\x2f\x31\x01", "OpenEXR"), (0, b"%PDF", "a PDF"),
    (0, b"PAR1", "Parquet"), (0, b"ARROW1", "Arrow"), (0, b"\x89HDF", "HDF5"), (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"SQLite format", "an SQLite database"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself (git lfs pull fetches it)"),
    (0, b"<!DOCTYPE", "a web page"), (0, b"<!doctype", "a web page"), (0, b"<html", "a web page"), (0, b"<svg", "SVG"),
)  # fmt: skip

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
ARRAYS = (
    ".npy",
    ".npz",
    ".mat",
    ".h5",
    ".hdf5",
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".bin",
    ".tfrecord",
    ".tfrecords",
    ".mdb",
)
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mts")


def kind_of(content: bytes) -> str | None:
    """What a file is whose first bytes (HEAD_BYTES suffice) these are; None where they do not tell."""
    return next((kind for start, magic, kind in MAGIC if content[start : start + len(magic)] == magic), None)


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def suffix_counts(names: Sequence[str]) -> str:
    """How often each of the commonest suffixes is there."""
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    more = ", …" if len(suffixes) > 4 else ""
    return ", ".join(f"{suffix} {number:,}" for suffix, number in suffixes.most_common(4)) + more


def described(names: Sequence[str]) -> str:
    """Some files: how many, the first of them, and how often each suffix is there."""
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names):,} other file(s): {some} ({suffix_counts(names)})" if names else "0 other file(s)"


def how_to_read(names: Sequence[str], path: Path) -> str:
    """The command that reads files which are no images, by what most of them are called; empty where there is none."""
    if not names:
        return ""
    suffix = Counter(PurePosixPath(name).suffix.lower() for name in names).most_common(1)[0][0]
    first = next(name for name in names if PurePosixPath(name).suffix.lower() == suffix)
    command = f"python tools/make_shards.py {shlex.quote(str(path / first))} OUT --size N"
    if suffix in (".7z", ".rar"):
        return f"unpack {first} first"
    if suffix in ARCHIVES:
        return f"name an archive: {command} (one to validate on: --val-src FILE)"
    if suffix == ".parquet":
        return f"name the folder of the Parquet files: {command.replace(first, str(PurePosixPath(first).parent))}"
    if suffix == ".arrow":
        return "write them as Parquet: datasets.load_from_disk(FOLDER).to_parquet('images.parquet')"
    if suffix in ARRAYS or "data_batch" in first:
        return "these hold arrays; write each picture as a file of its own: PIL.Image.fromarray(pixels).save('0.png')"
    if suffix == ".csv":
        return "a table is no picture; give the folder that its paths lead to, or write its pixels as files"
    if suffix in VIDEOS:
        return f"take pictures out of the videos: ffmpeg -i {shlex.quote(first)} -vf fps=1 frames/%05d.png"
    return ""
