"""Files that are not taken, and why: what file managers, NAS boxes and cameras leave beside pictures."""

from __future__ import annotations

from collections.abc import Collection

from vaetrain.data.sources.preprocess import RAW_SUFFIXES, SUFFIXES, suffix_of

NO_IMAGES = "no images"
HIDDEN = "hidden"
JUNK = "thumbnails or trash of file managers"
MASKS = "masks or label maps"
RAW_TWINS = "raw forms of pictures that are read"
REPLACED = "replaced by a later file of the same name"
SAMPLE_PARTS = "labels, captions or other parts of samples"
LINKED_FOLDERS = "links to folders"

# Synology, QNAP, Windows, macOS, Linux, Picasa; compared in lower case.
JUNK_FOLDERS = frozenset(
    [
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@transcode", "@tmp", "$recycle.bin", "recycler",
        "system volume information", "found.000", "__macosx", "network trash folder", "temporary items", "lost+found",
        "__pycache__", "lightroom previews",
    ]
)  # fmt: skip
JUNK_PREFIXES = ("synophoto_thumb", "synofile_thumb", "synoindex_thumb")
THUMBNAIL_FOLDERS = frozenset(["thumbs", "thumbnails", "_thumbs", "_thumbnails", "previews"])


def junk_reason(parts: tuple[str, ...]) -> str | None:
    """Why a path is passed over whatever it holds, or None."""
    *folders, name = (part.lower() for part in parts or ("",))  # an archive may hold a file without a name
    if not JUNK_FOLDERS.isdisjoint(folders) or name.startswith(JUNK_PREFIXES):
        return JUNK
    return HIDDEN if not name or any(part.startswith(".") for part in parts) else None


def is_thumbnail(parts: tuple[str, ...], others: Collection[tuple[str, ...]]) -> bool:
    """Whether a picture in a folder called thumbs is the small form of one of `others`, beside or above that folder."""
    for depth, folder in enumerate(parts[:-1]):
        if folder.lower() in THUMBNAIL_FOLDERS and (parts[:depth] + parts[depth + 1 :]) in others:
            return True
    return False


def other_form(parts: tuple[str, ...], others: Collection[tuple[str, ...]]) -> bool:
    """Whether a raw file is of a picture that lies beside it as a file that is read."""
    if suffix_of(parts[-1]) not in RAW_SUFFIXES:
        return False
    stem = parts[-1].rpartition(".")[0]
    return any((*parts[:-1], stem + spelled) in others for suffix in SUFFIXES for spelled in (suffix, suffix.upper()))
