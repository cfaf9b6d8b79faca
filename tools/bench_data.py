"""Measure reading and sharding on this machine, against bare loops and against what people use today.

python tools/bench_data.py [--shards DIR] [--originals SRC] [--json FILE]      (make bench-data installs the peers first)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaetrain.command_line import parse, user_errors


@dataclass(frozen=True)
class BenchConfig:
    """Images per second, of wall and of processor time, in one process unless a name says otherwise; medians over rounds in
    which all take turns. On a machine that others use, the ratios of processor time hold better."""

    shards: Path | None = None
    """Shard set of JPEGs to read; None: 2,000 faces are drawn at 128×128."""

    originals: Path | None = None
    """Folder of larger JPEGs to shard at 128×128; None: faces are drawn at 512×512."""

    num_originals: int = 300
    """Faces drawn for it."""

    repeat_originals: int = 4
    """Times that each is sharded."""

    json: Path | None = None
    """Also write the medians and ratios to this file."""

    batch_size: int = 256
    """Images per batch."""

    num_images: int = 2048
    """Images read by each variant in each round."""

    num_workers: int = 0
    """Decoding processes of each reader and each peer; 0: all in one process, which compares cores with cores."""

    rounds: int = 5
    """Rounds; every reader runs once in each."""

    sharding_rounds: int = 3
    """The same for sharding."""

    repeated_gb: float = 20
    """Size of the data set on which memory is measured: one shard of `shards`, linked as often as it takes (GB)."""


if __name__ == "__main__":
    CONFIG = parse(BenchConfig, __doc__, flags=True)  # before the imports below, which take seconds

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from bench_peers import PEERS, RESIZING_PEERS, Material, endless, installed
from vaetrain.data.config import DataConfig
from vaetrain.data.format.decode import JPEG_DECODER, decode_into
from vaetrain.data.format.index import SplitIndex, pack_index
from vaetrain.data.format.manifest import INDEX_NAME, Manifest
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import Reader, open_reader
from vaetrain.data.readers.selection import Selection
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.index_shards import IndexConfig, index_shards
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.data.sources.faces.faces import draw_face
from vaetrain.machine import cpu_model, num_cores

ReaderOfOurs = Literal["indexed", "stream", "resident", "decoded"]
READERS: tuple[ReaderOfOurs, ...] = ("indexed", "stream", "resident", "decoded")
MAKE_SHARDS = Path(__file__).with_name("make_shards.py")
# Of these the stream opens several shards, and its shuffle buffer fills.
BATCHES_FOR_MEMORY = 40
Measure = Callable[[], int]
"""Reads so many images."""


class Speed(NamedTuple):
    """Images per second."""

    wall: float
    cpu: float
    """Of processor time, of this process and of those that it has waited for."""


def bare_decoding(config: BenchConfig, selection: Selection) -> dict[str, Measure]:
    """Decoders in a loop over bytes that are in memory already, the fastest of which bounds every reader."""
    encoded = [selection.read(position % selection.num_images) for position in range(config.num_images)]
    out = np.empty((config.batch_size, *selection.image_shape), dtype=np.uint8)

    def loop(decode: Callable[[bytes, int], object]) -> Measure:
        def measure() -> int:
            for number, content in enumerate(encoded):
                decode(content, number % config.batch_size)
            return len(encoded)

        return measure

    return {
        "bare_in_place": loop(lambda content, place: decode_into(content, out[place])),
        "bare_torchvision": loop(
            lambda content, _: decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        ),
        "bare_pillow": loop(lambda content, _: np.asarray(Image.open(io.BytesIO(content)))),
    }


def batch_by_batch(config: BenchConfig, batches: Iterator[Any]) -> Measure:
    """Reading on in an endless series of batches; the first, with which workers start, is not timed."""
    next(batches)
    num_batches = config.num_images // config.batch_size

    def measure() -> int:
        for _ in range(num_batches):
            next(batches)
        return num_batches * config.batch_size

    return measure


def open_ours(
    shards: Path, name: ReaderOfOurs, num_workers: int, decoded: Path | None = None, **options: Any
) -> Reader:
    """One of the readers, on the CPU; `decoded` is where that of this name keeps its file."""
    data = DataConfig(str(shards), reader=name, num_workers=num_workers, decoded_dir=decoded, **options)
    return open_reader(data, "train", device=torch.device("cpu"))


def ours(config: BenchConfig, shards: Path, decoded: Path) -> dict[str, Measure]:
    """The readers; the decoded one's file is filled before it is measured."""
    layout = BatchLayout(config.batch_size, config.batch_size, 0, 1)
    measures = {}
    for name in READERS:
        reader = open_ours(shards, name, config.num_workers, decoded)
        if name == "decoded":
            for _ in reader.eval_batches(config.batch_size, 0, 1):
                pass
        measures[name] = batch_by_batch(config, reader.train_batches(0, 0, layout))
    return measures


def resizing(config: BenchConfig, originals: Path, folder: Path) -> dict[str, Measure]:
    """Tars of larger images as they lie, their shorter side made 128 as they are read, by us and by peers."""
    files = sorted(originals.rglob("*.jpg"))[: config.num_originals]
    tars = folder / "wds"
    tars.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(tars / f"train-{shard}.tar", "w") as tar:
            for number, file in enumerate(files[shard::2]):
                for name, content in ((f"{number:06d}.jpg", file.read_bytes()), (f"{number:06d}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    with contextlib.redirect_stderr(io.StringIO()):
        index_shards(IndexConfig(str(tars), folder / "indexed", workers=1))
    size = min(config.batch_size, len(files) // 2)
    few = replace(config, batch_size=size, num_images=len(files) // size * size)
    layout = BatchLayout(size, size, 0, 1)
    how: dict[str, Any] = {"resize": "shorter-side", "image_size": 128}
    names: tuple[ReaderOfOurs, ...] = ("indexed", "stream")
    measures = {
        f"{name}_resizing": batch_by_batch(
            few, open_ours(folder / "indexed", name, config.num_workers, **how).train_batches(0, 0, layout)
        )
        for name in names
    }
    material = Material.extract(Selection.of(ShardSet.open(folder / "indexed"), "train"), folder / "peers")
    for name, open_peer in RESIZING_PEERS.items():
        if installed(name):
            with contextlib.redirect_stdout(io.StringIO()):
                measures[f"{name}_resizing"] = batch_by_batch(
                    few, endless(open_peer(material, size, config.num_workers))
                )
    return measures


def peers(config: BenchConfig, selection: Selection, folder: Path) -> dict[str, Measure]:
    """What is installed of PEERS."""
    material = Material.extract(selection, folder)
    measures = {}
    for name, open_peer in PEERS.items():
        if not installed(name):
            print(f"{name} is not installed and left out; make bench-data installs it")
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            loader = open_peer(material, config.batch_size, config.num_workers)
            measures[name] = batch_by_batch(config, endless(loader))
    return measures


def sharding(config: BenchConfig, folder: Path) -> dict[str, Measure]:
    """tools/make_shards.py, its start included, on one and on two processes, and the work itself, by hand in a loop."""
    if config.originals is None:
        originals = folder / "originals" / "face"
        originals.mkdir(parents=True)
        for number in range(config.num_originals):
            Image.fromarray(draw_face(0, number, 512)[0]).save(originals / f"{number}.jpg", quality=95, subsampling=0)
    else:
        originals = Path(config.originals)
    files = sorted(file for file in originals.rglob("*.jpg"))
    # Each several times, under other names: a run of seconds would measure how fast Python starts.
    repeated = folder / "repeated_originals" / "images"
    repeated.mkdir(parents=True)
    for number, file in enumerate(files * config.repeat_originals):
        shutil.copy(file, repeated / f"{number:06d}.jpg")
    files = sorted(repeated.iterdir())
    runs = iter(range(1000))

    def by_hand() -> int:
        for file in files:
            picture = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side)).resize((128, 128), Image.Resampling.LANCZOS)
            picture.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
        return len(files)

    def with_processes(workers: int) -> Measure:
        def measure() -> int:
            command = [sys.executable, MAKE_SHARDS, repeated.parent, folder / f"sharded{next(runs)}"]
            command += ["--size", "128", "--workers", str(workers)]
            subprocess.run(command, check=True, capture_output=True)
            return len(files)

        return measure

    return {"sharding_by_hand": by_hand, "sharding_1": with_processes(1), "sharding_2": with_processes(2)}


def repeat_shards(shards: Path, folder: Path, num_gb: float) -> Path:
    """A shard set of `num_gb` GB whose shards are all the first of `shards`, linked under many names."""
    original = ShardSet.open(shards)
    split, index = original.manifest.splits["train"], original.index("train")
    first = split.shards[0]
    num_copies = max(1, round(num_gb * 1e9 / first.num_bytes))
    copies = tuple(replace(first, name=f"train-{number:06d}.tar") for number in range(num_copies))
    in_first = index.shard == 0
    columns = {name: np.tile(getattr(index, name)[in_first], num_copies) for name in ("offset", "num_bytes", "label")}
    repeated = SplitIndex(shard=np.repeat(np.arange(num_copies, dtype=np.int32), first.num_images), **columns)
    packed = pack_index({"train": repeated})
    folder.mkdir()
    for copy in copies:
        os.link(original.path(first), folder / copy.name)
    (folder / INDEX_NAME).write_bytes(packed)
    counts = np.bincount(repeated.label, minlength=len(original.manifest.classes)).tolist()
    described = replace(
        split,
        num_images=len(repeated.label),
        class_counts=dict(zip(split.class_counts, counts, strict=True)),
        shards=copies,
    )
    manifest: Manifest = replace(
        original.manifest, splits={"train": described}, index_sha256=hashlib.sha256(packed).hexdigest(), fingerprint=""
    )
    manifest.write(folder)
    return folder


def memory_in_use() -> int:
    """Bytes that would be free if this process ended (unique set size) plus its share of what others map too."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(found) * 1024 for found in re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE))


def memory_of_reading(small: Path, large: Path, batch_size: int) -> dict[str, float]:
    """What each reader takes of the large set over the process that has read a little of a small one, in bytes.

    In processes of their own, without workers: a worker has the same index and fewer batches.
    """
    in_process = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=in_process, max_tasks_per_child=1) as processes:
        return {
            f"{name}_memory_mb": processes.submit(_memory_of_reading, small, large, name, batch_size).result() / 1e6
            for name in ("indexed", "stream")
        }


def _memory_of_reading(small: Path, large: Path, name: Literal["indexed", "stream"], batch_size: int) -> int:
    layout = BatchLayout(batch_size, batch_size, 0, 1)
    open_ours(small, name, 0).first(batch_size)  # decoders and their libraries are loaded
    base = memory_in_use()
    batches = open_ours(large, name, 0).train_batches(0, 0, layout)
    return max(memory_in_use() for _ in zip(range(BATCHES_FOR_MEMORY), batches, strict=False)) - base


def main(config: BenchConfig) -> None:
    """Measure, print a table and write the JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = config.shards or folder / "shards"
        if config.shards is None:
            faces = ShardingConfig("faces", shards, size=128, num_images=config.num_images)
            with contextlib.redirect_stderr(io.StringIO()):
                make_shards(faces)
        selection = Selection.of(ShardSet.open(shards), "train")
        if selection.num_images < config.num_images:
            raise ValueError(f"{shards} has {selection.num_images} images; give --num-images of at most that")
        reading = bare_decoding(config, selection) | ours(config, shards, folder / "decoded")
        reading |= peers(config, selection, folder / "peers")
        medians = in_turns(reading, config.rounds)
        sharding_measures = sharding(config, folder)
        originals = config.originals or folder / "originals"
        medians |= in_turns(resizing(config, originals, folder / "resizing"), config.rounds)
        medians |= in_turns(sharding_measures, config.sharding_rounds)
        memory = memory_of_reading(
            shards, repeat_shards(shards, folder / "repeated", config.repeated_gb), config.batch_size
        )
    bare = max((name for name in medians if name.startswith("bare")), key=lambda name: medians[name].cpu)
    pairs = {
        "indexed_vs_bare_decode": ("indexed", bare),
        "stream_vs_bare_decode": ("stream", bare),
        **{f"indexed_vs_{name}": ("indexed", name) for name in PEERS},
        "decoded_vs_resident": ("decoded", "resident"),
        **{f"indexed_vs_{name}_resizing": ("indexed_resizing", f"{name}_resizing") for name in RESIZING_PEERS},
        "sharding_vs_by_hand": ("sharding_1", "sharding_by_hand"),
        "sharding_2_vs_1": ("sharding_2", "sharding_1"),
    }
    ratios = {
        name: Speed(*(of / to for of, to in zip(medians[mine], medians[other], strict=True)))
        for name, (mine, other) in pairs.items()
        if other in medians
    }
    machine = f"{cpu_model() or platform.machine()}, {num_cores()} cores, torch {torch.__version__}, {JPEG_DECODER}"
    image_size = selection.image_shape[0]
    print(
        f"{machine}; {image_size}×{image_size}, {selection.index.num_bytes.mean():,.0f} bytes an image, batch "
        f"{config.batch_size}, {config.num_workers} workers; medians of {config.rounds} rounds"
    )
    print(f"{'images per second of':28s} {'wall time':>12s} {'CPU time':>12s}")
    for name, speed in medians.items():
        print(f"{name:28s} {speed.wall:12,.0f} {speed.cpu:12,.0f}")
    for name, value in memory.items():
        print(f"{name:28s} {value:12,.1f} MB over the process's base, reading {config.repeated_gb:g} GB")
    for name, ratio in ratios.items():
        print(f"{name:28s} {ratio.wall:12.2f} {ratio.cpu:12.2f}")
    if config.json is not None:
        speeds, compared = ({name: speed._asdict() for name, speed in of.items()} for of in (medians, ratios))
        facts = {"machine": machine, "images_per_s": speeds, "memory": memory, "ratios": compared}
        config.json.write_text(json.dumps(facts, indent=2) + "\n")
        print(f"written to {config.json}")


def processor_s() -> float:
    """Processor time of this process and of those that it has waited for, in seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(measures: dict[str, Measure], rounds: int) -> dict[str, Speed]:
    """The median of each over rounds in which all take turns, so that a slow minute of the machine touches all."""
    speeds: dict[str, list[Speed]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            wall, cpu = time.perf_counter(), processor_s()
            num_images = measure()
            speeds[name].append(Speed(num_images / (time.perf_counter() - wall), num_images / (processor_s() - cpu)))
    return {name: Speed(*map(statistics.median, zip(*values, strict=True))) for name, values in speeds.items()}


if __name__ == "__main__":
    with user_errors():
        main(CONFIG)
