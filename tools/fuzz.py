"""Damaged files, thousands of each kind, through the functions that read them; counts what ends otherwise than it should.

python tools/fuzz.py [KIND ...] [--num N] [--seed S]

KIND is manifest, tar, image, safetensors, config or run; none: all of them. Each file is one that vaetrain or Pillow wrote, with
some of its bytes or values changed, often so that hashes and checksums still hold, as a stranger's would. It is clean when
reading succeeds or raises ValueError or OSError. Exit code 1: some were not, or took over 5 seconds, or memory grew by over
512 MiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from vaetrain.command_line import parse, user_errors

Kind = Literal["manifest", "tar", "image", "safetensors", "config", "run"]

FULL_COUNTS: dict[str, int] = {"manifest": 100_000}
"""Of kinds that have another number than 20,000."""

SLOW_S = 5.0
"""Of this process's own time, of which others on the machine take nothing."""
HANGS_S = 100
MAX_GROWTH = 512 << 20
"""Of resident memory, in bytes, over what it was after the first hundred files."""


@dataclass(frozen=True)
class FuzzArguments:
    """Which kinds, and how many."""

    kinds: tyro.conf.Positional[tuple[Kind, ...]] = ()
    """Kinds of files; none named: all."""

    num: int | None = None
    """Files of each kind; None: 100,000 manifests and indexes, 20,000 of every other."""

    seed: int = 0
    """Draws the damages."""


@dataclass
class Outcome:
    """What became of the files of a kind."""

    kind: str
    ends: Counter[str] = field(default_factory=Counter)
    """read, refused, or slow; else the name and place of an error."""
    growth: int = 0
    """Of memory, in bytes."""

    @property
    def is_clean(self) -> bool:
        """Whether all was as it should be."""
        return not self.ends.keys() - {"read", "refused"} and self.growth <= MAX_GROWTH

    def describe(self) -> str:
        """A line, and one for each fault."""
        faults = "".join(f"\n    {count} × {end}" for end, count in self.ends.items() if end not in ("read", "refused"))
        return (
            f"{self.kind}: {self.ends.total():,} files, {self.ends['read']:,} read, {self.ends['refused']:,} refused, memory "
            f"+{self.growth / 2**20:.0f} MiB{faults or ', no other end'}"
        )


class Hang(BaseException):
    """A file that took HANGS_S."""


VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**30, -(10**12), 10**400, 1.5, float("nan"), float("inf"), "", "x", "../x",
    "/etc/passwd", "--output=x", "a\nb", "\ud800", "\0", [], {}, [1], {"a": 1}, [[[]]], "9" * 50, "x" * 5000,
)  # fmt: skip
PIECES = (
    b'"',
    b"{",
    b"[",
    b"9" * 30,
    b"-",
    b"1e999",
    b"NaN",
    b"null",
    b"\\u0000",
    b"../",
    b'"a":',
    b"&a ",
    b"*a",
    b": ",
    b"\n",
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, put in or overwritten."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 20))):
        if not result:
            break
        at, size = rng.randrange(len(result)), rng.choice((1, 2, 4, 16, 100))
        match rng.randrange(8):
            case 0:
                result[at] ^= 1 << rng.randrange(8)
            case 1:
                result[at] = rng.randrange(256)
            case 2:
                del result[at : at + rng.choice((1, 4, 100, 1000))]
            case 3:
                result[at:at] = rng.randbytes(size)
            case 4:
                other = rng.randrange(len(result))
                result[at : at + size] = result[other : other + size]
            case 5:
                result[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f")) * size
            case 6:
                del result[at:]
            case 7:
                result[at : at + 1] = rng.choice(PIECES)
    return bytes(result)


def with_other_values(content: Any, rng: random.Random) -> Any:
    """Plain values with some replaced, taken out, renamed or doubled."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places or rng.random() < 0.02:
            return deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                holder[key] = deepcopy(rng.choice(VALUES))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[rng.choice(("x", "..", "a\nb", "train", "0"))] = holder.pop(key)
            case _ if isinstance(holder, list):
                holder.append(holder[key])
            case _:
                if isinstance(holder[key], int):
                    holder[key] = int(holder[key]) + rng.choice((-1, 1, 512, 2**40))
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


class Material:
    """Sound files to damage, in a folder of their own: originals, a shard set, and a run with all that belongs to one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards, self.run, self.export, self.samples = (
            folder / name for name in ("shards", "run", "export", "samples")
        )

    def make_shards(self) -> None:
        """24 drawn faces of 8×8."""
        from vaetrain.data.sharding.config import ShardingConfig
        from vaetrain.data.sharding.make_shards import make_shards

        for number in range(24):
            file = self.folder / "originals" / ("cat" if number % 3 else "dog") / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_image("PNG", number))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_shards(ShardingConfig(str(self.folder / "originals"), self.shards, **SHARDING))

    def make_run(self) -> None:
        """A training of four steps, scored, exported and sampled from."""
        from vaetrain.config import Config
        from vaetrain.distributed import processes
        from vaetrain.evaluate import evaluate
        from vaetrain.evaluation.config import EvaluateConfig
        from vaetrain.export import export
        from vaetrain.sample import SampleConfig, sample
        from vaetrain.train import train

        self.make_shards()
        accelerator = processes.start()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.config = parse(Config, None, [*TINY, "--data.train", str(self.shards), "--run-dir", str(self.run)])
            train(self.config, accelerator)
            evaluate(EvaluateConfig(self.run, scores=("elbo",)), accelerator)
            export(self.run, self.export)
            sample(SampleConfig(self.run, self.samples, num_images=4), accelerator)
        self.accelerator = accelerator
        (self.checkpoint,) = (self.run / "checkpoints").glob("step-*")


SHARDING: dict[str, Any] = {"size": 8, "images_per_shard": 8, "workers": 1, "val_count": 8}
TINY = (
    "--model.kind", "dense", "--model.image-size", "8", "--model.channel-mult", "1", "--model.hidden-features", "4",
    "--model.latent", "vector", "--model.latent-channels", "2", "--train.global-batch-size", "4", "--train.num-images", "16",
    "--train.precision", "fp32", "--log.every-steps", "2", "--log.num-pictures", "4", "--checkpoint.keep-last", "1",
)  # fmt: skip


def _image(image_format: str, seed: int, **options: Any) -> bytes:
    from PIL import Image

    pixels = random.Random(seed).randbytes(3 * 8 * 8)
    file = io.BytesIO()
    Image.frombytes("RGB", (8, 8), pixels).save(file, image_format, **options)
    return file.getvalue()


def manifests(material: Material) -> Callable[[random.Random], None]:
    """Manifests and indexes, half of them vouched for by hashes that hold."""
    from vaetrain.data.format.manifest import INDEX_NAME, MANIFEST_NAME
    from vaetrain.data.format.shard_set import ShardSet
    from vaetrain.data.readers.selection import Selection
    from vaetrain.strict_json import sha256_of_json

    material.make_shards()
    folder = shutil.copytree(material.shards, material.folder / "damaged")
    manifest, index = ((folder / name).read_bytes() for name in (MANIFEST_NAME, INDEX_NAME))

    def one(rng: random.Random) -> None:
        other = damaged(index, rng) if rng.random() < 0.3 else index
        (folder / INDEX_NAME).write_bytes(other)
        if rng.random() < 0.3:
            (folder / MANIFEST_NAME).write_bytes(damaged(manifest, rng))
        else:
            content = json.loads(manifest) if other != index else with_other_values(json.loads(manifest), rng)
            if isinstance(content, dict):
                content["index_sha256"] = hashlib.sha256(other).hexdigest()
                with contextlib.suppress(ValueError, TypeError):
                    vouched = {name: value for name, value in content.items() if name not in ("tool", "fingerprint")}
                    content["fingerprint"] = sha256_of_json(vouched)
            (folder / MANIFEST_NAME).write_text(json.dumps(content))
        shard_set = ShardSet.open(folder)
        shard_set.verify()
        for split in ("train", "val"):
            selection = Selection.of(shard_set, split)
            selection.read(0), selection.read(selection.num_images - 1)

    return one


def tars(material: Material) -> Callable[[random.Random], None]:
    """Tars of images in three formats, half of them with headers whose checksum holds."""
    from vaetrain.data.sources.open_source import open_source
    from vaetrain.data.sources.preprocess import UNREADABLE

    sound = []
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
            for number in range(3):
                long = tar_format != tarfile.USTAR_FORMAT and number == 2
                info = tarfile.TarInfo(f"{'d' * 120 if long else 'cat'}/é{number}.png" if long else f"cat/{number}.png")
                content = _image("PNG", number)
                info.size = len(content)
                info.pax_headers = {"comment": "x" * 30, "mtime": "1.5"} if tar_format == tarfile.PAX_FORMAT else {}
                tar.addfile(info, io.BytesIO(content))
        sound.append(file.getvalue())
    file_to_read = material.folder / "damaged.tar"

    def one(rng: random.Random) -> None:
        content = bytearray(rng.choice(sound))
        if rng.random() < 0.5:
            at = rng.choice(
                [at for at in range(0, len(content) - 512, 512) if content[at + 257 : at + 262] == b"ustar"]
            )
            header = bytearray(damaged(bytes(content[at : at + 512]), rng))[:512].ljust(512, b"\0")
            if rng.random() < 0.4:
                header[124:136] = rng.choice(
                    (b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12, b"-0000000001\0")
                )
            if rng.random() < 0.3:
                header[156] = rng.choice(b"0123456xgLKSVDMN")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            content[at : at + 512] = header
        else:
            content = bytearray(damaged(bytes(content), rng))
        file_to_read.write_bytes(content)
        source = open_source(str(file_to_read))
        for item in source.listing().items[:3]:
            try:
                source.open(item)
            except UNREADABLE as error:  # what its callers count as an image that cannot be read
                raise ValueError(str(error)) from error

    return one


def images(material: Material) -> Callable[[random.Random], None]:
    """Images of all formats that are read, as originals and as shards hold them."""
    import numpy as np

    from vaetrain.data.format.decode import decode_into
    from vaetrain.data.format.manifest import Encoding
    from vaetrain.data.sources.preprocess import UNREADABLE, Preprocessing, decode_picture

    sound = [
        *(_image(name, 0) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")), _image("JPEG", 1, progressive=True),
        _image("PNG", 1, icc_profile=b"x" * 300), _image("WEBP", 1, lossless=True),
    ]  # fmt: skip
    pixels = np.empty((8, 8, 3), np.uint8)

    def one(rng: random.Random) -> None:
        content = damaged(rng.choice(sound), rng)
        if rng.random() < 0.5:
            decode_into(content, pixels)
            return
        try:
            Preprocessing(8, 3, Encoding("png", None, None)).apply(decode_picture(content))
        except UNREADABLE as error:  # what its callers count as an image that cannot be read
            raise ValueError(str(error)) from error

    return one


def safetensors_files(material: Material) -> Callable[[random.Random], None]:
    """Exports: their weights, headers alone or all, and their config.json."""
    import vaetrain

    material.make_run()
    folder = shutil.copytree(material.export, material.folder / "damaged")
    weights, config = ((folder / name).read_bytes() for name in ("model.safetensors", "config.json"))
    header = 8 + struct.unpack("<Q", weights[:8])[0]

    def one(rng: random.Random) -> None:
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(config)
        match rng.randrange(4):
            case 0:
                (folder / "model.safetensors").write_bytes(damaged(weights[:header], rng) + weights[header:])
            case 1:
                (folder / "model.safetensors").write_bytes(damaged(weights, rng))
            case 2:
                (folder / "config.json").write_bytes(damaged(config, rng))
            case 3:
                content = json.loads(config)
                (folder / "config.json").write_text(
                    json.dumps({**content, "model": with_other_values(content["model"], rng)})
                )
        vaetrain.load(folder)

    return one


def configs(material: Material) -> Callable[[random.Random], None]:
    """Configs as `--config` and a run's own are read, and sweep files."""
    import yaml

    from vaetrain.command_line import plain, read_config, to_yaml, yaml_arguments
    from vaetrain.config import Config
    from vaetrain.sweeps.sweep_file import Sweep

    config = parse(Config, None, [*TINY, "--data.train", "shards"])
    sound, file = to_yaml(config).encode(), material.folder / "damaged.yaml"
    sweeps = [path.read_bytes() for path in (Path(__file__).parents[1] / "configs" / "sweeps").glob("*.yaml")]

    def one(rng: random.Random) -> None:
        if rng.random() < 0.3:
            file.write_bytes(damaged(rng.choice(sweeps), rng))
            sweep = Sweep.read(file)
            for trial in sweep.trials(3):
                sweep.command_of(trial, "python")
            return
        as_values = rng.random() < 0.5
        file.write_bytes(
            yaml.safe_dump(with_other_values(plain(config), rng)).encode() if as_values else damaged(sound, rng)
        )
        if rng.random() < 0.2:  # takes a tenth of a second
            read_config(Config, file)
        else:
            yaml_arguments(file, Config, trusted=())

    return one


def runs(material: Material) -> Callable[[random.Random], None]:
    """All files of a run, a checkpoint and a sample set, through reports, comparisons, loading, scoring and resuming."""
    from vaetrain.data.readers.read_order import ReadOrder
    from vaetrain.distributed import processes
    from vaetrain.export import load_run
    from vaetrain.model.autoencoder import VAE
    from vaetrain.report.document import report
    from vaetrain.runs import rerun
    from vaetrain.runs.comparison import Comparison, Result
    from vaetrain.runs.directory import RunDirectory
    from vaetrain.sampling.reader import SampleReader
    from vaetrain.training.checkpoint import Checkpoints
    from vaetrain.training.meters import Meters
    from vaetrain.training.optimizer import build_optimizer
    from vaetrain.training.resume import resume_point
    from vaetrain.training.spikes import SpikeDetector

    material.make_run()
    accelerator = processes.start()
    run, samples = RunDirectory(material.folder / "damaged"), material.folder / "damaged_samples"
    dataset, vae = RunDirectory(material.run).dataset(), VAE(material.config.model)
    checkpoints = Checkpoints(
        run, material.config.checkpoint, accelerator, model=vae, ema=VAE(material.config.model),
        optimizer=build_optimizer(vae, material.config.optim), spikes=SpikeDetector(100.0, accelerator.device),
        meters=Meters(("loss", "distortion_nats", "rate_nats", "grad_norm"), accelerator),
    )  # fmt: skip
    reading = ReadOrder("any", 1, 1, 4)

    def resume() -> None:
        found = resume_point(run, material.config, dataset, reading, 16, {})
        if found is not None:
            checkpoints.load(found)

    def read_samples() -> None:
        for _ in SampleReader.open(samples).batches(accelerator, 4, 2):
            pass

    def tell() -> None:
        list(rerun.differences(run)), list(rerun.caveats(run))

    def compare() -> None:
        comparison = Comparison((Result.read(material.run), Result.read(run.path)))
        comparison.headline(), comparison.table(), comparison.code_between(Path(__file__).parent)

    uses: list[Callable[[], object]] = [
        lambda: report([run.path]), lambda: report([material.run, run.path]), run.metrics, resume, tell, compare,
        lambda: load_run(run.path).position(), lambda: RunDirectory.open(run.path).config(),
    ]  # fmt: skip
    inner = [file for file in material.run.rglob("*") if file.is_file() and file.suffix != ".png"]

    def one(rng: random.Random) -> None:
        if rng.random() < 0.1:
            shutil.rmtree(samples, ignore_errors=True)
            shutil.copytree(material.samples, samples)
            _damage(rng.choice([samples / "manifest.json", samples / "rank-0000-000000.tar"]), rng)
            read_samples()
            return
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(material.run, run.path)
        file = run.path / rng.choice(inner).relative_to(material.run)
        _damage(file, rng)
        if file.parent.name.startswith("step-") and file.name != "checksums.json" and rng.random() < 0.9:
            sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in file.parent.iterdir()}
            del sums["checksums.json"]
            (file.parent / "checksums.json").write_text(json.dumps(sums))
        rng.choice(uses)()

    return one


def _damage(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    if rng.random() < 0.03:
        file.unlink()
    elif file.suffix == ".json" and rng.random() < 0.6:
        file.write_text(json.dumps(with_other_values(json.loads(content), rng)))
    elif file.suffix == ".jsonl" and rng.random() < 0.6:
        lines = [json.loads(line) for line in content.splitlines()]
        lines[rng.randrange(len(lines))] = with_other_values(rng.choice(lines), rng)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    elif file.suffix == ".safetensors" and rng.random() < 0.5:
        header = 8 + struct.unpack("<Q", content[:8])[0]
        file.write_bytes(damaged(content[:header], rng) + content[header:])
    else:
        file.write_bytes(damaged(content, rng))


KINDS: dict[str, Callable[[Material], Callable[[random.Random], None]]] = {
    "manifest": manifests, "tar": tars, "image": images, "safetensors": safetensors_files, "config": configs, "run": runs,
}  # fmt: skip


def fuzz(kind: str, num: int, seed: int, folder: Path) -> Outcome:
    """Damage and read so many files of a kind in an empty folder."""
    rng, outcome, before = random.Random(f"{kind} {seed}"), Outcome(kind), 0
    one = KINDS[kind](Material(folder))
    previous = signal.signal(signal.SIGALRM, _hang)
    try:
        for number in range(num):
            outcome.ends[_end_of(one, rng)] += 1
            if number == min(100, num - 1):
                before = _resident()
        outcome.growth = max(0, _resident() - before)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return outcome


def _hang(*_: object) -> None:
    raise Hang


def _end_of(one: Callable[[random.Random], None], rng: random.Random) -> str:
    began = time.process_time()
    signal.alarm(HANGS_S)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            one(rng)
        end = "read"
    except (ValueError, OSError):
        end = "refused"
    except (Exception, SystemExit, Hang) as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/vaetrain/vaetrain/" in frame.filename]
        place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        end = f"{type(error).__name__}: {str(error)[:80]!r}{place}"
    finally:
        signal.alarm(0)
    return "slow" if end in ("read", "refused") and time.process_time() - began > SLOW_S else end


def _resident() -> int:
    """Bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0


def main(arguments: FuzzArguments) -> int:
    """Fuzz, print a line for each kind, return the exit code."""
    clean = True
    for kind in arguments.kinds or get_args(Kind):
        with tempfile.TemporaryDirectory() as folder:
            outcome = fuzz(kind, arguments.num or FULL_COUNTS.get(kind, 20_000), arguments.seed, Path(folder))
        print(outcome.describe(), flush=True)
        clean &= outcome.is_clean
    return 0 if clean else 1


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(parse(FuzzArguments, __doc__, flags=True)))
