"""Splits and classes, as the paths of files tell them."""

from __future__ import annotations

import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from vaetrain.data.sources.file_kind import described, how_to_read
from vaetrain.data.sources.left_out import (
    HIDDEN,
    JUNK,
    MASKS,
    NO_IMAGES,
    RAW_TWINS,
    REPLACED,
    SAMPLE_PARTS,
    is_thumbnail,
    junk_reason,
    other_form,
)  # fmt: skip
from vaetrain.data.sources.masks import find_masks
from vaetrain.data.sources.preprocess import PICTURE_SUFFIXES, SUFFIXES, suffix_of
from vaetrain.data.sources.sample_labels import LABEL_SUFFIXES, sample_labels, sample_of
from vaetrain.data.sources.source import Ignored, Listing, SourceItem
from vaetrain.data.sources.split_names import (
    FILLERS,
    are_splits,
    held_out,
    is_unmapped,
    merged,
    said_split,
    splits_of_files,
    words,
)  # fmt: skip

Parts = tuple[str, ...]
Key = tuple[str, Parts]
"""The archive that a file lies in, of a source that is several, and its path."""

NO_SPLITS = "--splits none takes folders for classes whatever they are called"


class Member(NamedTuple):
    """One file in a folder or an archive."""

    name: str
    member: str | int
    num_bytes: int
    shard: str = ""
    """The archive it lies in, of a source that is several."""
    frames: tuple[int, ...] = (0,)
    """The pictures to take of it."""


class Place(NamedTuple):
    """Where a picture belongs."""

    split: str | None
    folders: Parts
    """Those below its split's; the first is its class."""


def find_classes(
    members: Iterable[Member],
    path: Path,
    peek: Callable[[Sequence[Member]], Iterable[bytes]],
    splits: Literal["auto", "none"] = "auto",
) -> Listing:
    """Find splits and classes in the paths of files, and set aside what is no picture to train on.

    CLASS/…/NAME.jpg, or SPLIT/CLASS/…/NAME.jpg, or CLASS/SPLIT/…/NAME.jpg, where a folder to train on lies beside one to
    validate or test on (split_names.py); without class folders, by the labels beside them (sample_labels.py), or all of one class
    named after the source. Folders that wrap everything are looked through. `peek` reads files.

    Raises ValueError when there is no image, when images lie both inside and outside class folders, when folders look like splits
    and cannot be told apart, when only validation has a class, and when a class is named in no Unicode.
    """
    files, ignored = _in_view(members)
    pictures = {key: member for key, member in files.items() if suffix_of(key[1][-1]) in PICTURE_SUFFIXES}
    others = {key: member for key, member in files.items() if key not in pictures}
    if not pictures:
        _refuse_without_images(path, others, ignored)
    for reason, keys in _set_aside(pictures, others, peek).items():
        ignored += [Ignored(_shown(key), reason) for key in keys]
        pictures = {key: member for key, member in pictures.items() if key not in keys}
    paths = _unwrapped([parts for _, parts in pictures])
    inner = dict(zip(pictures, paths, strict=True))
    notes: list[str] = []
    if any(shard for shard, _ in pictures):
        shards = list(dict.fromkeys(shard for shard, _ in pictures))
        split_of = splits_of_files(shards, path) if splits == "auto" else {}
        places = {key: Place(split_of.get(key[0]), inner[key][:-1]) for key in pictures}
    elif splits == "none":
        places = {key: Place(None, parts[:-1]) for key, parts in inner.items()}
    else:
        found, notes = _places(paths, path)
        places = {key: found[parts] for key, parts in inner.items()}
    labels, used = _labels(pictures, others, places, inner, peek, path)
    ignored += [Ignored(_shown(key), SAMPLE_PARTS if key in used else NO_IMAGES) for key in others]
    joined = joined_forms(set(labels.values()))
    notes += [
        f"{len(forms)} Unicode forms of {name!r} are one class"
        for name, forms in _forms(joined).items()
        if len(forms) > 1
    ]
    named = {key: joined[label] for key, label in labels.items()}
    has_classes = bool(named)
    classes = tuple(sorted(set(named.values()))) if has_classes else (class_named_after(path),)
    if used and all(name.isdecimal() for name in classes):
        classes = tuple(sorted(classes, key=int))
    for name in classes:
        check_class_name(name, path)
    position = {name: label for label, name in enumerate(classes)}
    items = []
    for key, member in pictures.items():
        name = "/".join(filter(None, (key[0], *inner[key])))
        for frame in member.frames:
            source = name if member.frames == (0,) else f"{name}#{frame}"
            label = position[named[key]] if has_classes else 0
            items.append(SourceItem(source, label, places[key].split, member.member, member.num_bytes, frame))
    listing = Listing(classes, tuple(sorted(items)), has_classes, tuple(sorted(ignored)), tuple(notes))
    refuse_unseen_classes(listing, path)
    return listing


def class_named_after(path: Path) -> str:
    """The one class of a source that tells no classes apart: a folder's name, an archive's without its suffixes."""
    name = path.resolve().name
    if not path.is_dir():
        for suffix in (
            ".gz",
            ".bz2",
            ".xz",
            ".lzma",
            ".zst",
            ".lz4",
            ".tar",
            ".tgz",
            ".tbz2",
            ".tbz",
            ".txz",
            ".zip",
            ".parquet",
        ):
            name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return name.lstrip(".") or "images"


def joined_forms(names: Iterable[str]) -> dict[str, str]:
    """Each name's class: names that look equal, because they differ in how Unicode composes their letters, are one."""
    forms: dict[str, list[str]] = defaultdict(list)
    for name in names:
        forms[unicodedata.normalize("NFC", name)].append(name)
    return {name: normal if len(same) > 1 else name for normal, same in forms.items() for name in same}


def check_class_name(name: str, path: Path) -> None:
    """Refuse a name that cannot be printed, typed or written into a command's arguments."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} has a class whose name is no UTF-8, {name!r}; rename its folder") from error


def refuse_unseen_classes(listing: Listing, path: Path, remedy: str = "") -> None:
    """Raise ValueError, which ends with `remedy`, when what is validated on has a class that nothing is trained on."""
    seen = {item.label for item in listing.items if item.split == "train"}
    if not seen:
        return
    unseen = {label: item for item in reversed(listing.items) if (label := item.label) not in seen and item.split}
    if unseen:
        names = ", ".join(listing.classes[label] for label in sorted(unseen))
        item = unseen[min(unseen)]
        raise ValueError(
            f"{path}: the {item.split} split has classes that train lacks ({names}), such as {item.source}; sort its images into "
            f"the classes of train, or make the set of the training images alone, with --val-count 10%{remedy}"
        )


def _in_view(members: Iterable[Member]) -> tuple[dict[Key, Member], list[Ignored]]:
    """The files by their paths, and those that are passed over whatever they hold."""
    listed = list(members)
    if not any("/" in member.name for member in listed):
        # An archive from Windows, or what was unpacked of it: backslashes are its only separators.
        names = [member.name for member in listed if suffix_of(member.name) in PICTURE_SUFFIXES]
        if names and all("\\" in name for name in names):
            listed = [member._replace(name=member.name.replace("\\", "/")) for member in listed]
    files: dict[Key, Member] = {}
    ignored = []
    for member in listed:
        parts = tuple(part for part in PurePosixPath(member.name).parts if part not in ("/", ".."))
        key = member.shard, parts
        if reason := junk_reason(parts):
            ignored.append(Ignored(_shown(key), reason))
            continue
        if key in files:
            ignored.append(Ignored(_shown(key), REPLACED))
        files[key] = member
    return files, ignored


def _set_aside(
    pictures: Mapping[Key, Member], others: Mapping[Key, Member], peek: Callable[[Sequence[Member]], Iterable[bytes]]
) -> dict[str, set[Key]]:
    """Pictures that are none to train on, by what they are."""
    in_shards: dict[str, set[Parts]] = defaultdict(set)
    for shard, parts in pictures:
        in_shards[shard].add(parts)
    found = {
        JUNK: {(shard, parts) for shard, parts in pictures if is_thumbnail(parts, in_shards[shard])},
        RAW_TWINS: {(shard, parts) for shard, parts in pictures if other_form(parts, in_shards[shard])},
    }
    left = {key: member for key, member in pictures.items() if key not in found[JUNK] | found[RAW_TWINS]}
    found[MASKS] = find_masks([(key, key[1]) for key in left], lambda keys: peek([pictures[key] for key in keys]))
    if any(key[0] for key in pictures) or any(key[1][-1].endswith(".cls") for key in others):  # samples of WebDataset
        plain = {(shard, sample_of(parts)) for shard, parts in left if parts[-1].count(".") == 1}
        found[SAMPLE_PARTS] = {
            key
            for key in left.keys() - found[MASKS]
            if key[1][-1].count(".") > 1 and (key[0], sample_of(key[1])) in plain
        }
    return found


def _labels(
    pictures: Mapping[Key, Member],
    others: Mapping[Key, Member],
    places: Mapping[Key, Place],
    inner: Mapping[Key, Parts],
    peek: Callable[[Sequence[Member]], Iterable[bytes]],
    path: Path,
) -> tuple[dict[Key, str], set[Key]]:
    """The class of each picture by its folder, or by the files beside it, which are returned too; none where nothing says it."""
    with_class = [key for key in pictures if places[key].folders]
    beside = {key for key in others if key[1][-1].endswith(LABEL_SUFFIXES)}
    flat = {key: (key[0], *key[1]) for key in [*pictures, *beside]}
    has_cls = any(key[1][-1].endswith(".cls") for key in beside)
    if beside and (has_cls or not with_class):
        said = sample_labels([flat[key] for key in pictures], {flat[key]: others[key] for key in beside}, peek, path)
        if said is not None:
            return {key: said[flat[key]] for key in pictures}, beside
    if with_class and len(with_class) < len(pictures):
        stray = "/".join(next(inner[key] for key in pictures if not places[key].folders))
        raise ValueError(f"{path} has class folders, but {stray} lies in none; move or remove such images")
    return {key: places[key].folders[0] for key in with_class}, set()


def _places(paths: Sequence[Parts], path: Path) -> tuple[dict[Parts, Place], list[str]]:
    """Split and class folders of each path, and what to tell about them."""
    tops = {parts[0] for parts in paths if len(parts) > 1}
    said = {top for top in tops if said_split(top)}
    if are_splits(tops):
        if any(len(parts) == 1 for parts in paths):
            raise ValueError(f"{path} has images beside its folders {', '.join(sorted(said))}; move them into one")
        if others := tops - said:
            raise ValueError(
                f"{path} has {', '.join(sorted(others))} beside its splits ({', '.join(sorted(said))}); name the folders to read "
                f"one by one, or move these away; {NO_SPLITS}"
            )
        return _below_splits(paths, path), []
    _refuse_doubtful(tops, paths, path)
    if _splits_are_below_classes(paths, path):
        split_of = merged({found.split for parts in paths if (found := said_split(parts[1]))})
        below = {parts: said_split(parts[1]) for parts in paths}
        return {
            parts: Place(split_of[name.split], (parts[0], *parts[2:-1])) for parts, name in below.items() if name
        }, []
    notes = []
    if len(tops) == 1 and held_out(tops):
        notes = [f"all images of {path} lie in {min(tops)}, and are trained on"]
    subfolders = (
        {top: {parts[1] for parts in paths if parts[0] == top and len(parts) > 2} for top in tops}
        if len(tops) < 10
        else {}
    )
    some = next(iter(subfolders.values()), set())
    if len(subfolders) > 1 and len(some) > 1 and all(found == some for found in subfolders.values()):
        alike = ", ".join(sorted(some)[:3])
        notes = [
            f"{', '.join(sorted(tops))} are classes here, though each holds {alike}; if they are splits, call them train and val"
        ]
    return {parts: Place(None, parts[:-1]) for parts in paths}, notes


def _refuse_doubtful(tops: set[str], paths: Sequence[Parts], path: Path) -> None:
    """Refuse folders that look like splits where they are not all, or where none is to train on."""
    tests, trains = held_out(tops), sorted(top for top in tops if (found := said_split(top)) and found.split == "train")
    others = sorted(tops - {*tests, *trains})
    if tests and (others or len({found.split for test in tests if (found := said_split(test))}) > 1):
        beside = f"{', '.join(others[:5])} beside" if others else "none to train on beside"
        raise ValueError(
            f"{path} has {beside} {', '.join(tests)}, which looks held out from training; call the others train, or name the "
            f"folder to read, such as {shlex.quote(str(path / (others or tests)[0]))}; {NO_SPLITS}"
        )
    if not trains or not others:
        return
    below = {top: {parts[1] for parts in paths if parts[0] == top and len(parts) > 2} for top in (*trains, *others)}
    doubtful = [
        other for other in others
        if any(
            is_unmapped(other) or (not said_split(train).rest and train.lower() != "train")  # type: ignore[union-attr]
            or (len(below[train]) > 1 and below[train] & below[other])
            for train in trains
        )
    ]  # fmt: skip
    if doubtful:  # train alone, beside plane and ship, is a vehicle
        raise ValueError(
            f"{path} has {', '.join(doubtful[:5])} beside {', '.join(trains)}, which looks like a split; call it val or test, or "
            f"name the folder to read, such as {shlex.quote(str(path / trains[0]))}; {NO_SPLITS}"
        )


def _splits_are_below_classes(paths: Sequence[Parts], path: Path) -> bool:
    """Whether the layout is CLASS/SPLIT/…; raises ValueError for folders that look like splits, deeper or in some classes only."""
    children: dict[Parts, set[str]] = defaultdict(set)
    for parts in paths:
        for depth in range(1, len(parts) - 1):
            children[parts[:depth]].add(parts[depth])
    split = [folder for folder, names in children.items() if are_splits(names)]
    if not split:
        return False
    if all(len(parts) > 2 and said_split(parts[1]) for parts in paths):
        return True
    raise ValueError(
        f"{path} has folders that look like splits inside {'/'.join(split[0])} ({', '.join(sorted(children[split[0]])[:5])}); lay "
        f"them out as SPLIT/CLASS or as CLASS/SPLIT, or name the one to read; {NO_SPLITS}"
    )


def _below_splits(paths: Sequence[Parts], path: Path) -> dict[Parts, Place]:
    """Split and class folders where the first folder of each path is its split's."""
    said = {top: found for top in {parts[0] for parts in paths} if (found := said_split(top))}
    split_of = merged({found.split for found in said.values()})
    folders = {parts: parts[1:-1] for parts in paths}
    for top, name in said.items():  # seg_train/seg_train/CLASS
        own = [parts for parts in paths if parts[0] == top]
        firsts = {folders[parts][:1] for parts in own}
        inside = said_split(min(firsts)[0]) if len(firsts) == 1 and min(firsts) else None
        if inside and inside.split == name.split:
            folders |= {parts: folders[parts][1:] for parts in own}
    # train/images/CLASS
    while len(firsts := {inner[:1] for inner in folders.values()}) == 1 and min(map(len, folders.values())) > 1:
        if not {word.lower() for word in words(min(firsts)[0])} <= FILLERS:
            break
        folders = {parts: inner[1:] for parts, inner in folders.items()}
    rests: dict[str, set[Parts]] = defaultdict(set)
    for name in said.values():
        rests[name.split].add(name.rest)
    if not any(folders.values()) and any(len(some) > 1 for some in rests.values()):
        first_rests = next(iter(rests.values()))
        if any(other != first_rests for other in rests.values()):
            raise ValueError(
                f"{path} has folders {', '.join(sorted(said))}, several of one split without classes that the others have too; lay "
                f"them out as SPLIT/CLASS; {NO_SPLITS}"
            )
        folders = {parts: ("_".join(said[parts[0]].rest) or "other",) for parts in paths}  # trainA trainB testA testB
    return {parts: Place(split_of[said[parts[0]].split], inner) for parts, inner in folders.items()}


def _unwrapped(paths: Sequence[Parts]) -> list[Parts]:
    """The paths without the folders that wrap all of them and other folders."""
    unwrapped = list(paths)
    while len({parts[0] for parts in unwrapped}) == 1 and all(len(parts) > 2 for parts in unwrapped):
        unwrapped = [parts[1:] for parts in unwrapped]
    return unwrapped


def _forms(joined: Mapping[str, str]) -> dict[str, list[str]]:
    forms: dict[str, list[str]] = defaultdict(list)
    for name, joint in joined.items():
        forms[joint].append(name)
    return forms


def _shown(key: Key) -> str:
    return "/".join(filter(None, (key[0], *key[1])))


def _refuse_without_images(path: Path, others: Mapping[Key, Member], ignored: Sequence[Ignored]) -> None:
    names = [_shown(key) for key in others]
    hidden = [file.source for file in ignored if file.reason == HIDDEN and suffix_of(file.source) in PICTURE_SUFFIXES]
    remedy = how_to_read(names, path)
    if hidden:
        folders = ", ".join(
            sorted({next(part for part in name.split("/") if part.startswith(".")) for name in hidden})[:5]
        )
        remedy = f"{len(hidden):,} images are hidden ({folders}): rename what begins with a dot"
    raise ValueError(
        f"{path} has no images ({', '.join(sorted(SUFFIXES))}), only {described(names)}{f'; {remedy}' if remedy else ''}"
    )
