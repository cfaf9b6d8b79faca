"""Download Animal Faces-HQ, check it and unpack it.

python tools/fetch_afhq.py afhq
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vaetrain.command_line import parse, user_errors
from vaetrain.data.remote.download import PERSISTENCE, download
from vaetrain.data.remote.remote_file import Persistence
from vaetrain.data.remote.unzip import UnusableArchiveError, unpack_images
from vaetrain.files import readable_disk_errors, sha256_of_file
from vaetrain.strict_json import from_json

NOTE_NAME = "source.json"
LICENSE = "CC BY-NC 4.0 (no commercial use), © NAVER Corp., https://github.com/clovaai/stargan-v2"


@dataclass(frozen=True)
class Release:
    """What the authors of StarGAN v2 (Choi et al. 2020) give out."""

    url: str
    """Where download.sh of clovaai/stargan-v2 has it from."""

    sha256: str | None
    """SHA-256 of the archive, or None where nobody has published one."""

    images: Mapping[str, Mapping[str, int]]
    """Images by split and class."""

    max_bytes: int
    """Neither the archive nor its content may be larger."""


RELEASES = {
    "v1": Release(
        url="https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
        # As UVCGAN2 (Torbunov et al. 2023) pins it in scripts/download_dataset.sh; 729,484,677 bytes.
        sha256="7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f",
        images={
            "train": {"cat": 5153, "dog": 4739, "wild": 4738},
            "val": {"cat": 500, "dog": 500, "wild": 500},
        },
        max_bytes=2 << 30,
    ),
    "v2": Release(
        url="https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1",
        sha256=None,
        images={
            "train": {"cat": 5065, "dog": 4678, "wild": 4593},
            "test": {"cat": 493, "dog": 491, "wild": 483},
        },
        max_bytes=32 << 30,
    ),
}


@dataclass(frozen=True)
class FetchAfhqConfig:
    """Download Animal Faces-HQ."""

    out: Positional[Path]
    """New folder for the images: SPLIT/CLASS/NAME.jpg, and source.json, which says where they are from."""

    archive: Path | None = None
    """The zip, if you have it already; it is read, not moved."""

    version: Literal["v1", "v2"] = "v1"
    """v1: 16,130 JPEGs with train and val; v2: 15,803 PNGs with train and test."""


@dataclass(frozen=True)
class SourceNote:
    """What OUT/source.json says."""

    dataset: str
    """AFHQ v1 or v2."""

    url: str
    """Where the authors give it out."""

    archive: str
    """File name of the zip it was unpacked from."""

    archive_sha256: str
    """Its SHA-256."""

    archive_is_official: bool | None
    """Whether that is the known SHA-256 of this release; None where none is known."""

    license: str
    """Terms of use."""

    images: dict[str, dict[str, int]]
    """Images by split and class."""


def fetch(config: FetchAfhqConfig, release: Release, persistence: Persistence = PERSISTENCE) -> str:
    """Make the folder `config.out`, whole or not at all; returns the closing line.

    The zip and what is unpacked of it lie in OUT.partial until everything is checked; a later run resumes the download.
    Raises ValueError, FileNotFoundError or FileExistsError.
    """
    out = config.out.resolve()
    name = f"AFHQ {config.version}"
    if (out / NOTE_NAME).exists():
        _check_existing(out, name)
        return _closing_line(config, release)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{config.out} is not empty and holds no AFHQ; name a new folder, or empty this one")
    partial = out.with_name(f"{out.name}.partial")
    archive, sha256 = _archive(config, release, partial, persistence)
    is_official = None if release.sha256 is None else sha256 == release.sha256
    if not is_official:
        reason = (
            "no SHA-256 is known of this release" if is_official is None else "not the archive the authors give out"
        )
        print(f"{archive.name} has SHA-256 {sha256}: {reason}; relying on the numbers of images", file=sys.stderr)
    unpacked = partial / "unpacked"
    try:
        images = _unpack(archive, unpacked, release)
    except UnusableArchiveError as error:
        shutil.rmtree(unpacked, ignore_errors=True)
        if config.archive is not None:
            if partial.is_dir() and not any(partial.iterdir()):  # else an unfinished download lies there
                partial.rmdir()
            raise
        wrong = archive.with_name(f"{archive.name}.wrong")
        archive.replace(wrong)
        raise ValueError(f"{error} (set aside as {wrong}; the next run downloads it again)") from error
    note = SourceNote(name, release.url, archive.name, sha256, is_official, LICENSE, images)
    with readable_disk_errors(out):
        (unpacked / NOTE_NAME).write_text(json.dumps(dataclasses.asdict(note), indent=2) + "\n")
        unpacked.rename(out)
    shutil.rmtree(partial)
    return _closing_line(config, release)


def _archive(config: FetchAfhqConfig, release: Release, partial: Path, persistence: Persistence) -> tuple[Path, str]:
    if config.archive is not None:
        if not config.archive.is_file():
            raise FileNotFoundError(f"{config.archive} does not exist; leave --archive out to download it")
        return config.archive, sha256_of_file(config.archive)
    archive = partial / f"afhq_{config.version}.zip"
    sha256 = download(
        [release.url], archive, sha256=release.sha256, max_bytes=release.max_bytes, persistence=persistence
    )
    return archive, sha256


def _unpack(archive: Path, unpacked: Path, release: Release) -> dict[str, dict[str, int]]:
    if unpacked.exists():  # left by a run that was killed
        shutil.rmtree(unpacked)
    splits, classes = tuple(release.images), tuple(next(iter(release.images.values())))
    images = unpack_images(archive, unpacked, splits, classes, max_bytes=release.max_bytes)
    _check_counts(images, release.images, str(archive))
    return images


def _check_counts(found: Mapping[str, Mapping[str, int]], expected: Mapping[str, Mapping[str, int]], what: str) -> None:
    wrong = [
        f"{found[split][class_name]:,} in {split}/{class_name}, not {count:,}"
        for split, counts in expected.items()
        for class_name, count in counts.items()
        if found[split][class_name] != count
    ]
    if wrong:
        raise UnusableArchiveError(f"{what} has the wrong number of images: {'; '.join(wrong)}; is --version right?")


def _check_existing(out: Path, name: str) -> None:
    note: SourceNote = from_json(SourceNote, json.loads((out / NOTE_NAME).read_text()), f"{out / NOTE_NAME}")
    if note.dataset != name:
        raise FileExistsError(f"{out} holds {note.dataset}, not {name}; name a new folder, or delete it")
    found = {
        split: {class_name: sum(1 for _ in (out / split / class_name).glob("*.*")) for class_name in counts}
        for split, counts in note.images.items()
    }
    if found != note.images:
        raise ValueError(
            f"{out} no longer has all the images that its {NOTE_NAME} counts; delete it and run this again"
        )


def _closing_line(config: FetchAfhqConfig, release: Release) -> str:
    total = sum(sum(counts.values()) for counts in release.images.values())
    shards = "datasets/afhq128" if config.version == "v1" else "datasets/afhqv2_128"
    return (
        f"AFHQ {config.version}, {total:,} images, is in {config.out} ({LICENSE}); "
        f"next: python tools/make_shards.py {config.out} {shards} --size 128"
    )


def main() -> None:
    """Fetch and say what to run next; exit 1 with a message when that is not possible."""
    config = parse(FetchAfhqConfig, __doc__, flags=True)
    with user_errors():
        print(fetch(config, RELEASES[config.version]))


if __name__ == "__main__":
    main()
