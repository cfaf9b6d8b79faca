"""From originals to a shard set: `make_shards`, in parallel, resumable, and with the same bytes however it was run.

A plan fixes which original becomes which sample of which shard. Worker processes write whole shards. Each finished shard
leaves a note in OUT/.partial, so that a rerun of the same plan skips it; index and manifest come last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from tqdm import tqdm

from vaetrain.data.picture import UNREADABLE
from vaetrain.data.shard_plan import Plan, ShardingConfig, ShardTask
from vaetrain.data.shard_writer import ShardWriter
from vaetrain.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardSet,
    Split,
    SplitIndex,
    Tool,
    pack_index,
)
from vaetrain.files import replace_file, sha256_of_file
from vaetrain.machine import num_cores
from vaetrain.strict_json import from_json

PARTIAL_NAME = ".partial"
REJECTED_NAME = "rejected.jsonl"
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class FinishedShard:
    """The note that a finished shard leaves in OUT/.partial."""

    plan: str
    shard: Shard
    offset: tuple[int, ...]
    num_bytes: tuple[int, ...]
    label: tuple[int, ...]


class Rejected(NamedTuple):
    """An original that could not be read."""

    source: str
    split: str
    reason: str


def make_shards(config: ShardingConfig) -> Manifest:
    """Write the shard set `config.out`, or complete it after a kill; says how it goes on stderr.

    Raises ValueError, FileNotFoundError or FileExistsError when the originals or the arguments are not as they should be,
    and ValueError when more than `max_rejected` originals cannot be read (listed in OUT/rejected.jsonl).
    """
    plan = Plan.of(config)
    out, partial = config.out, config.out / PARTIAL_NAME
    if (out / MANIFEST_NAME).exists():
        return _already_complete(out, plan)
    if out.exists() and not partial.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty and holds no shard set; name a new folder, or empty this one")
    partial.mkdir(parents=True, exist_ok=True)
    if plan.ignored:
        print(f"ignored {len(plan.ignored):,} file(s) that are no images, such as {plan.ignored[0]}", file=sys.stderr)
    tasks = list(plan.staged(partial).tasks(out, config.images_per_shard))
    finished, rejected = _write_shards(tasks, config.workers or num_cores())
    _report_rejected(rejected, config)
    for file in out.iterdir():  # left by an unfinished run of another plan
        if re.fullmatch(r"(train|val|test)-\d{6}\.tar", file.name) and file.stem not in finished:
            file.unlink()
    _describe(finished, plan, config).write(out)
    shutil.rmtree(partial)
    return Manifest.read(out / MANIFEST_NAME)


def closing_line(out: Path, manifest: Manifest) -> str:
    """What a shard set holds, in one line."""
    *others, last = (f"{split.num_images:,} {name}" for name, split in manifest.splits.items())
    numbers = f"{', '.join(others)} and {last}" if others else last
    counts = sum((Counter(split.class_counts) for split in manifest.splits.values()), Counter())
    classes = ", ".join(f"{name} {counts[name]:,}" for name in manifest.classes)
    num_rejected = len((out / REJECTED_NAME).read_text().splitlines()) if (out / REJECTED_NAME).exists() else 0
    return f"{numbers} images ({classes}), {num_rejected:,} rejected, written to {out}"


def _already_complete(out: Path, plan: Plan) -> Manifest:
    shard_set = ShardSet.open(out)
    if shard_set.manifest.tool.plan != plan.digest:
        raise FileExistsError(
            f"{out} holds a shard set made with other arguments or from other originals; name a new folder, or delete it"
        )
    shard_set.verify()
    if (out / PARTIAL_NAME).exists():  # killed after the manifest was written
        shutil.rmtree(out / PARTIAL_NAME)
    print(f"{out} is already complete", file=sys.stderr)
    return shard_set.manifest


def _write_shards(tasks: list[ShardTask], num_workers: int) -> tuple[dict[str, FinishedShard], list[Rejected]]:
    notes = ((task.name, _read_note(task)) for task in tasks)
    finished = {name: note for name, note in notes if note is not None}
    rejected: dict[str, list[Rejected]] = {}
    to_do = [task for task in tasks if task.name not in finished]
    num_images, num_to_do = (sum(len(task.items) for task in some) for some in (tasks, to_do))
    with _Progress(num_images, done=num_images - num_to_do) as progress:
        for task, note, originals in _run(to_do, min(num_workers, len(to_do))):
            rejected[task.name] = originals
            if note is not None:
                finished[task.name] = note
            progress.update(len(task.items))
    in_order = [task.name for task in tasks]
    return (
        {name: finished[name] for name in in_order if name in finished},
        [original for name in in_order for original in rejected.get(name, [])],
    )


def _run(tasks: list[ShardTask], num_workers: int) -> Iterator[tuple[ShardTask, FinishedShard | None, list[Rejected]]]:
    if num_workers <= 1:
        for task in tasks:
            yield task, *write_shard(task)
        return
    # Spawned, not forked: a fork would share the sources' open files and their positions.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker) as pool:
        futures = {pool.submit(write_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed (out of memory?); run the same command again to go on, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns only when the parent has been killed; workers would wait for tasks for ever
    os._exit(1)


def write_shard(task: ShardTask) -> tuple[FinishedShard | None, list[Rejected]]:
    """Write a shard (none if not one original can be read) and, unless there were rejected originals, its note."""
    rejected = []
    image_format = task.recipe.encoding.format
    aside = task.out / PARTIAL_NAME
    with ShardWriter(task.out, task.split, len(task.items), first_shard=task.number, aside=aside) as writer:
        for position, item in enumerate(task.items, start=task.first):
            try:
                image, extra = task.source.encoded(item, task.recipe)
            except UNREADABLE as error:
                rejected.append(Rejected(item.source, task.split, str(error) or type(error).__name__))
                continue
            except Exception as error:
                error.add_note(f"while reading {item.source}")
                raise
            record = {"label": item.label, "class": task.classes[item.label], "source": item.source, **extra}
            writer.write(f"{position:08d}", image, image_format, record)
    if not writer.shards:
        return None, rejected
    index = writer.index()
    columns = (tuple(column.tolist()) for column in (index.offset, index.num_bytes, index.label))
    note = FinishedShard(task.plan, writer.shards[0], *columns)
    if not rejected:  # a rerun looks at rejected originals again
        replace_file(_note_file(task), json.dumps(dataclasses.asdict(note)).encode())
    return note, rejected


def _note_file(task: ShardTask) -> Path:
    return task.out / PARTIAL_NAME / f"{task.name}.json"


def _read_note(task: ShardTask) -> FinishedShard | None:
    if not _note_file(task).exists():
        return None
    try:
        note: FinishedShard = from_json(FinishedShard, json.loads(_note_file(task).read_text()))
    except ValueError as error:
        raise ValueError(f"{_note_file(task)} is damaged: {error}; delete {task.out} and start again") from error
    shard = task.out / note.shard.name
    same = note.plan == task.plan and shard.exists() and sha256_of_file(shard) == note.shard.sha256
    return note if same else None


def _report_rejected(rejected: list[Rejected], config: ShardingConfig) -> None:
    file = config.out / REJECTED_NAME
    if not rejected:
        file.unlink(missing_ok=True)
        return
    replace_file(file, "".join(json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in rejected).encode())
    if len(rejected) > config.max_rejected:
        raise ValueError(
            f"{len(rejected):,} image(s) cannot be read, first {rejected[0].source}: {rejected[0].reason}. All are listed in "
            f"{file}. Mend or remove them and run again, or allow them to be left out with --max-rejected {len(rejected)}"
        )


def _describe(finished: dict[str, FinishedShard], plan: Plan, config: ShardingConfig) -> Manifest:
    splits: dict[str, Split] = {}
    indices: dict[str, SplitIndex] = {}
    for name in plan.splits:
        notes = [note for shard_name, note in finished.items() if shard_name.rpartition("-")[0] == name]
        if not notes:
            raise ValueError(
                f"no image of the {name} split can be read; they are listed in {config.out / REJECTED_NAME}"
            )
        shards = tuple(note.shard for note in notes)
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
    replace_file(config.out / INDEX_NAME, index)
    # Where it was written to and by how many processes changes nothing in it.
    arguments = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "workers")}
    return Manifest(
        format_version=FORMAT_VERSION,
        image_size=plan.recipe.size,
        channels=plan.recipe.channels,
        encoding=plan.recipe.encoding,
        classes=plan.classes,
        splits=splits,
        index_sha256=hashlib.sha256(index).hexdigest(),
        tool=Tool({"vaetrain": version("vaetrain"), "pillow": PIL.__version__}, arguments, plan.digest),
    )


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self.bar = tqdm(total=total, initial=done, unit="img", disable=not sys.stderr.isatty())
        self.total, self.done, self.first = total, done, done
        self.start = self.last_line = time.perf_counter()

    def update(self, num_images: int) -> None:
        self.done += num_images
        self.bar.update(num_images)
        now = time.perf_counter()
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (self.done - self.first) / (now - self.start)
            print(f"{self.done:,} of {self.total:,} images, {rate:,.0f} images/s", file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
