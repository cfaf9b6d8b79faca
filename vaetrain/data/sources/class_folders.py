"""Splits and classes, as the paths of files tell them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vaetrain.data.sources.preprocess import SUFFIXES
from vaetrain.data.sources.source import Listing, SourceItem

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Member(NamedTuple):
    """One file in a folder or an archive."""

    name: str
    member: str | int
    num_bytes: int


def find_classes(members: Iterable[Member], path: Path) -> Listing:
    """Find splits and classes in the paths of files.

    CLASS/…/NAME.jpg, or SPLIT/CLASS/…/NAME.jpg where `train` lies beside a validation or test folder; without class
    folders all images are of one class, named after the source. Folders that wrap everything are looked through. Raises
    ValueError when there is no image, when images lie both inside and outside class folders, and when a class is
    named in no Unicode.
    """
    visible = {
        PurePosixPath(member.name).parts: member
        for member in members
        if not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(member.name).parts)
    }
    images = {parts: member for parts, member in visible.items() if PurePosixPath(parts[-1]).suffix.lower() in SUFFIXES}
    ignored = tuple(sorted("/".join(parts) for parts in visible.keys() - images.keys()))
    if not images:
        raise ValueError(f"{path} has no images ({', '.join(sorted(SUFFIXES))}), only {len(ignored)} other file(s)")
    while len({parts[0] for parts in images}) == 1 and all(len(parts) > 2 for parts in images):
        images = {parts[1:]: member for parts, member in images.items()}
    splits = _splits({parts[0] for parts in images if len(parts) > 1}, path)
    if splits and any(len(parts) == 1 for parts in images):
        raise ValueError(f"{path} has images beside its folders {', '.join(sorted(splits))}; move them into one")
    class_parts = {parts: parts[1 if splits else 0 : -1] for parts in images}
    has_class_folders = any(class_parts.values())
    if has_class_folders and not all(class_parts.values()):
        stray = next("/".join(parts) for parts, folders in class_parts.items() if not folders)
        raise ValueError(f"{path} has class folders, but {stray} lies in none; move or remove such images")
    classes = (
        tuple(sorted({folders[0] for folders in class_parts.values()}))
        if has_class_folders
        else (class_named_after(path),)
    )
    for name in classes:
        check_class_name(name, path)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    items = (
        SourceItem(
            source="/".join(parts),
            label=labels[class_parts[parts][0]] if has_class_folders else 0,
            split=splits[parts[0]] if splits else None,
            member=member.member,
            num_bytes=member.num_bytes,
        )
        for parts, member in images.items()
    )
    return Listing(classes, tuple(sorted(items)), has_class_folders, ignored)


def class_named_after(path: Path) -> str:
    """The one class of a source that tells no classes apart."""
    return path.resolve().name.split(".")[0]


def check_class_name(name: str, path: Path) -> None:
    """Refuse a name that cannot be printed, typed or written into a command's arguments."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} has a class whose name is no UTF-8, {name!r}; rename its folder") from error


def _splits(folders: set[str], path: Path) -> dict[str, str]:
    # CIFAR-100 has a class called train, so that name alone makes no split.
    held_out = folders & (SPLIT_NAMES.keys() - {"train"})
    if "train" not in folders or not held_out:
        return {}
    if others := folders - SPLIT_NAMES.keys():
        raise ValueError(
            f"{path} has {', '.join(sorted(others))} beside its splits; name the folders to read one by one"
        )
    return splits_of(folders)


def splits_of(names: set[str]) -> dict[str, str]:
    """The split that each of the names in SPLIT_NAMES stands for; `test` is validation where nothing else is."""
    splits = {name: SPLIT_NAMES[name] for name in sorted(names)}
    return splits if "val" in splits.values() else splits | ({"test": "val"} if "test" in splits else {})
