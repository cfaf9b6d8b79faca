"""An opened folder of latents: where each lies, and whether the files are what the manifest says. The format: manifest.py."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from vaetrain.data.format.index import SplitIndex
from vaetrain.data.format.manifest import INDEX_NAME
from vaetrain.data.format.shard_set import problem_of_file, read_index
from vaetrain.data.readers.selection import open_shard
from vaetrain.documents import parse_json
from vaetrain.latents.manifest import STATS_NAME, LatentFile, LatentManifest, LatentStatistics, manifest_file
from vaetrain.latents.record import FLIP, LatentRecord
from vaetrain.latents.statistics import ChannelSums, statistics_of, total

REMEDY = "copy it from where the latents came from, or delete the folder and run vaetrain/encode.py again"
TENSOR_OF_PART = {
    "mean": "latents",
    "mean" + FLIP: "latents" + FLIP,
    "logvar": "logvar",
    "logvar" + FLIP: "logvar" + FLIP,
}
"""Names in the layout safetensors."""
SAFETENSORS_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredSplit:
    """The latents of a split, each read by its place in the files."""

    folder: Path
    files: tuple[LatentFile, ...]
    record: LatentRecord
    header: bytes
    """What precedes each latent; the layout safetensors has it once a file, and nothing here."""
    file: Int64[np.ndarray, " n"]
    """Position in `files`."""
    offset: Int64[np.ndarray, "n pieces"]
    """First byte of each piece of a latent: of the header and all parts, or of each part."""
    label: Int64[np.ndarray, " n"]
    """Position in the manifest's classes."""

    def __len__(self) -> int:
        """Latents."""
        return len(self.file)

    def read(self, positions: Int64[np.ndarray, " b"], out: UInt8[np.ndarray, "b row"]) -> None:
        """Fill rows with latents; raises ValueError naming the file and what to do when one cannot be read."""
        header = bytearray(len(self.header))
        for position, row in zip(positions.tolist(), out, strict=True):
            name = self.files[int(self.file[position])].name
            pieces = [piece.data for piece in np.split(row, self.offset.shape[1])]
            try:
                descriptor = open_shard(self.folder, name).fileno()
                num_read = os.preadv(descriptor, [header, pieces[0]], int(self.offset[position, 0]))
                for piece, offset in zip(pieces[1:], self.offset[position, 1:].tolist(), strict=True):
                    num_read += os.preadv(descriptor, [piece], offset)
            except OSError as error:
                raise ValueError(f"{self.folder / name}: {error}; is the storage still there?") from error
            if num_read < len(header) + row.nbytes or header != self.header:
                raise ValueError(f"{self.folder / name} does not hold latent {position} where it should; {REMEDY}")


class LatentSet:
    """An opened folder of latents."""

    def __init__(self, folder: Path, manifest: LatentManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.record = LatentRecord(manifest.latent_shape, manifest.dtype, manifest.variational, manifest.flipped)

    @classmethod
    def open(cls, path: str | Path) -> LatentSet:
        """Open a folder, or its manifest.json; raises FileNotFoundError when there is no manifest."""
        file = manifest_file(path)
        return cls(file.parent, LatentManifest.read(file))

    def split(self, name: str) -> StoredSplit:
        """The latents of a split.

        Raises ValueError naming the splits there are, or a file that is not what the manifest says, and FileNotFoundError.
        """
        if name not in self.manifest.splits:
            raise ValueError(f"{self.folder} has no split {name}; it has {', '.join(self.manifest.splits)}")
        split = self.manifest.splits[name]
        if self.manifest.layout == "webdataset":
            index, header = self._indices[name], self.record.header
            if not np.all(index.num_bytes == len(header) + self.record.num_bytes):
                raise ValueError(
                    f"{self.folder / INDEX_NAME} has latents of another size than the manifest's; {REMEDY}"
                )
            places = index.shard.astype(np.int64), index.offset[:, None], index.label
        else:
            header, places = b"", self._places_in_tensors(split.shards)
        stored = StoredSplit(self.folder, split.shards, self.record, header, *places)
        counts = np.bincount(stored.label, minlength=len(self.manifest.classes)).tolist()
        if counts != list(split.class_counts.values()):
            raise ValueError(f"the {name} split of {self.folder} has other labels than its manifest counts; {REMEDY}")
        return stored

    @cached_property
    def _indices(self) -> dict[str, SplitIndex]:
        assert self.manifest.index_sha256 is not None, "the layout webdataset has an index"
        return read_index(self.folder / INDEX_NAME, self.manifest.index_sha256, self.manifest.splits, REMEDY)

    def _places_in_tensors(self, files: tuple[LatentFile, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        numbers, offsets, labels = [], [], []
        for number, file in enumerate(files):
            tensors = read_header(self.folder / file.name)
            expected = {TENSOR_OF_PART[part]: (file.num_images, *self.record.shape) for part in self.record.parts}
            dtype = SAFETENSORS_NAMES[self.record.dtype]
            wanted = {name: (dtype, shape) for name, shape in expected.items()} | {
                "labels": ("I64", (file.num_images,))
            }
            for name, (kind, shape) in wanted.items():
                found = tensors.get(name)
                if found is None or (found.dtype, found.shape) != (kind, shape):
                    raise ValueError(
                        f"{self.folder / file.name} has no tensor {name}, {kind} of shape {shape}; {REMEDY}"
                    )
            rows = np.arange(file.num_images, dtype=np.int64)
            begins = np.array([tensors[name].begin for name in expected])
            numbers.append(np.full(file.num_images, number, dtype=np.int64))
            offsets.append(begins + self.record.part_bytes * rows[:, None])
            with (self.folder / file.name).open("rb") as opened:
                opened.seek(tensors["labels"].begin)
                labels.append(np.frombuffer(opened.read(8 * file.num_images), dtype="<i8"))
        label = np.concatenate(labels)
        if label.min() < 0 or label.max() >= len(self.manifest.classes):
            raise ValueError(f"{self.folder} has labels that are not among its manifest's classes; {REMEDY}")
        return np.concatenate(numbers), np.concatenate(offsets), label

    def verify(self, full: bool = False) -> None:
        """Raise ValueError listing every file that is missing or of the wrong size, and a damaged index.

        `full` also takes each file's SHA-256, reads each latent, and computes the statistics anew.
        """
        problems = []
        for name, split in self.manifest.splits.items():
            found = [problem_of_file(self.folder / file.name, file, full) for file in split.shards]
            problems += list(filter(None, found))
            if any(found):
                continue
            try:
                stored = self.split(name)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
                continue
            if full:
                problems += self._problems_of_values(name, stored)
        if problems:
            listing = "".join(f"\n  {problem}" for problem in problems)
            raise ValueError(
                f"{self.folder} has {len(problems)} problem(s):{listing}\n"
                f"Copy the files named again from where they came, or delete {self.folder} and run vaetrain/encode.py."
            )

    def _problems_of_values(self, name: str, stored: StoredSplit) -> Iterator[str]:
        sums = []
        for start in range(0, len(stored), self.manifest.batch_size):
            positions = np.arange(start, min(start + self.manifest.batch_size, len(stored)))
            rows = np.empty((len(positions), self.record.num_bytes), np.uint8)
            stored.read(positions, rows)
            parts = self.record.unpack(torch.from_numpy(rows))
            if not all(part.isfinite().all() for part in parts.values()):
                yield f"{name}: a latent from number {start} on is not finite"
            sums.append(ChannelSums.of(parts))
        if name != "train":
            return
        found, said = statistics_of(total(sums)), self.manifest.statistics
        if not _agree(found, said):
            yield f"the latents have statistics {found}, the manifest says {said}"
        if self.manifest.layout == "safetensors" and not self._stats_file_agrees():
            yield f"{name}/{STATS_NAME} is missing, or not the manifest's statistics"

    def _stats_file_agrees(self) -> bool:
        file, said = self.folder / "train" / STATS_NAME, self.manifest.statistics
        if not file.is_file():
            return False
        stats = torch.load(file, weights_only=True)
        pairs = (("mean", said.mean), ("std", said.std_of_means))
        return all(torch.equal(stats[name].flatten(), torch.tensor(values)) for name, values in pairs)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; raises ValueError or FileNotFoundError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {REMEDY}")
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        try:
            content: dict[str, Any] = parse_json(opened.read(min(size, MAX_HEADER_BYTES)))
            return {
                name: StoredTensor(each["dtype"], tuple(each["shape"]), 8 + size + each["data_offsets"][0])
                for name, each in content.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no safetensors file: {error}; {REMEDY}") from error


def _agree(a: LatentStatistics, b: LatentStatistics) -> bool:
    """Up to what another number of threads may round differently."""
    pairs = [
        pair
        for name in ("mean", "std", "std_of_means")
        for pair in zip(getattr(a, name), getattr(b, name), strict=True)
    ]
    scale = max(b.std)
    return a.num_images == b.num_images and all(
        math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6 * scale) for x, y in pairs
    )
