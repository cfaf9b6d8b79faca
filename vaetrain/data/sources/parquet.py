"""Parquet files with a column of encoded images, as Hugging Face `datasets` writes them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from vaetrain.data.sources.archives import file_identity
from vaetrain.data.sources.class_folders import check_class_name, class_named_after, joined_forms, refuse_unseen_classes
from vaetrain.data.sources.file_kind import head_of, kind_of
from vaetrain.data.sources.preprocess import MAX_FILE_BYTES, decode_picture
from vaetrain.data.sources.source import ImageOpener, ImageSource, Listing, SourceItem, SourceOptions
from vaetrain.data.sources.split_names import are_splits, said_split, splits_of_files, words
from vaetrain.strict_json import sha256_of_json

NO_LABELS = "none"
LABEL_NAMES = ("label", "labels", "class")
LABEL_WORDS = frozenset(
    [
        "label", "labels", "class", "classes", "category", "categories", "cls", "target", "fine", "coarse",
        "species", "breed",
    ]
)  # fmt: skip
"""In names of columns that may be of classes, and are asked about."""
LABEL_TYPES = ("int", "uint", "string", "large_string", "dictionary", "bool")  # and string_view
ROWS_AT_A_TIME = 32
BUFFER_BYTES = 1 << 20


def is_parquet(path: Path) -> bool:
    """Whether a path is a Parquet file, or a folder of such files, of folders of them, or laid out as CONFIG/SPLIT/0000.parquet."""
    if path.is_file():
        return path.suffix == ".parquet" or kind_of(head_of(path)) == "Parquet"
    shallow = itertools.chain(path.glob("*.parquet"), path.glob("*/*.parquet"))
    return next(shallow, None) is not None or any(said_split(file.parent.name) for file in path.glob("*/*/*.parquet"))


@dataclass(frozen=True)
class ParquetSource(ImageSource):
    """One file, or a folder of them, whose names may say their splits: train-00000-of-00002.parquet, test/0000.parquet."""

    path: Path
    """The file or the folder."""
    files: tuple[str, ...]
    """Paths in the folder, sorted; empty strings stand for `path` itself."""
    splits: tuple[str | None, ...]
    """The split of each file."""
    image: str
    """Column of the images' bytes, dotted where it lies in a struct."""
    name: str | None
    """Column of the images' own file names."""
    label: str | None
    """Column of labels."""
    class_names: tuple[str, ...]
    """What integer labels count, where the schema says it."""
    fingerprint: str
    """SHA-256 over the files' footers, in which sizes, places and statistics of all columns lie."""

    @classmethod
    def open_files(cls, path: Path, options: SourceOptions) -> ParquetSource:
        """Find files and columns; raises ValueError listing the columns when it is not clear which to read."""
        is_folder = path.is_dir()
        files = _visible(path) if is_folder else [""]
        schema = _schema(path / files[0])
        image, name = _image_columns(schema, options.image_column, path)
        label, class_names = _label_column(schema, options.label_column, path)
        for file in files[1:]:
            _check_same(schema, _schema(path / file), path / file, (image, label))
        footers = [_footer(path / file) for file in files]
        _refuse_several_configurations(files, path)
        split_of = splits_of_files(files, path) if options.splits == "auto" else {}
        splits = tuple(split_of.get(file) for file in files)
        return cls(path, tuple(files), splits, image, name, label, class_names, sha256_of_json(footers))

    def listing(self) -> Listing:
        """All rows, named FILE:ROW, and FILE:ROW:NAME where the image has a file name; reads no image.

        Raises ValueError when a label is absent or not one of the schema's classes.
        """
        rows: list[tuple[str, str | None, Any]] = []
        for file, split in zip(self.files, self.splits, strict=True):
            rows += [(source, split, label) for source, label in self._rows(file)]
        if not rows:
            raise ValueError(f"{self.path} has no rows")
        classes, labels = self._classes([label for *_, label in rows])
        items = [
            SourceItem(source, label, split, row, 0)
            for row, ((source, split, _), label) in enumerate(zip(rows, labels, strict=True))
        ]
        listing = Listing(classes, tuple(items), has_class_folders=self.label is not None)
        refuse_unseen_classes(listing, self.path, f", or read no labels: --label-column {NO_LABELS}")
        return listing

    def staged(self, file: Path, items: Sequence[SourceItem]) -> ImageOpener:
        """Copy the images of `items` into one file, in one pass over the rows that holds a page of them at a time.

        A shuffled order would otherwise read and decompress a group of a hundred or a thousand rows for each image.
        """
        wanted = {int(item.member) for item in items}
        spans = []
        with file.open("wb") as plain:
            for row, content in enumerate(self._contents(wanted)):
                start = plain.tell()
                if content is not None and row in wanted:
                    plain.write(content)
                spans.append((start, plain.tell() - start))
        np.save(file.with_suffix(".npy"), np.array(spans, dtype=np.int64))
        return StagedImages(file)

    def _rows(self, file: str) -> Iterator[tuple[str, Any]]:
        path = self.path / file
        columns = [column for column in (self.label, self.name) if column]
        with _readable(path):
            opened = _parquet().ParquetFile(path)
            num_rows = opened.metadata.num_rows
            table = opened.read(columns=columns)
        labels = table.column(self.label).to_pylist() if self.label else [None] * num_rows
        names = table.column(self.name.removesuffix(".path")).to_pylist() if self.name else [None] * num_rows
        for row, (label, name) in enumerate(zip(labels, names, strict=True)):
            original = name and name["path"]
            yield f"{file or path.name}:{row}" + (f":{original}" if original else ""), label

    def _classes(self, labels: list[Any]) -> tuple[tuple[str, ...], list[int]]:
        """Class names, and each label as a position in them."""
        if self.label is None:
            return (class_named_after(self.path),), [0] * len(labels)
        if not self.class_names and (forms := joined_forms({label for label in labels if isinstance(label, str)})):
            labels = [forms.get(label, label) for label in labels]
        found = [label for label in labels if label is not None]
        values: list[Any] = list(range(len(self.class_names))) or sorted(set(found))
        classes = self.class_names or tuple(str(value) for value in values)
        position = {value: i for i, value in enumerate(values)}
        if wrong := [label for label in labels if label not in position]:
            raise ValueError(
                f"{self.path} has {len(wrong):,} row(s) whose {self.label} is no class, such as {wrong[0]!r}; remove "
                f"the files in which they are (a test set without labels?), or read no labels: --label-column {NO_LABELS}"
            )
        if len(set(classes)) < len(classes):
            raise ValueError(
                f"{self.path} has classes of the same name: {', '.join(classes)}; give them names of their own"
            )
        for name in classes:
            check_class_name(name, self.path)
        return classes, [position[label] for label in labels]

    def _contents(self, wanted: set[int]) -> Iterator[memoryview | None]:
        """The bytes of each row's image, or None; row groups of which nothing is wanted are not read."""
        first = 0
        for file in self.files:
            with _readable(self.path / file):
                opened = _parquet().ParquetFile(self.path / file, buffer_size=BUFFER_BYTES, pre_buffer=False)
            for group in range(opened.num_row_groups):
                num_rows = opened.metadata.row_group(group).num_rows
                if wanted.isdisjoint(range(first, first + num_rows)):
                    yield from itertools.repeat(None, num_rows)
                else:
                    yield from self._group(opened, group, self.path / file)
                first += num_rows

    def _group(self, opened: Any, group: int, path: Path) -> Iterator[memoryview | None]:
        batches = opened.iter_batches(ROWS_AT_A_TIME, [group], [self.image], use_threads=False)
        while True:
            with _readable(path):
                batch = next(batches, None)
            if batch is None:
                return
            column = batch.column(0)
            if "." in self.image:
                column = column.flatten()[0]
            for content in column:
                yield memoryview(content.as_buffer()) if content.is_valid else None


@dataclass(frozen=True)
class StagedImages(ImageOpener):
    """Encoded images end to end in a file, beside it (.npy) where each begins and how long it is."""

    file: Path

    def open(self, item: SourceItem) -> tuple[Image.Image, dict[str, Any]]:
        """The picture; raises ValueError when the row held no bytes: a path to elsewhere is never followed."""
        content, spans = _open_staged(self.file, file_identity(self.file))
        start, num_bytes = spans[int(item.member)].tolist()
        if num_bytes == 0:
            raise ValueError("its row holds no bytes (files that a row only names are not followed)")
        if num_bytes > MAX_FILE_BYTES:
            raise ValueError(f"it has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")
        return decode_picture(os.pread(content, num_bytes, start)), {}


def _parquet() -> Any:
    try:
        import pyarrow.parquet  # only here: 45 MB, for those who have such files
    except ImportError as error:
        raise ValueError("Parquet files are read with pyarrow; install it: pip install 'vaetrain[parquet]'") from error
    return pyarrow.parquet


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {error}; download it again") from error


def _schema(path: Path) -> Any:
    parquet = _parquet()
    with _readable(path):
        return parquet.read_schema(path)


def _footer(path: Path) -> str:
    """SHA-256 of the footer, which a file ends with: footer, its length as a little-endian integer, PAR1."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        num_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-8 - num_bytes, os.SEEK_END)
        return hashlib.sha256(file.read(num_bytes)).hexdigest()


def _visible(folder: Path) -> list[str]:
    files = (file.relative_to(folder) for file in folder.rglob("*.parquet"))
    return sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))


def _refuse_several_configurations(files: list[str], path: Path) -> None:
    """Raise ValueError for folders that each have splits of their own: the same images in other forms, as the hub keeps them."""
    below: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.partition("/")
        below.setdefault(folder if name else "", []).append(name.split("/")[0].removesuffix(".parquet"))
    several = sorted(folder for folder, names in below.items() if folder and are_splits(names))
    if len(several) > 1:
        raise ValueError(
            f"{path} has several configurations ({', '.join(several)}), each with splits; name the folder of one: "
            f"{path / several[0]}"
        )


def _features(schema: Any, path: Path) -> dict[str, dict[str, Any]]:
    """What `datasets` noted about the columns."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: the schema's huggingface metadata are damaged: {error}") from error


def _listing_of(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _image_columns(schema: Any, wanted: str | None, path: Path) -> tuple[str, str | None]:
    """The columns of bytes and of file names, for the one column that can be of images or was asked for."""
    leaves = {}
    for field in schema:
        parts = {part.name: str(part.type) for part in field.type} if str(field.type).startswith("struct") else {}
        if "binary" in parts.get("bytes", ""):
            leaves[field.name] = (
                f"{field.name}.bytes",
                f"{field.name}.path" if "string" in parts.get("path", "") else None,
            )
        elif str(field.type) in ("binary", "large_binary", "binary_view"):
            leaves[field.name] = field.name, None
    images = [name for name, feature in _features(schema, path).items() if feature.get("_type") == "Image"]
    structs = [name for name, (leaf, _) in leaves.items() if leaf != name]
    candidates = [wanted] if wanted else [name for name in images if name in leaves] or structs or list(leaves)
    if len(candidates) != 1 or candidates[0] not in leaves:
        problem = f"no column {wanted} of images" if wanted else f"{len(candidates) or 'no'} columns that may be images"
        raise ValueError(
            f"{path} has {problem}; name one that holds bytes, or a struct of bytes and path, with --image-column: "
            f"{_listing_of(schema)}. Paths alone are not followed, and lists are not looked into"
        )
    return leaves[candidates[0]]


def _label_column(schema: Any, wanted: str | None, path: Path) -> tuple[str | None, tuple[str, ...]]:
    """The column of labels, and the names of its classes where the schema has them."""
    if wanted == NO_LABELS:
        return None, ()
    features = _features(schema, path)
    labelled = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    candidates = [wanted] if wanted else labelled or [name for name in LABEL_NAMES if name in schema.names]
    if not candidates:
        called = [name for name in schema.names if LABEL_WORDS & {word.lower() for word in words(name)}]
        if called := [name for name in called if str(schema.field(name).type).startswith(LABEL_TYPES)]:
            raise ValueError(
                f"{path} has {', '.join(called)}, which may be of classes; name one with --label-column, or {NO_LABELS} to read no "
                f"labels: {_listing_of(schema)}"
            )
    if len(candidates) > 1 or (wanted and wanted not in schema.names):
        problem = f"no column {wanted}" if wanted else f"several columns of labels ({', '.join(candidates)})"
        raise ValueError(
            f"{path} has {problem}; name one with --label-column, or {NO_LABELS} to read no labels: {_listing_of(schema)}"
        )
    if not candidates:
        return None, ()
    kind = str(schema.field(candidates[0]).type)
    if not kind.startswith(LABEL_TYPES):
        raise ValueError(f"{path}: column {candidates[0]} is of {kind}; a class is an integer or a string")
    names = features.get(candidates[0], {}).get("names") or ()
    return candidates[0], tuple(str(name) for name in names)


def _check_same(schema: Any, other: Any, path: Path, columns: tuple[str | None, ...]) -> None:
    for column in columns:
        name = column and column.removesuffix(".bytes")
        if name and (name not in other.names or other.field(name).type != schema.field(name).type):
            raise ValueError(
                f"{path} has no column {name} ({schema.field(name).type}) as the other files: {_listing_of(other)}"
            )


@lru_cache(maxsize=2)
def _open_staged(file: Path, identity: tuple[int, int, int]) -> tuple[int, Int64[np.ndarray, "rows 2"]]:
    return os.open(file, os.O_RDONLY), np.load(file.with_suffix(".npy"), mmap_mode="r")
