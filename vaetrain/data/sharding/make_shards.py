"""From originals to a shard set: `make_shards`, in parallel, resumable, and with the same bytes however it was run.

A plan fixes which original becomes which sample of which shard. Worker processes make pieces of shards, a few dozen samples
each, which this process puts together. Each finished shard leaves a note in OUT/.partial, so that a rerun of the same plan
skips it; index and manifest come last. The shards may be shared out among tasks that run at the same time on many machines;
whoever finds all of them there completes the set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path

import numpy as np
import PIL

from vaetrain.data.format.index import SplitIndex, pack_index
from vaetrain.data.format.manifest import INDEX_NAME, MANIFEST_NAME, OWN_SHARDS_VERSION, Manifest, Split, Tool
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.format.writer import ShardWriter
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.done_record import PARTIAL_NAME, FinishedShard
from vaetrain.data.sharding.duplicates import DUPLICATES_NAME, duplicate_groups, duplicates_jsonl, num_groups_in
from vaetrain.data.sharding.image_hash import IMAGE_HASH
from vaetrain.data.sharding.plan import ShardingPlan
from vaetrain.data.sharding.process_map import map_in_order
from vaetrain.data.sharding.task import DeepPixels, MoreFrames, Rejected, SampleChunk, ShardTask, make_piece
from vaetrain.data.sources.file_kind import suffix_counts
from vaetrain.data.sources.source import Ignored, ImageOpener, ImageSource
from vaetrain.files import replace_file
from vaetrain.machine import num_cores
from vaetrain.progress_bar import ProgressBar

REJECTED_NAME = "rejected.jsonl"
DEPTHS = {10: 1023, 12: 4095, 14: 16383}
"""Bits of a pixel → white, in files of 16 bits."""
# Arguments that change nothing in the result, so that it does not record them.
HOW_IT_IS_RUN = ("out", "workers", "task", "num_tasks", "merge")
# Arguments that are recorded where they are given: sets made before there were any stay as they are.
LATER_ARGUMENTS = {"splits": "auto", "frames": "first", "white": None}


def make_shards(config: ShardingConfig) -> Manifest:
    """Write the shard set `config.out`, or complete it after a kill; says how it goes on stderr.

    Raises ValueError, FileNotFoundError or FileExistsError when the originals or the arguments are not as they should be,
    and ValueError when more than `max_rejected` originals cannot be read (listed in OUT/rejected.jsonl), or when `merge`
    finds that shards are missing.
    """
    assert config.task is None, "a task's share is no shard set; that is make_share"
    manifest = _make(config)
    assert manifest is not None
    return manifest


def make_share(config: ShardingConfig) -> Manifest | None:
    """Write the shards of one task among several, at the same time as others; raises as make_shards does.

    Returns the manifest when the other tasks' shards were there too, so that this task completed the shard set.
    """
    assert config.task is not None
    return _make(config)


def _make(config: ShardingConfig) -> Manifest | None:
    out, partial = config.out, config.out / PARTIAL_NAME
    # In this order, because another task may be making the first file or the last: .partial comes before all others and
    # goes when the manifest is there.
    is_in_use = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_in_use and not partial.is_dir() and not (out / MANIFEST_NAME).exists():
        raise FileExistsError(f"{out} is not empty and holds no shard set; name a new folder, or empty this one")
    plan = ShardingPlan.of(config)
    if (out / MANIFEST_NAME).exists():
        return _already_complete(out, plan)
    if config.merge and not partial.is_dir():
        raise FileNotFoundError(
            f"{out} holds no shards to merge; make them with --task and --num-tasks, or without --merge"
        )
    aside = partial / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
        _claim(partial, aside, plan, config)
        return _make_share(plan, config, aside)
    except FileNotFoundError:
        if partial.is_dir() or not (out / MANIFEST_NAME).exists():
            raise
        return _already_complete(out, plan)  # another task completed it and removed .partial
    finally:
        _discard(aside)


def _claim(partial: Path, aside: Path, plan: ShardingPlan, config: ShardingConfig) -> None:
    """Make OUT/.partial this plan's: tasks refuse another plan's, which may be going on; a run on its own removes it."""
    mark = partial / f"plan-{plan.digest}"
    others = [file for file in partial.glob("plan-*") if file != mark]
    if config.task is None and not config.merge:
        is_ours = mark.exists() and not others
        for entry in [entry for entry in partial.iterdir() if entry != aside]:  # left by a kill
            if entry.is_dir() or not is_ours:
                with suppress(FileNotFoundError):  # a task has just ended
                    entry.rename(aside / f"discarded-{entry.name}")
    elif others or (config.merge and not mark.exists()):
        raise FileExistsError(
            f"{partial.parent} is being made with other arguments or from other originals; give all tasks the same, "
            "name a new folder, or delete it"
        )
    mark.touch()


def _make_share(plan: ShardingPlan, config: ShardingConfig, aside: Path) -> Manifest | None:
    for reason, files in _by_reason(plan.ignored).items():
        print(
            f"ignored {len(files):,} file(s) that are {reason}, such as {files[0]} ({suffix_counts(files)})",
            file=sys.stderr,
        )
    for said in plan.notes:
        print(said, file=sys.stderr)
    tasks = list(plan.tasks(config.out, aside, config.images_per_shard))
    share = [] if config.merge else tasks[config.task :: config.num_tasks]
    notes = _write_shards(share, aside, config.workers or num_cores())
    for task in tasks:
        if task.name not in notes and (note := FinishedShard.of(task, full=False)) is not None:
            notes[task.name] = note
    missing = [task.name for task in tasks if task.name not in notes]
    if not missing:
        return _complete(tasks, {task.name: notes[task.name] for task in tasks}, plan, config, aside)
    if config.merge:
        raise ValueError(
            f"{config.out} lacks {len(missing):,} of {len(tasks):,} shards, first {missing[0]}; run the tasks that failed "
            "again, or this command without --merge, which makes them"
        )
    print(f"{len(missing):,} of {len(tasks):,} shards are other tasks' and not finished", file=sys.stderr)
    return None


def _complete(
    tasks: list[ShardTask], notes: dict[str, FinishedShard], plan: ShardingPlan, config: ShardingConfig, aside: Path
) -> Manifest:
    # Several tasks may be here at once, with the same notes: each writes the same bytes, in a folder of its own first.
    out, partial = config.out, config.out / PARTIAL_NAME
    _report_rejected(list(notes.values()), plan.ignored, config, aside)
    if config.white is None:
        _report_depth(sum((note.deep for note in notes.values()), DeepPixels()))
    _report_duplicates(tasks, notes, config, aside)
    finished = {name: note for name, note in notes.items() if note.shard is not None}
    for file in out.iterdir():  # left by an unfinished run of another plan
        if re.fullmatch(r"(train|val|test)-\d{6}\.tar", file.name) and file.stem not in finished:
            file.unlink(missing_ok=True)
    manifest = _describe(finished, plan, config, aside)
    manifest.write(aside)
    (aside / MANIFEST_NAME).replace(out / MANIFEST_NAME)
    _discard(partial)
    return manifest


def _discard(folder: Path) -> None:
    # Renamed first, so that nobody who still works in it completes a shard from what a half-removed folder has left.
    renamed = folder.with_name(f"{PARTIAL_NAME}-{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        folder.rename(renamed)
    while renamed.exists():
        with suppress(FileNotFoundError):  # another task is removing its own folder inside this one
            shutil.rmtree(renamed)


def closing_line(out: Path, manifest: Manifest) -> str:
    """What a shard set holds, in one line."""
    *others, last = (f"{split.num_images:,} {name}" for name, split in manifest.splits.items())
    numbers = f"{', '.join(others)} and {last}" if others else last
    counts = sum((Counter(split.class_counts) for split in manifest.splits.values()), Counter())
    classes = ", ".join(f"{name} {counts[name]:,}" for name in manifest.classes)
    file = out / REJECTED_NAME
    left_out = [json.loads(line) for line in (file.read_bytes().splitlines() if file.exists() else [])]
    rejected = [each for each in left_out if each["split"]]
    ignored = Counter(each["reason"] for each in left_out if not each["split"] and "num_left_out" not in each)
    num_frames = sum(each.get("num_left_out", 0) for each in left_out)
    reasons = ", ".join(f"{number:,} that are {reason}" for reason, number in ignored.most_common())
    report = [
        f"{len(rejected):,} rejected",
        *([f"{ignored.total():,} ignored ({reasons})"] if ignored else []),
        *([f"{num_frames:,} more frames in their files (--frames all takes them)"] if num_frames else []),
        f"{num_groups_in(out):,} groups of duplicates",
    ]
    return f"{numbers} images ({classes}), {', '.join(report)}, written to {out}"


def _by_reason(ignored: Iterable[Ignored]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for each in ignored:
        files.setdefault(each.reason, []).append(each.source)
    return files


def _already_complete(out: Path, plan: ShardingPlan) -> Manifest:
    shard_set = ShardSet.open(out)
    if shard_set.manifest.tool.plan != plan.digest:
        raise FileExistsError(
            f"{out} holds a shard set made with other arguments or from other originals; name a new folder, or delete it"
        )
    shard_set.verify()
    for left in out.glob(f"{PARTIAL_NAME}*"):  # killed after the manifest was written
        _discard(left)
    print(f"{out} is already complete", file=sys.stderr)
    return shard_set.manifest


def _write_shards(tasks: list[ShardTask], aside: Path, num_workers: int) -> dict[str, FinishedShard]:
    found = ((task.name, FinishedShard.of(task, full=True)) for task in tasks)
    notes = {name: note for name, note in found if note is not None and not note.rejected}  # those are looked at again
    to_do = [task for task in tasks if task.name not in notes]
    pictures = _stage(to_do, aside)
    parts = [list(task.pieces(pictures[task.source])) for task in to_do]
    num_images, num_to_do = (sum(len(task.items) for task in some) for some in (tasks, to_do))
    pieces = map_in_order(make_piece, chain.from_iterable(parts), min(num_workers, sum(map(len, parts))))
    with closing(pieces), ProgressBar("sharding", num_images, done=num_images - num_to_do) as progress:
        for task, own in zip(to_do, parts, strict=True):
            own_pieces = progress.counting(islice(pieces, len(own)), size=lambda piece: piece.num_originals)
            notes[task.name] = write_shard(task, own_pieces)
    return notes


def write_shard(task: ShardTask, pieces: Iterable[SampleChunk]) -> FinishedShard:
    """Write a shard (none if not one of its originals can be read) and its note."""
    rejected: list[Rejected] = []
    likeness = []
    more_frames: list[MoreFrames] = []
    deep = DeepPixels()
    with ShardWriter(task.out, task.split, len(task.items), first_shard=task.number, aside=task.aside) as writer:
        for piece in pieces:
            writer.append(piece.samples, piece.rows)
            rejected += piece.rejected
            likeness.append(piece.likeness)
            more_frames += piece.more_frames
            deep += piece.deep
    index = writer.index()
    offset, num_bytes, label = (tuple(column.tolist()) for column in (index.offset, index.num_bytes, index.label))
    shard = writer.shards[0] if writer.shards else None
    looks = b64encode(b"".join(likeness)).decode()
    note = FinishedShard(task.plan, shard, offset, num_bytes, label, tuple(rejected), looks, tuple(more_frames), deep)
    note.write(task, task.aside)
    return note


def _stage(tasks: list[ShardTask], aside: Path) -> dict[ImageSource, ImageOpener]:
    """What opens the items of these tasks, per source; a compressed tar or Parquet is unpacked into `aside`."""
    sources = dict.fromkeys(task.source for task in tasks)
    items = {source: [item for task in tasks if task.source == source for item in task.items] for source in sources}
    return {source: source.staged(aside / f"source-{n}.tar", items[source]) for n, source in enumerate(sources)}


def _report_rejected(
    notes: Sequence[FinishedShard], ignored: Sequence[Ignored], config: ShardingConfig, aside: Path
) -> None:
    """Write OUT/rejected.jsonl: what could not be read, what was not taken, and what there is more of in a file."""
    file = config.out / REJECTED_NAME
    rejected = [original for note in notes for original in note.rejected]
    more_frames = [original for note in notes for original in note.more_frames]
    left_out = [
        dataclasses.asdict(each) for each in (*rejected, *(Rejected(name, "", reason) for name, reason in ignored))
    ]
    left_out += [
        dataclasses.asdict(Rejected(each.source, "", "frames after the first")) | {"num_left_out": each.num_left_out}
        for each in more_frames
    ]
    if not left_out:
        file.unlink(missing_ok=True)
        return
    lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in left_out)
    replace_file(aside / REJECTED_NAME, "".join(lines).encode(errors="backslashreplace"))
    (aside / REJECTED_NAME).replace(file)
    if more_frames:
        total = sum(each.num_left_out for each in more_frames)
        print(
            f"{len(more_frames):,} file(s) hold {total:,} more pictures than the first, such as {more_frames[0].source}, which are "
            "left out; --frames all takes them",
            file=sys.stderr,
        )
    if len(rejected) > config.max_rejected:
        raise ValueError(
            f"{len(rejected):,} image(s) cannot be read, first {rejected[0].source}: {rejected[0].reason}. All are listed in "
            f"{file}. Mend or remove them and run again, or allow them to be left out with --max-rejected {len(rejected)}"
        )


def _report_depth(deep: DeepPixels) -> None:
    """Tell of pictures that are nearly black because their files have more bits than their pixels."""
    bits = next((bits for bits, white in DEPTHS.items() if deep.brightest <= white), None)
    if deep.num_images and bits is not None:
        print(
            f"the brightest value of {deep.num_images:,} 16-bit image(s) is {deep.brightest:,} of 65,535: if their pixels have "
            f"{bits} bits, say --white {DEPTHS[bits]}, or they stay nearly black",
            file=sys.stderr,
        )


def _report_duplicates(
    tasks: list[ShardTask], notes: dict[str, FinishedShard], config: ShardingConfig, aside: Path
) -> None:
    likeness, images = [np.zeros(0, IMAGE_HASH)], []
    for task in tasks:
        note = notes[task.name]
        rejected = {original.source for original in note.rejected}
        images += [(task.split, item.source) for item in task.items if item.source not in rejected]
        likeness.append(np.frombuffer(b64decode(note.likeness), IMAGE_HASH))
    groups = list(duplicate_groups(np.concatenate(likeness), images, config.near_duplicates))
    file = config.out / DUPLICATES_NAME
    if not groups:
        file.unlink(missing_ok=True)
        return
    replace_file(aside / DUPLICATES_NAME, duplicates_jsonl(groups))
    (aside / DUPLICATES_NAME).replace(file)
    if straddling := [group for group in groups if len(group.splits) > 1]:
        remedy = "" if config.val_count is None else "; --group-duplicates keeps them together"
        print(
            f"{len(straddling):,} group(s) of duplicates are in more than one split, listed in {file}{remedy}",
            file=sys.stderr,
        )


def _describe(finished: dict[str, FinishedShard], plan: ShardingPlan, config: ShardingConfig, aside: Path) -> Manifest:
    splits: dict[str, Split] = {}
    indices: dict[str, SplitIndex] = {}
    for name in plan.splits:
        notes = [note for shard_name, note in finished.items() if shard_name.rpartition("-")[0] == name]
        if not notes:
            raise ValueError(
                f"no image of the {name} split can be read; they are listed in {config.out / REJECTED_NAME}"
            )
        shards = tuple(note.shard for note in notes if note.shard is not None)
        label = np.concatenate([np.array(note.label, dtype=np.int64) for note in notes])
        counts = np.bincount(label, minlength=len(plan.classes)).tolist()
        splits[name] = Split(len(label), dict(zip(plan.classes, counts, strict=True)), shards)
        indices[name] = SplitIndex(
            np.repeat(np.arange(len(notes), dtype=np.int32), [shard.num_images for shard in shards]),
            np.concatenate([np.array(note.offset, dtype=np.int64) for note in notes]),
            np.concatenate([np.array(note.num_bytes, dtype=np.int64) for note in notes]),
            label,
        )
    index = pack_index(indices)
    replace_file(aside / INDEX_NAME, index)
    (aside / INDEX_NAME).replace(config.out / INDEX_NAME)
    arguments = {
        key: value for key, value in dataclasses.asdict(config).items()
        if key not in HOW_IT_IS_RUN and (key, value) not in LATER_ARGUMENTS.items()
    }  # fmt: skip
    return Manifest(
        format_version=OWN_SHARDS_VERSION,
        image_size=plan.recipe.size,
        channels=plan.recipe.channels,
        encoding=plan.recipe.encoding,
        classes=plan.classes,
        splits=splits,
        index_sha256=hashlib.sha256(index).hexdigest(),
        tool=Tool({"vaetrain": version("vaetrain"), "pillow": PIL.__version__}, arguments, plan.digest),
    )
