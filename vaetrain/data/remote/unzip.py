"""Zips of images from strangers, unpacked: only images, only where they belong, only as much as was agreed on."""

from __future__ import annotations

import lzma
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from vaetrain.files import check_free_space, readable_disk_errors
from vaetrain.progress_bar import ProgressBar

IMAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.(jpe?g|png)", re.IGNORECASE | re.ASCII)
MAX_UNZIPPED_BYTES = 32 << 20
MAX_MEMBERS = 1_000_000
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, UnicodeDecodeError)


class UnusableArchiveError(ValueError):
    """An archive that is damaged, or that holds what it must not."""


def unpack_images(
    archive: Path, folder: Path, splits: Sequence[str], classes: Sequence[str], *, max_bytes: int
) -> dict[str, dict[str, int]]:
    """Unpack [WRAPPER/]SPLIT/CLASS/NAME.jpg or .png to the new folder SPLIT/CLASS/NAME; returns how many of each there are.

    Other files are left out. Raises UnusableArchiveError, with nothing written yet, when any member is encrypted, a link, absolute,
    reaches upwards or is declared larger than MAX_UNZIPPED_BYTES, or when all images together exceed `max_bytes`; and, before
    its image is used, when a member's checksum is wrong. Raises ValueError when the disk is full.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            images = dict(_images(opened.infolist(), archive, splits, classes))
            num_bytes = sum(info.file_size for info in images.values())
            if num_bytes > max_bytes:
                raise UnusableArchiveError(
                    f"{archive} would unpack to {num_bytes:,} bytes, more than the {max_bytes:,} it may"
                )
            with readable_disk_errors(folder):
                folder.mkdir(parents=True)
                check_free_space(folder, num_bytes, f"what is in {archive.name}")
                for split in splits:
                    for class_name in classes:
                        (folder / split / class_name).mkdir(parents=True)
                with ProgressBar("unpacking", len(images)) as progress:
                    for path, info in progress.counting(images.items()):
                        # zipfile never gives more than the declared size, and compares the checksum at the end.
                        with opened.open(info) as member, (folder / path).open("xb") as file:
                            shutil.copyfileobj(member, file)
    except DAMAGE as error:
        raise UnusableArchiveError(f"{archive} is damaged or no zip: {error}; download it again") from error
    counts = {split: dict.fromkeys(classes, 0) for split in splits}
    for path in images:
        split, class_name, _ = path.parts
        counts[split][class_name] += 1
    return counts


def _images(
    members: Sequence[zipfile.ZipInfo], archive: Path, splits: Sequence[str], classes: Sequence[str]
) -> Iterator[tuple[PurePosixPath, zipfile.ZipInfo]]:
    if len(members) > MAX_MEMBERS:
        raise UnusableArchiveError(f"{archive} has {len(members):,} members, more than the {MAX_MEMBERS:,} it may")
    seen = set()
    for info in members:
        if fault := _fault(info):
            raise UnusableArchiveError(f"{archive}: {info.filename!r} {fault}; nothing was unpacked")
        parts = PurePosixPath(info.filename).parts[-3:]
        if info.is_dir() or len(parts) < 3 or len(PurePosixPath(info.filename).parts) > 4:
            continue
        split, class_name, name = parts
        if split not in splits or class_name not in classes or not IMAGE_NAME.fullmatch(name):
            continue
        path = PurePosixPath(*parts)
        if path in seen:
            raise UnusableArchiveError(f"{archive}: {str(path)!r} is there twice; nothing was unpacked")
        seen.add(path)
        yield path, info


def _fault(info: zipfile.ZipInfo) -> str | None:
    name = info.orig_filename.replace("\\", "/")
    mode = info.external_attr >> 16
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if ".." in name.split("/"):
        return "reaches out of the archive"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.file_size > MAX_UNZIPPED_BYTES:
        return f"is declared as {info.file_size:,} bytes, more than the {MAX_UNZIPPED_BYTES:,} an image may have"
    return None
