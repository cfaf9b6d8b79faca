"""WebDataset tars that exist already, indexed where they lie. Nothing here imports torch.

Headers are read, and labels; of images, only those that may be masks. What is written is a manifest and an index that point at the
tars (data/format/manifest.py, format version 2), and rejected.jsonl with what is left out.
"""

from __future__ import annotations

import io
import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import PIL
import tyro
from tyro.conf import Positional

from vaetrain.data.format.index import SplitIndex, pack_index
from vaetrain.data.format.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_IMAGE_BYTES,
    Encoding,
    Manifest,
    Shard,
    Split,
    Tool,
    check_place,
)
from vaetrain.data.format.tar_index import TarHeaders
from vaetrain.data.remote.remote_file import RemoteFile
from vaetrain.data.sharding.config import num_val_of, share_of
from vaetrain.data.sharding.make_shards import REJECTED_NAME
from vaetrain.data.sharding.process_map import map_in_order
from vaetrain.data.sources.class_folders import Member, find_classes
from vaetrain.data.sources.file_kind import HEAD_BYTES, kind_of
from vaetrain.data.sources.preprocess import PICTURE_SUFFIXES, SUFFIXES, suffix_of
from vaetrain.data.sources.sample_labels import LABEL_KEYS, LABEL_SUFFIXES, MAX_LABEL_BYTES
from vaetrain.data.sources.source import Ignored, Listing, SourceItem
from vaetrain.documents import parse_json
from vaetrain.files import READ_BYTES, read_bytes, replace_file
from vaetrain.machine import num_cores
from vaetrain.progress_bar import ProgressBar
from vaetrain.strict_json import sha256_of_json

REMOTE_WORKERS = 16
"""Processes that scan tars behind URLs: they wait more than they compute."""
MAX_CLASS_BYTES = 256
"""Of a .txt that is a class; longer ones are captions."""
TAR = re.compile(r"(?i)\.(tar(\.(gz|bz2|xz|lzma|zst|lz4|z))?|tgz|tbz2?|txz|tzst)$")
"""What is indexed of a folder, or refused by name because it is compressed: a part left out in silence would not be missed."""
MAX_PLACES = 1_000_000
MAX_LIST_BYTES = 1 << 28
# Of images a remote scan reads over whatever is shorter than this, which costs less than another request.
REMOTE_READ_BYTES = READ_BYTES


@dataclass(frozen=True)
class IndexConfig:
    """Index WebDataset tars where they lie: no image is copied or encoded again."""

    src: Positional[str]
    """The tars: a folder; a path or URL, perhaps with braces, as webdataset takes them (https://HOST/train-{000000..000146}.tar,
    s3://BUCKET/{train,val}-{00..31}.tar); or a text file with one path or URL a line."""

    out: Positional[Path]
    """Folder for manifest.json and index.safetensors, which --data.train then names."""

    val: str | None = None
    """Tars to validate on, given as SRC; None: those of SRC whose names say so (val-*.tar, test/*.tar), if any."""

    val_count: Annotated[int | str | None, tyro.conf.arg(metavar="COUNT|P%")] = None
    """Validate on so many images of SRC, or on this share of them, such as 10%, chosen by --seed."""

    gray: bool = False
    """Read images with one channel in place of three."""

    splits: Literal["auto", "none"] = "auto"
    """auto: tars called as splits are (train-*.tar, val2017/*.tar) are split so. none: all are of one split."""

    workers: int | None = None
    """Processes that scan; None: one per core, or 16 for tars behind URLs."""

    seed: int = 0
    """Decides the choice of --val-count."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if isinstance(self.val_count, str):
            share_of(self.val_count)
        for name in ("val_count", "workers"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; it must be between 0 and {2**32 - 1}")
        if self.val_count is not None and self.val is not None:
            raise ValueError("--val-count and --val both say what to validate on; give one of them")


class ScannedTar(NamedTuple):
    """What one tar holds."""

    place: str
    num_bytes: int
    sha256: str
    members: list[tuple[str, int, int]]
    """Name, first byte and length of each file."""
    labels: dict[str, bytes]
    """By name, what files beside images say, as far as it may be a label."""
    links: list[str]
    """Names of what has no content of its own."""


class IndexedTars(NamedTuple):
    """Images of some tars."""

    tars: list[ScannedTar]
    names: list[str]
    """What each is called: its place without what all places begin with."""
    listing: Listing


def index_shards(config: IndexConfig) -> Manifest:
    """Write OUT/index.safetensors and then OUT/manifest.json.

    Raises ValueError or FileNotFoundError naming the tar that cannot be indexed, and FileExistsError where OUT holds another set.
    """
    train = _indexed(config.src, config)
    val = _indexed(config.val, config) if config.val is not None else None
    classes = train.listing.classes
    if val is not None and (unseen := sorted(set(val.listing.classes) - set(classes))):
        raise ValueError(f"{config.val} has classes that {config.src} lacks: {', '.join(unseen[:5])}")
    splits: dict[str, Split] = {}
    indices: dict[str, SplitIndex] = {}
    for name, tars, items in _split(train, val, config):
        splits[name], indices[name] = _pack(tars, items, classes)
    packed = pack_index(indices)
    arguments = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    suffixes = Counter(suffix_of(item.source) for item in train.listing.items)
    formats = {".png": "png", ".webp": "webp"}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        image_size=0,
        channels=1 if config.gray else 3,
        encoding=Encoding(formats.get(suffixes.most_common(1)[0][0], "jpg"), None, None, crop="none"),  # type: ignore[arg-type]
        classes=classes,
        splits=splits,
        index_sha256=sha256(packed).hexdigest(),
        tool=Tool({"vaetrain": version("vaetrain"), "pillow": PIL.__version__}, arguments, sha256_of_json(arguments)),
    )
    _write(config, manifest, packed, [*train.listing.ignored, *(val.listing.ignored if val else ())])
    return manifest


def closing_line(config: IndexConfig, manifest: Manifest) -> str:
    """What was indexed and what was left out, in one line."""
    numbers = " and ".join(f"{split.num_images:,} {name}" for name, split in manifest.splits.items())
    counts = sum((Counter(split.class_counts) for split in manifest.splits.values()), Counter())
    classes = ", ".join(f"{name} {counts[name]:,}" for name in manifest.classes[:20])
    more = f" and {len(manifest.classes) - 20:,} more" if len(manifest.classes) > 20 else ""
    shards = {shard.url for split in manifest.splits.values() for shard in split.shards}
    lines = (config.out / REJECTED_NAME).read_bytes().splitlines()
    left_out = Counter(parse_json(line)["reason"] for line in lines)
    reasons = ", ".join(f"{number:,} that are {reason}" for reason, number in left_out.most_common())
    return (
        f"{numbers} images ({classes}{more}) in {len(shards):,} tars, {left_out.total():,} other files left out"
        f"{f' ({reasons})' if reasons else ''}, indexed in {config.out}; train with --data.train {config.out} "
        "--data.resize shorter-side"
    )


def places_of(src: str) -> list[str]:
    """The tars that `src` names: absolute paths, or URLs; raises ValueError or FileNotFoundError where it names none."""
    if "://" in src:
        places = _in_remote_folder(src) if src.endswith("/") else list(_expanded(src))
    elif Path(src).is_dir():
        places = [
            str(path.resolve()) for path in sorted(Path(src).rglob("*")) if TAR.search(path.name) and path.is_file()
        ]
        if not places:
            raise ValueError(f"{src} holds no .tar; tools/make_shards.py reads other kinds of data")
    elif Path(src).is_file() and kind_of(_head(src)) is None and not src.endswith(".tar"):
        text = read_bytes(Path(src), MAX_LIST_BYTES, "give a list of paths or URLs, one a line").decode("utf-8")
        lines = [line.strip() for line in text.splitlines()]
        places = [place for line in lines if line for place in _expanded(line)]
    else:
        places = list(_expanded(src))
    places = [place if "://" in place else str(Path(place).resolve()) for place in places]
    if not places:
        raise ValueError(f"{src} names no tar")
    if len(set(places)) < len(places):
        raise ValueError(f"{src} names {next(place for place, n in Counter(places).items() if n > 1)} twice")
    for place in places:
        check_place(place)
        if "://" not in place and not Path(place).is_file():
            raise FileNotFoundError(f"{place} does not exist; name a folder of tars, or their paths or URLs")
    return places


def scan_tar(place: str) -> ScannedTar:
    """The headers of one tar, local or behind a URL; raises ValueError naming it."""
    try:
        with closing(_opened(place)) as file:
            head = file.read(HEAD_BYTES)
            if (kind := kind_of(head)) not in ("tar", None):
                raise ValueError(
                    f"it is {kind}, and only plain tars are read in place; decompress it, or let tools/make_shards.py read it"
                )
            file.seek(0)
            return _scan(place, file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{place} cannot be indexed: {error}") from error


def _scan(place: str, file: io.BufferedReader) -> ScannedTar:
    headers = TarHeaders(file)
    members: list[tuple[str, int, int]] = []
    labels: dict[str, bytes] = {}
    links = []
    for member in headers:
        if not member.is_file:
            links.append(member.name)
            continue
        members.append((member.name, member.offset, member.num_bytes))
        if member.name.endswith(LABEL_SUFFIXES) and member.num_bytes <= MAX_LABEL_BYTES:
            is_caption = member.name.endswith(".txt") and member.num_bytes > MAX_CLASS_BYTES
            file.seek(member.offset)
            labels[member.name] = b"" if is_caption else _label_alone(member.name, file.read(member.num_bytes))
    is_remote = isinstance(file.raw, RemoteFile)
    num_bytes = file.raw.connect().num_bytes if is_remote else Path(place).stat().st_size  # type: ignore[attr-defined]
    return ScannedTar(place, num_bytes or headers.num_bytes, headers.sha256, members, labels, links)


def _label_alone(name: str, content: bytes) -> bytes:
    """A sample's .json without what is no label, of which millions would fill the memory."""
    if not name.endswith(".json"):
        return content
    try:
        record = parse_json(content)
    except ValueError:
        return b""
    key = next((key for key in LABEL_KEYS if key in record), None) if isinstance(record, dict) else None
    return b"" if key is None else json.dumps({key: record[key]}).encode()


def _opened(place: str) -> io.BufferedReader:
    if "://" not in place:
        return Path(place).open("rb")
    return io.BufferedReader(RemoteFile(place), REMOTE_READ_BYTES)


def _head(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(HEAD_BYTES)


def _in_remote_folder(url: str) -> list[str]:
    if url.startswith(("http://", "https://")):
        raise ValueError(f"{url} cannot be listed over HTTP; name the tars, as {url}train-{{000000..000009}}.tar")
    check_place(url)
    import fsspec  # here, because few need it

    files, path = fsspec.core.url_to_fs(url)
    scheme = url.partition("://")[0]
    found = sorted(str(name) for name in files.find(path) if TAR.search(str(name)))
    if not found:
        raise ValueError(f"{url} holds no .tar")
    return [f"{scheme}://{name.lstrip('/')}" for name in found]


def _expanded(pattern: str) -> Iterator[str]:
    """What braces stand for: {000..147} counts, with as many digits, and {a,b} lists."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if number % 2 == 0 else _choices(part) for number, part in enumerate(parts)]
    if np.prod([len(choice) for choice in choices], dtype=float) > MAX_PLACES:
        raise ValueError(f"{pattern} stands for more than {MAX_PLACES:,} tars")
    return map("".join, itertools.product(*choices))


def _choices(text: str) -> list[str]:
    counted = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text)
    if counted is None:
        return text.split(",")
    first, last = int(counted[1]), int(counted[2])
    if last - first >= MAX_PLACES:
        raise ValueError(f"{{{text}}} stands for more than {MAX_PLACES:,} tars")
    return [f"{number:0{len(counted[1])}d}" for number in range(first, last + 1)]


def _indexed(src: str, config: IndexConfig) -> IndexedTars:
    places = places_of(src)
    is_remote = any("://" in place for place in places)
    num_workers = min(config.workers or (REMOTE_WORKERS if is_remote else num_cores()), len(places))
    with ProgressBar(f"scanning {src}", len(places), "tars") as progress:
        tars = list(progress.counting(map_in_order(scan_tar, places, num_workers)))
    names = _short_names(places)
    members, ignored = _members(tars, names)
    by_name = dict(zip(names, tars, strict=True))
    try:
        listing = find_classes(members, Path(src), _peek(by_name), config.splits)
    except ValueError as error:
        raise ValueError(str(error).replace(str(Path(src)), src)) from error
    if not listing.has_class_folders:
        listing = replace(listing, classes=("images",))
    return IndexedTars(tars, names, replace(listing, ignored=(*listing.ignored, *ignored)))


def _short_names(places: Sequence[str]) -> list[str]:
    if len(places) == 1:
        return [posixpath.basename(places[0]) or places[0]]
    start = posixpath.commonpath([posixpath.dirname(place) for place in places]) if all(
        place.startswith("/") for place in places
    ) else posixpath.commonprefix([posixpath.dirname(place) + "/" for place in places]).rpartition("/")[0]  # fmt: skip
    return [place[len(start) :].lstrip("/") for place in places]


def _members(tars: Sequence[ScannedTar], names: Sequence[str]) -> tuple[list[Member], list[Ignored]]:
    members, ignored = [], []
    for tar, shard in zip(tars, names, strict=True):
        ignored += [Ignored(f"{shard}/{name}", "links to nothing, devices or sparse files") for name in tar.links]
        for name, offset, num_bytes in tar.members:
            suffix = suffix_of(name)
            if suffix in PICTURE_SUFFIXES - SUFFIXES:
                ignored.append(Ignored(f"{shard}/{name}", "raw files of cameras and scanners, which are not read"))
            elif suffix in SUFFIXES and not 0 < num_bytes <= MAX_IMAGE_BYTES:
                ignored.append(Ignored(f"{shard}/{name}", "empty or of more than 2 GiB"))
            else:
                members.append(Member(name, offset, num_bytes, shard))
    return members, ignored


def _peek(tars: dict[str, ScannedTar]) -> Callable[[Sequence[Member]], Iterable[bytes]]:
    def peek(members: Sequence[Member]) -> Iterator[bytes]:
        for member in members:
            tar = tars[member.shard]
            if member.name in tar.labels:
                yield tar.labels[member.name]
                continue
            with closing(_opened(tar.place)) as file:
                file.seek(int(member.member))
                yield file.read(member.num_bytes)

    return peek


def _split(
    train: IndexedTars, val: IndexedTars | None, config: IndexConfig
) -> Iterator[tuple[str, IndexedTars, list[SourceItem]]]:
    """Each split's images, of which tars."""
    items = train.listing.items
    own = {item.split for item in items} - {None}
    if own and (val is not None or config.val_count is not None):
        raise ValueError(
            f"{config.src} has splits of its own ({', '.join(sorted(filter(None, own)))}), so --val and --val-count have no place; "
            "leave them out, or pass --splits none"
        )
    if own:
        for name in ("train", *sorted(split for split in own if split and split != "train")):
            yield name, train, [item for item in items if item.split == name]
    elif config.val_count is not None:
        order = np.random.RandomState(config.seed).permutation(len(items))  # whose stream is frozen (NEP 19)
        is_val = np.zeros(len(items), bool)
        is_val[order[len(items) - num_val_of(config.val_count, len(items), config.src) :]] = True
        yield "train", train, [item for item, held in zip(items, is_val, strict=True) if not held]
        yield "val", train, [item for item, held in zip(items, is_val, strict=True) if held]
    else:
        yield "train", train, list(items)
        if val is not None:
            label_of = [train.listing.classes.index(name) for name in val.listing.classes]
            yield "val", val, [item._replace(label=label_of[item.label]) for item in val.listing.items]


def _pack(tars: IndexedTars, items: Sequence[SourceItem], classes: Sequence[str]) -> tuple[Split, SplitIndex]:
    number_of = {name: number for number, name in enumerate(tars.names)}
    rows = sorted((number_of[_shard_in(item, number_of)], item.member, item.num_bytes, item.label) for item in items)
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    used, shard, counts = np.unique(table[:, 0], return_inverse=True, return_counts=True)
    shards = tuple(
        Shard(
            tars.names[number],
            int(count),
            tars.tars[number].num_bytes,
            tars.tars[number].sha256,
            tars.tars[number].place,
        )
        for number, count in zip(used.tolist(), counts, strict=True)
    )
    class_counts = np.bincount(table[:, 3], minlength=len(classes)).tolist()
    split = Split(len(rows), dict(zip(classes, class_counts, strict=True)), shards)
    return split, SplitIndex(shard.astype(np.int32), table[:, 1].copy(), table[:, 2].copy(), table[:, 3].copy())


def _shard_in(item: SourceItem, names: dict[str, int]) -> str:
    """The tar that an item's source begins with."""
    end = item.source.find(".tar/")
    while end >= 0:
        if item.source[: end + 4] in names:
            return item.source[: end + 4]
        end = item.source.find(".tar/", end + 1)
    return next(name for name in names if item.source.startswith(f"{name}/"))


def _write(config: IndexConfig, manifest: Manifest, packed: bytes, ignored: Sequence[Ignored]) -> None:
    out = config.out
    if (out / MANIFEST_NAME).exists():
        if Manifest.read(out / MANIFEST_NAME).fingerprint != manifest.fingerprint:
            raise FileExistsError(f"{out} holds another shard set; name a new folder, or delete it")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty and holds no shard set; name a new folder, or empty this one")
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"source": each.source, "split": "", "reason": each.reason}, ensure_ascii=False) + "\n"
        for each in ignored
    ]
    replace_file(out / REJECTED_NAME, "".join(lines).encode(errors="backslashreplace"))
    replace_file(out / INDEX_NAME, packed)
    manifest.write(out)
