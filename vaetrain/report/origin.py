"""Where a run comes from: its configuration, its data, and the code, packages and machine that made it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from vaetrain.command_line import flatten, printable
from vaetrain.documents import MAX_YAML_BYTES
from vaetrain.files import inside, read_bytes
from vaetrain.report.page import absent, code, columns, fold, paragraph, subheading, table
from vaetrain.report.values import exact, inner, shown_value
from vaetrain.runs.provenance import MAX_PATCH_BYTES
from vaetrain.runs.record import RunRecord

MAX_CLASSES_SHOWN = 12
"""Longer tables of classes are folded."""


MAX_PATCHES_SHOWN = 20
"""One for each start with changes; a folder may hold any number."""


def configuration_of_run(recorded: RunRecord) -> str:
    """A table for each section of config.yaml, and the file to copy."""
    if recorded.config is None:
        return absent(recorded.why_not(recorded.run.config_file, "vaetrain/train.py writes it."))
    plain = {key: value for key, value in recorded.config.items() if not isinstance(value, Mapping)}
    groups = {"": plain} | {key: value for key, value in recorded.config.items() if isinstance(value, Mapping)}
    tables = [
        table(("key", "value"), [(key, exact(value)) for key, value in flatten(content)], caption=name or "run")
        for name, content in groups.items()
        if content
    ]
    text = read_bytes(recorded.run.config_file, MAX_YAML_BYTES, "").decode(errors="replace")
    return columns(tables) + fold("config.yaml, which --config reads back", code(text))


def dataset_of_run(recorded: RunRecord) -> str:
    """What the training and validation images are."""
    dataset = recorded.dataset
    if dataset is None:
        return absent(recorded.why_not(recorded.run.dataset_file, "training writes it when it starts."))
    sets: dict[str, Mapping[str, Any]] = {}
    for split in ("train", "val"):
        content = dataset.get(split)
        sets[split] = content if isinstance(content, Mapping) else {}
    rows = [(name, *(show(split, sets[split]) for split in sets)) for name, show in _DATASET_ROWS]
    rows += [
        (f"encoding: {key}", *(shown_value(inner(content, "encoding").get(key)) for content in sets.values()))
        for key in dict.fromkeys(key for content in sets.values() for key in inner(content, "encoding"))
    ]
    counts = {split: inner(inner(inner(content, "splits"), split), "class_counts") for split, content in sets.items()}
    classes = list(dict.fromkeys(name for split in counts.values() for name in split))
    parts = [table(("", "training", "validation"), rows)]
    if classes:
        class_rows = [(name, *(shown_value(split.get(name)) for split in counts.values())) for name in classes]
        caption, folded = "Images by class", len(classes) > MAX_CLASSES_SHOWN
        parts.append(table(("class", "training", "validation"), class_rows, caption=caption, fold=folded))
    return "".join(parts)


def provenance_of_run(recorded: RunRecord) -> str:
    """The command, the code, the machine, the packages; of resumes what they add."""
    provenance = recorded.provenance
    if provenance is None:
        return absent(recorded.why_not(recorded.run.provenance_file, "nobody knows what made this run."))
    parts = []
    if command := _command(provenance):
        parts += [subheading("Command"), code(command)]
    parts += [
        paragraph("To train it again and compare every record:"),
        code(f"python tools/rerun.py {shlex.quote(str(recorded.run.path))}"),
        table(("", "recorded"), _origin_rows(provenance)),
    ]
    packages = [(name, exact(version)) for name, version in inner(provenance, "packages").items()]
    parts.append(table(("package", "version"), packages, caption="Packages", fold=True) if packages else "")
    resumes = provenance.get("resumes")
    for count, resume in enumerate(resumes if isinstance(resumes, list) else [], start=1):
        if isinstance(resume, Mapping):
            parts.append(table(("", "recorded"), _origin_rows(resume), caption=f"Resume {count}", fold=True))
    for file in sorted(recorded.run.path.glob("uncommitted*.patch"))[:MAX_PATCHES_SHOWN]:
        patch = read_bytes(inside(recorded.run.path, file.name), MAX_PATCH_BYTES, "delete it").decode(errors="replace")
        parts.append(fold(f"Changes that were not committed ({file.name})", code(patch)))
    return "".join(parts)


def _command(provenance: Mapping[str, Any]) -> str | None:
    """What to copy into a shell: this checkout's train.py, whatever program the record names, with the arguments quoted.

    None for one with control characters, which quotes do not keep from a terminal.
    """
    _, *arguments = [str(word) for word in provenance["command"]] or [""]
    if any(printable(word) != word or "\n" in word or "\t" in word for word in arguments):
        return None
    num_processes = provenance["num_processes"]
    layout = "gpu1.yaml" if num_processes == 1 else f"node8.yaml --num_processes {num_processes}"
    return f"accelerate launch --config_file launch/{layout} {shlex.join(['vaetrain/train.py', *arguments])}"


def _origin_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    left_out = ("packages", "resumes", "command", "parent")
    return [(key, exact(value)) for key, value in flatten(provenance) if key.split(".")[0] not in left_out]


def _num_images(split: str, content: Mapping[str, Any]) -> str:
    return shown_value(inner(inner(content, "splits"), split).get("num_images"))


def _size(split: str, content: Mapping[str, Any]) -> str:
    size, channels = content.get("image_size"), content.get("channels")
    return "–" if size is None else f"{size} × {size}, {channels} channel{'' if channels == 1 else 's'}"


_DATASET_ROWS = (
    ("images", _num_images),
    ("size", _size),
    ("fingerprint", lambda split, content: shown_value(content.get("fingerprint"))),
)
