"""From originals to a shard set: `make_shards`, in parallel, resumable, and with the same bytes however it was run.

A plan fixes which original becomes which sample of which shard. Worker processes write whole shards. Each finished shard
leaves a note in OUT/.partial, so that a rerun of the same plan skips it; index and manifest come last. The shards may be
shared out among tasks that run at the same time on many machines; whoever finds all of them there completes the set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from vaetrain.data.finished_shard import PARTIAL_NAME, FinishedShard, Rejected
from vaetrain.data.picture import UNREADABLE
from vaetrain.data.shard_plan import Plan, ShardingConfig, ShardTask
from vaetrain.data.shard_writer import ShardWriter
from vaetrain.data.shards import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardSet,
    Split,
    SplitIndex,
    Tool,
    pack_index,
)
from vaetrain.files import replace_file
from vaetrain.machine import num_cores

REJECTED_NAME = "rejected.jsonl"
SECONDS_BETWEEN_LINES = 10
# Arguments that change nothing in the result, so that it does not record them.
HOW_IT_IS_RUN = ("out", "workers", "task", "num_tasks", "merge")


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
    plan = Plan.of(config)
    out, partial = config.out, config.out / PARTIAL_NAME
    # In this order, because another task may be making the first file or the last: .partial comes before all others and
    # goes when the manifest is there.
    is_in_use = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_in_use and not partial.is_dir() and not (out / MANIFEST_NAME).exists():
        raise FileExistsError(f"{out} is not empty and holds no shard set; name a new folder, or empty this one")
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


def _claim(partial: Path, aside: Path, plan: Plan, config: ShardingConfig) -> None:
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


def _make_share(plan: Plan, config: ShardingConfig, aside: Path) -> Manifest | None:
    if plan.ignored:
        print(f"ignored {len(plan.ignored):,} file(s) that are no images, such as {plan.ignored[0]}", file=sys.stderr)
    if config.merge:
        share = []
        tasks = list(plan.tasks(config.out, aside, config.images_per_shard))
    else:
        tasks = list(plan.staged(aside).tasks(config.out, aside, config.images_per_shard))
        share = tasks[config.task :: config.num_tasks]
    notes = _write_shards(share, config.workers or num_cores())
    for task in tasks:
        if task.name not in notes and (note := FinishedShard.of(task, full=False)) is not None:
            notes[task.name] = note
    missing = [task.name for task in tasks if task.name not in notes]
    if not missing:
        return _complete({task.name: notes[task.name] for task in tasks}, plan, config, aside)
    if config.merge:
        raise ValueError(
            f"{config.out} lacks {len(missing):,} of {len(tasks):,} shards, first {missing[0]}; run the tasks that failed "
            "again, or this command without --merge, which makes them"
        )
    print(f"{len(missing):,} of {len(tasks):,} shards are other tasks' and not finished", file=sys.stderr)
    return None


def _complete(notes: dict[str, FinishedShard], plan: Plan, config: ShardingConfig, aside: Path) -> Manifest:
    # Several tasks may be here at once, with the same notes: each writes the same bytes, in a folder of its own first.
    out, partial = config.out, config.out / PARTIAL_NAME
    _report_rejected([original for note in notes.values() for original in note.rejected], config, aside)
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
        shutil.rmtree(renamed)


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
    for left in out.glob(f"{PARTIAL_NAME}*"):  # killed after the manifest was written
        _discard(left)
    print(f"{out} is already complete", file=sys.stderr)
    return shard_set.manifest


def _write_shards(tasks: list[ShardTask], num_workers: int) -> dict[str, FinishedShard]:
    found = ((task.name, FinishedShard.of(task, full=True)) for task in tasks)
    notes = {name: note for name, note in found if note is not None and not note.rejected}  # those are looked at again
    to_do = [task for task in tasks if task.name not in notes]
    num_images, num_to_do = (sum(len(task.items) for task in some) for some in (tasks, to_do))
    with _Progress(num_images, done=num_images - num_to_do) as progress:
        for task, note in _run(to_do, min(num_workers, len(to_do))):
            notes[task.name] = note
            progress.update(len(task.items))
    return notes


def _run(tasks: list[ShardTask], num_workers: int) -> Iterator[tuple[ShardTask, FinishedShard]]:
    if num_workers <= 1:
        for task in tasks:
            yield task, write_shard(task)
        return
    # Spawned, not forked: a fork would share the sources' open files and their positions.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker) as pool:
        futures = {pool.submit(write_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
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


def write_shard(task: ShardTask) -> FinishedShard:
    """Write a shard (none if not one original can be read) and its note."""
    rejected = []
    image_format = task.recipe.encoding.format
    with ShardWriter(task.out, task.split, len(task.items), first_shard=task.number, aside=task.aside) as writer:
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
    index = writer.index()
    offset, num_bytes, label = (tuple(column.tolist()) for column in (index.offset, index.num_bytes, index.label))
    shard = writer.shards[0] if writer.shards else None
    note = FinishedShard(task.plan, shard, offset, num_bytes, label, tuple(rejected))
    note.write(task, task.aside)
    return note


def _report_rejected(rejected: list[Rejected], config: ShardingConfig, aside: Path) -> None:
    file = config.out / REJECTED_NAME
    if not rejected:
        file.unlink(missing_ok=True)
        return
    lines = (json.dumps(dataclasses.asdict(each), ensure_ascii=False) + "\n" for each in rejected)
    replace_file(aside / REJECTED_NAME, "".join(lines).encode())
    (aside / REJECTED_NAME).replace(file)
    if len(rejected) > config.max_rejected:
        raise ValueError(
            f"{len(rejected):,} image(s) cannot be read, first {rejected[0].source}: {rejected[0].reason}. All are listed in "
            f"{file}. Mend or remove them and run again, or allow them to be left out with --max-rejected {len(rejected)}"
        )


def _describe(finished: dict[str, FinishedShard], plan: Plan, config: ShardingConfig, aside: Path) -> Manifest:
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
    arguments = {key: value for key, value in dataclasses.asdict(config).items() if key not in HOW_IT_IS_RUN}
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
