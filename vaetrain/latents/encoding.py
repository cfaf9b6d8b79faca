"""From images to the files of a latent set: which process makes which, and what a finished one leaves behind.

Which latent lies in which file is a matter of its position in the split alone, and batches of images begin with the file; so on a
CPU any number of processes writes the same bytes. A finished file leaves a note in OUT/.partial, and a rerun of the same request
skips it; index, statistics and manifest come last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from safetensors.torch import save_file
from torch import Tensor

from vaetrain.data.format.index import SplitIndex, pack_index
from vaetrain.data.format.manifest import INDEX_NAME, MANIFEST_NAME, Tool
from vaetrain.data.format.writer import ShardWriter
from vaetrain.data.readers.reader import Reader
from vaetrain.distributed.arithmetic import ieee_fp32
from vaetrain.documents import read_json
from vaetrain.files import fsync, replace_file, sha256_of_file
from vaetrain.latents.latent_set import TENSOR_OF_PART, LatentSet
from vaetrain.latents.manifest import (
    FORMAT_VERSION,
    KIND,
    STATS_NAME,
    Encoder,
    LatentFile,
    LatentManifest,
    LatentSplit,
    LatentStatistics,
    Layout,
)  # fmt: skip
from vaetrain.latents.record import DTYPES, FLIP, LatentRecord
from vaetrain.latents.statistics import ChannelSums, statistics_of, total
from vaetrain.model.autoencoder import VAE
from vaetrain.model.posterior import DiagonalGaussian
from vaetrain.progress_bar import ProgressBar
from vaetrain.runs.directory import write_json
from vaetrain.strict_json import differences, sha256_of_json
from vaetrain.upload import upload

PARTIAL_NAME = ".partial"
REQUEST_NAME = "request.json"


@dataclass(frozen=True)
class Request:
    """All that decides the content of a latent set."""

    layout: Layout
    record: LatentRecord
    encoder: Encoder
    image_size: int
    batch_size: int
    images_per_file: int
    device: str
    kept_classes: tuple[str, ...]
    sources: dict[str, str]
    """Fingerprint of the shard set of each split."""

    def __post_init__(self) -> None:
        """Refuse what cannot be written."""
        if self.layout == "safetensors" and len(self.record.shape) != 3:
            raise ValueError(
                f"--layout safetensors is of latents (c, h, w), and this model's are {self.record.shape}; use --layout webdataset"
            )

    def to_json(self) -> dict[str, Any]:
        """As a mapping of plain values, for files and messages."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))

    @property
    def digest(self) -> str:
        """Tells a rerun from another request."""
        return sha256_of_json(self.to_json())


@dataclass(frozen=True)
class FileTask:
    """Latents `start` to `stop` of a split, one file."""

    layout: Layout
    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of the file, in OUT."""
        if self.layout == "webdataset":
            return f"{self.split}-{self.number:06d}.tar"
        return f"{self.split}/latents-{self.number:06d}.safetensors"

    @property
    def note_name(self) -> str:
        """Of what a finished file leaves in OUT/.partial."""
        return f"{self.split}-{self.number:06d}.json"


def tasks_of(layout: Layout, num_images: Mapping[str, int], images_per_file: int) -> list[FileTask]:
    """The files of a latent set, in reading order."""
    return [
        FileTask(layout, split, number, start, min(start + images_per_file, count))
        for split, count in num_images.items()
        for number, start in enumerate(range(0, count, images_per_file))
    ]


@dataclass(frozen=True)
class FinishedFile:
    """A file that is whole, with its part of index and statistics."""

    request: str
    """Digest of the request it belongs to."""
    file: LatentFile
    offset: tuple[int, ...]
    num_bytes: tuple[int, ...]
    label: tuple[int, ...]
    sums: ChannelSums

    @classmethod
    def of(cls, out: Path, task: FileTask, request: Request) -> FinishedFile | None:
        """The note of `task` if its file is there and has the SHA-256 it says; raises ValueError for a damaged note."""
        path = out / PARTIAL_NAME / task.note_name
        try:
            note: FinishedFile = read_json(path, cls, remedy="delete it and start again")
        except FileNotFoundError:
            return None
        file = out / task.name
        whole = note.request == request.digest and file.is_file() and file.stat().st_size == note.file.num_bytes
        return note if whole and sha256_of_file(file) == note.file.sha256 else None


class EncodedBatch(NamedTuple):
    """Posteriors of some images, on the CPU, as float32."""

    indices: Int64[np.ndarray, " b"]
    labels: list[int]
    parts: dict[str, Float32[Tensor, "b *latent"]]


def prepare(out: Path, request: Request) -> bool:
    """Make `out` this request's; True when it already holds the whole set. For the main process alone.

    Raises FileExistsError when it holds anything else.
    """
    asked = request.to_json()
    if (out / MANIFEST_NAME).is_file():
        latents = LatentSet.open(out)
        if changes := differences(latents.manifest.tool.arguments, asked):
            raise FileExistsError(f"{out} already holds a latent set ({changes}); choose another --out")
        latents.verify()
        shutil.rmtree(out / PARTIAL_NAME, ignore_errors=True)  # killed after the manifest was written
        return True
    begun = out / PARTIAL_NAME / REQUEST_NAME
    if begun.is_file():
        if changes := differences(read_json(begun, remedy="delete it and start again"), asked):
            raise FileExistsError(
                f"{out} holds the beginning of another latent set ({changes}); repeat that command to finish it, delete it, or "
                "choose another --out"
            )
        return False
    if out.exists() and (not out.is_dir() or any(entry.name != PARTIAL_NAME for entry in out.iterdir())):
        raise FileExistsError(f"{out} is not empty and holds no latent set; choose another --out, or empty it")
    begun.parent.mkdir(parents=True, exist_ok=True)
    if request.layout == "safetensors":
        for split in request.sources:
            (out / split).mkdir(exist_ok=True)
    write_json(begun, asked)
    return False


def encode_files(
    vae: VAE, reader: Reader, tasks: Sequence[FileTask], out: Path, request: Request, bar: ProgressBar
) -> Iterator[FinishedFile]:
    """Encode and write the files of one split that this process has to make, and their notes."""
    if not tasks:
        return
    positions = np.concatenate([np.arange(task.start, task.stop) for task in tasks])
    images = reader.subset(positions)
    try:
        # Batches begin with files: each is of a multiple of the batch size, but for the split's last.
        batches = images.eval_batches(request.batch_size, 0, 1)
        device = next(vae.parameters()).device
        for task in tasks:
            num_batches = -(-(task.stop - task.start) // request.batch_size)
            encoded = (
                EncodedBatch(
                    positions[batch.indices.cpu().numpy()],
                    batch.labels.tolist(),
                    posterior_parts(vae, upload(batch.images, device), flipped=request.record.flipped),
                )
                for batch in islice(batches, num_batches)
            )
            checked = bar.counting(_checked(encoded, task, request.record), size=lambda batch: len(batch.labels))
            write = _write_tar if request.layout == "webdataset" else _write_tensors
            note = write(task, checked, out, request, reader.manifest.classes)
            replace_file(out / PARTIAL_NAME / task.note_name, json.dumps(dataclasses.asdict(note)).encode())
            yield note
    finally:
        images.close()


@torch.no_grad()
def posterior_parts(
    vae: VAE, images: UInt8[Tensor, "b c h w"], *, flipped: bool
) -> dict[str, Float32[Tensor, "b *latent"]]:
    """mean and logvar of q(z|x), and with `flipped` those of the mirrored images; in fp32, on the CPU."""
    parts: dict[str, Tensor] = {}
    with ieee_fp32(images.device):
        for suffix, pixels in (("", images), *([(FLIP, images.flip(-1))] if flipped else [])):
            posterior = vae.encode(vae.from_uint8(pixels).contiguous(memory_format=torch.channels_last))
            parts["mean" + suffix] = posterior.mean.cpu()
            if isinstance(posterior, DiagonalGaussian):
                parts["logvar" + suffix] = posterior.logvar.cpu()
    return parts


def _checked(batches: Iterator[EncodedBatch], task: FileTask, record: LatentRecord) -> Iterator[EncodedBatch]:
    """What is to be stored, rounded; raises ValueError for what is not finite."""
    for batch in batches:
        parts = record.rounded(batch.parts)
        finite = torch.stack([part.flatten(1).isfinite().all(1) for part in parts.values()]).all(0)
        if not finite.all():
            bad = int(batch.indices[int((~finite).nonzero()[0])])
            raise ValueError(
                f"the latent of image {bad} of the {task.split} split is not finite in {record.dtype}; try --dtype fp32"
            )
        yield batch._replace(parts=parts)


def _write_tar(
    task: FileTask, batches: Iterator[EncodedBatch], out: Path, request: Request, classes: Sequence[str]
) -> FinishedFile:
    record, sums = request.record, []
    size = task.stop - task.start
    with ShardWriter(out, task.split, size, first_shard=task.number, aside=out / PARTIAL_NAME) as writer:
        for batch in batches:
            sums.append(ChannelSums.of(batch.parts))
            for number, its_label, row in zip(
                batch.indices.tolist(), batch.labels, record.pack(batch.parts), strict=True
            ):
                facts = {"label": its_label, "class": classes[its_label], "index": number}
                writer.write(f"{number:08d}", record.header + row.numpy().tobytes(), "safetensors", facts)
    [shard] = writer.shards
    index = writer.index()
    offset, num_bytes, label = (tuple(column.tolist()) for column in (index.offset, index.num_bytes, index.label))
    file = LatentFile(**dataclasses.asdict(shard))
    return FinishedFile(request.digest, file, offset, num_bytes, label, total(sums))


def _write_tensors(
    task: FileTask, batches: Iterator[EncodedBatch], out: Path, request: Request, classes: Sequence[str]
) -> FinishedFile:
    done = list(batches)
    dtype = DTYPES[request.record.dtype]
    tensors = {
        TENSOR_OF_PART[name]: torch.cat([batch.parts[name].to(dtype) for batch in done]).contiguous()
        for name in request.record.parts
    }
    label = [each for batch in done for each in batch.labels]
    tensors["labels"] = torch.tensor(label)
    tensors["index"] = torch.from_numpy(np.concatenate([batch.indices for batch in done]))
    aside, file = out / PARTIAL_NAME / task.name.replace("/", "-"), out / task.name
    save_file(tensors, aside, metadata={"format": "pt"})
    fsync(aside)
    written = LatentFile(task.name, len(label), aside.stat().st_size, sha256_of_file(aside))
    aside.replace(file)
    sums = total([ChannelSums.of(batch.parts) for batch in done])
    return FinishedFile(request.digest, written, (), (), tuple(label), sums)


def complete(
    out: Path, request: Request, finished: Mapping[str, Sequence[FinishedFile]], classes: Sequence[str]
) -> LatentManifest:
    """Write index, statistics and manifest of files that are all there, by split. For the main process alone."""
    splits, indices = {}, {}
    for name, notes in finished.items():
        label = np.array([each for note in notes for each in note.label], dtype=np.int64)
        counts = np.bincount(label, minlength=len(classes)).tolist()
        files = tuple(note.file for note in notes)
        splits[name] = LatentSplit(len(label), dict(zip(classes, counts, strict=True)), files, request.sources[name])
        if request.layout == "webdataset":
            shard = np.repeat(np.arange(len(files), dtype=np.int32), [file.num_images for file in files])
            offset, num_bytes = (
                np.array([each for note in notes for each in getattr(note, column)], dtype=np.int64)
                for column in ("offset", "num_bytes")
            )
            indices[name] = SplitIndex(shard, offset, num_bytes, label)
    statistics = statistics_of(total([note.sums for note in finished["train"]]))
    index_sha256 = None
    if request.layout == "webdataset":
        index = pack_index(indices)
        index_sha256 = hashlib.sha256(index).hexdigest()
        replace_file(out / INDEX_NAME, index)
    else:
        for name in finished:
            replace_file(out / name / STATS_NAME, stats_file(statistics))
    versions = {name: version(name) for name in ("vaetrain", "torch")}
    manifest = LatentManifest(
        format_version=FORMAT_VERSION,
        kind=KIND,
        layout=request.layout,
        dtype=request.record.dtype,
        latent_shape=request.record.shape,
        variational=request.record.variational,
        flipped=request.record.flipped,
        encoder=request.encoder,
        image_size=request.image_size,
        batch_size=request.batch_size,
        device=request.device,
        classes=tuple(classes),
        kept_classes=request.kept_classes,
        splits=splits,
        index_sha256=index_sha256,
        statistics=statistics,
        tool=Tool(versions, request.to_json(), request.digest),
    )
    manifest.write(out)
    shutil.rmtree(out / PARTIAL_NAME)
    return manifest


def stats_file(statistics: LatentStatistics) -> bytes:
    """The content of latents_stats.pt: mean and std of the stored means, (1, c, 1, 1) float32 each."""
    pairs = {"mean": statistics.mean, "std": statistics.std_of_means}
    content = io.BytesIO()
    torch.save({name: torch.tensor(values).reshape(1, -1, 1, 1) for name, values in pairs.items()}, content)
    return content.getvalue()
