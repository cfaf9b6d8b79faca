"""Labels beside pictures, as WebDataset has them: KEY.jpg with KEY.cls, or a number or name in KEY.json or KEY.txt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

M = TypeVar("M")
Parts = tuple[str, ...]
LABEL_KEYS = ("class", "class_name", "label", "cls")
"""In a sample's .json, the first that is there."""
LABEL_SUFFIXES = (".cls", ".json", ".txt")
MAX_LABEL_BYTES = 1 << 20


def sample_of(parts: Parts) -> Parts:
    """The key of a file's sample: its path up to the first dot in its name."""
    return (*parts[:-1], parts[-1].partition(".")[0])


def sample_labels(
    pictures: Sequence[Parts], others: Mapping[Parts, M], peek: Callable[[Sequence[M]], Iterable[bytes]], source: Path
) -> dict[Parts, str] | None:
    """The label of each picture as the files beside it say; None where there are no such files, or they say none.

    Raises ValueError where some pictures have a label and others none.
    """
    for suffix in LABEL_SUFFIXES:
        beside = {parts: (*parts[:-1], parts[-1][: -len(suffix)]) for parts in others if parts[-1].endswith(suffix)}
        by_stem = {stem: parts for parts, stem in beside.items()}
        files = {p: by_stem.get((*p[:-1], p[-1].rpartition(".")[0]), by_stem.get(sample_of(p))) for p in pictures}
        found = list(dict.fromkeys(parts for parts in files.values() if parts is not None))
        if not found or (suffix != ".cls" and None in files.values()):
            continue
        first = found[0]
        if suffix != ".cls" and _label(suffix, next(iter(peek([others[first]])))) is None:
            continue
        contents = dict(zip(found, peek([others[parts] for parts in found]), strict=True))
        labels = {p: _label(suffix, contents[parts]) if parts else None for p, parts in files.items()}
        if bare := [p for p, label in labels.items() if label is None]:
            raise ValueError(
                f"{source} has labels in {suffix} files, such as {_path(first)}, but none for {_path(bare[0])}; "
                "add them, or remove such pictures"
            )
        return {p: label for p, label in labels.items() if label is not None}
    return None


def _path(parts: Parts) -> str:
    return "/".join(filter(None, parts))


def _label(suffix: str, content: bytes) -> str | None:
    try:
        text = content[:MAX_LABEL_BYTES].decode().strip()
        if suffix == ".json":
            record = json.loads(text)
            value = (
                next((record[key] for key in LABEL_KEYS if key in record), None) if isinstance(record, dict) else None
            )
            return str(value) if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else None
    except (ValueError, RecursionError):
        return None
    if suffix == ".txt" and not text.isdecimal():  # a caption
        return None
    return text if text and "\n" not in text else None
