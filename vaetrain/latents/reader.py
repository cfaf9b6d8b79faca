"""Batches of latents in the order that images have: what a second stage trains on.

    latents of a split (in memory, or by offset) → rows → mean, logvar → z ~ q(z|x), of the image or of its mirrored twin

Which latent comes when is data/readers/order.py's, so the position in training is one integer, `images_seen`. Noise and mirror
coins are functions of (seed, images_seen), others than training's own of the same seed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from vaetrain.data.readers.order import BatchLayout, eval_indices, train_indices
from vaetrain.data.readers.resident import DEVICE_MEMORY_SHARE
from vaetrain.data.readers.shared_array import Gather, SharedArray
from vaetrain.distributed import processes
from vaetrain.distributed.randomness import mixed_seed, noise_of_images, noise_of_training
from vaetrain.latents.latent_set import LatentSet, StoredSplit
from vaetrain.latents.manifest import LatentManifest
from vaetrain.latents.record import FLIP
from vaetrain.machine import available_memory
from vaetrain.model.posterior import DiagonalGaussian, PointMass, Posterior
from vaetrain.upload import upload

POSTERIOR = 31
"""What the randomness is for: a second stage that draws noise of its own with the same seed shall not meet that of z."""

ROWS_PER_TASK = 256
NUM_THREADS = 4
BATCHES_AHEAD = 8


class LatentBatch(NamedTuple):
    """Latents as they leave a reader, on its device; float32, not normalised."""

    z: Float32[Tensor, "b *latent"]
    """One draw from the posterior."""
    posterior: Posterior
    """q(z|x): `.mean`, `.logvar` (a PointMass, of a deterministic encoder, has none)."""
    labels: Int64[Tensor, " b"]
    """Class numbers of the manifest."""
    indices: Int64[Tensor, " b"]
    """Positions in the split, those of its images in a reader of images with the same --data.classes."""


class LatentReader:
    """The latents of one split, as `vaetrain/encode.py` wrote them, in either layout.

    Attributes: `manifest`, `num_images`, `latent_shape`, `description`; `mean` and `std`, (c, 1, 1) or (c,), float32, of z over the
    training images, whichever split this is; `in_memory`.
    """

    def __init__(
        self,
        latents: LatentSet,
        split: Literal["train", "val"] = "train",
        *,
        device: str | torch.device = "cpu",
        resident_gib: float = 4.0,
        rank: int = 0,
        gather: Gather | None = None,
    ) -> None:
        """Keeps the split in memory where it takes at most `resident_gib`, once for the processes of a node that have a `gather`.

        Otherwise threads read batches by offset, some ahead. Raises ValueError or FileNotFoundError for what verify_shards.py
        would find without --full.
        """
        latents.verify()
        self._stored = latents.split(split)
        self._record = latents.record
        self._device = torch.device(device)
        self.manifest: LatentManifest = latents.manifest
        self.num_images = len(self._stored)
        self.latent_shape = latents.manifest.latent_shape
        by_channel = (-1, *(1 for _ in self.latent_shape[1:]))
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=self._device).reshape(by_channel)
            for values in (self.manifest.statistics.mean, self.manifest.statistics.std)
        )
        self._labels = torch.from_numpy(self._stored.label.astype(np.int64))
        num_bytes = self.num_images * self._record.num_bytes
        self.in_memory = num_bytes <= resident_gib * 2**30
        self._rows = _in_memory(self._stored, rank, gather) if self.in_memory else None
        where = "read by offset"
        if self._rows is not None:
            if (
                self._device.type == "cuda"
                and num_bytes <= DEVICE_MEMORY_SHARE * torch.cuda.mem_get_info(self._device)[0]
            ):
                self._rows = self._rows.to(self._device)
            where = f"in memory on {self._rows.device}"
        self.description = (
            f"{self.num_images:,} latents {' × '.join(map(str, self.latent_shape))} in {self.manifest.dtype} from {latents.folder} "
            f"({split}), {num_bytes / 2**20:,.1f} MiB {where}"
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: Literal["train", "val"] = "train",
        *,
        device: str | torch.device = "cpu",
        resident_gib: float = 4.0,
        accelerator: Accelerator | None = None,
    ) -> LatentReader:
        """Open a folder of latents; with an `accelerator` (whose device it then is) a collective, which shares memory."""
        latents = LatentSet.open(path)
        if accelerator is None:
            return cls(latents, split, device=device, resident_gib=resident_gib)
        gather = partial(processes.gather_integers, accelerator) if accelerator.num_processes > 1 else None
        return cls(
            latents, split, device=accelerator.device, resident_gib=resident_gib, rank=accelerator.process_index, gather=gather
        )  # fmt: skip

    def train_batches(self, seed: int, images_seen: int, layout: BatchLayout) -> Iterator[LatentBatch]:
        """Endless micro-batches of this process from the global position `images_seen` on, in the order that images have.

        z is redrawn at every position, and the twin chosen with probability 1/2 where there is one: functions of
        (seed, images_seen), whatever the number of processes. Raises ValueError when `images_seen` is inside a global batch or
        the split smaller than one.
        """
        indices = train_indices(self.num_images, seed, images_seen, layout)
        starts = count(images_seen, layout.global_batch_size)
        positions = chain.from_iterable(map(layout.positions, starts))
        return (
            self._training_batch(seed, where, *each)
            for where, each in zip(positions, self._read(indices), strict=False)
        )

    def eval_batches(
        self, batch_size: int, rank: int = 0, num_processes: int = 1, *, seed: int = 0
    ) -> Iterator[LatentBatch]:
        """One pass, each latent exactly once over all processes, never the twin; z depends on (seed, index) alone."""
        return (
            self._batch(
                indices, parts, noise_of_images(mixed_seed(seed, POSTERIOR), indices.tolist(), self.latent_shape)
            )
            for indices, parts in self._read(eval_indices(self.num_images, batch_size, rank, num_processes))
        )

    def first(self, num_images: int) -> LatentBatch:
        """The first latents of the split, or all when it has fewer, as `eval_batches` gives them."""
        return next(self.eval_batches(min(num_images, self.num_images)))

    def check_encoder(self, weights_sha256: str) -> None:
        """Raise ValueError unless these weights encoded the latents; `vaetrain.export.weights_sha256` names a run's."""
        if weights_sha256 != self.manifest.encoder.sha256:
            raise ValueError(
                f"{self._stored.folder} was encoded by weights with SHA-256 {self.manifest.encoder.sha256}, and the first stage's "
                f"have {weights_sha256}; encode its images with vaetrain/encode.py"
            )

    def normalize(self, z: Float[Tensor, "b *latent"]) -> Float[Tensor, "b *latent"]:
        """(z − mean) / std by channel; raises ValueError for latents of which a channel never varies."""
        self._check_spread()
        return (z - self.mean) / self.std

    def denormalize(self, z: Float[Tensor, "b *latent"]) -> Float[Tensor, "b *latent"]:
        """The inverse of `normalize`: what the first stage decodes."""
        self._check_spread()
        return z * self.std + self.mean

    def _check_spread(self) -> None:
        if dead := [channel for channel, std in enumerate(self.manifest.statistics.std) if std == 0]:
            raise ValueError(f"latent channel(s) {dead} have the same value everywhere and cannot be normalised")

    def _training_batch(self, seed: int, where: slice, indices: np.ndarray, parts: dict[str, Tensor]) -> LatentBatch:
        noise, mirrored = noise_of_training(mixed_seed(seed, POSTERIOR), where, self.latent_shape, self._device)
        if self.manifest.flipped:
            twin = mirrored.view(-1, *(1 for _ in self.latent_shape))
            names = [name for name in parts if not name.endswith(FLIP)]
            parts = {name: torch.where(twin, parts[name + FLIP], parts[name]) for name in names}
        return self._batch(indices, parts, noise)

    def _batch(self, indices: np.ndarray, parts: dict[str, Tensor], noise: Tensor) -> LatentBatch:
        mean = parts["mean"]
        posterior = DiagonalGaussian(mean, parts["logvar"]) if self.manifest.variational else PointMass(mean)
        numbers = torch.from_numpy(indices)
        z = posterior.sample(noise=upload(noise, self._device))
        return LatentBatch(z, posterior, upload(self._labels[numbers], self._device), upload(numbers, self._device))

    def _read(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """The parts of the latents at these indices, on the device."""
        for indices, rows in self._rows_of(batches):
            yield indices, self._record.unpack(upload(rows, self._device))

    def _rows_of(self, batches: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, UInt8[Tensor, "b row"]]]:
        if self._rows is not None:
            for indices in batches:
                if self._rows.device.type == "cpu":  # NumPy's gather, for the reason in data/readers/resident.py
                    yield indices, torch.from_numpy(np.take(self._rows.numpy(), indices, axis=0, mode="clip"))
                else:
                    numbers = upload(torch.from_numpy(indices), self._rows.device)
                    yield indices, torch.index_select(self._rows, 0, numbers)
            return
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="latents") as threads:
            started = ((indices, threads.submit(_rows_at, self._stored, indices)) for indices in batches)
            pending = deque(islice(started, BATCHES_AHEAD))
            while pending:
                indices, rows = pending.popleft()
                pending.extend(islice(started, 1))
                yield indices, rows.result()


def _rows_at(stored: StoredSplit, indices: Int64[np.ndarray, " b"]) -> UInt8[Tensor, "b row"]:
    rows = np.empty((len(indices), stored.record.num_bytes), np.uint8)
    stored.read(indices, rows)
    return torch.from_numpy(rows)


def _in_memory(stored: StoredSplit, rank: int, gather: Gather | None) -> UInt8[Tensor, "n row"]:
    """All latents of a split, read by the processes of a node together; a collective with `gather`."""
    num_bytes, available = len(stored) * stored.record.num_bytes, available_memory()
    if available is not None and num_bytes > available:
        raise ValueError(
            f"{stored.folder}: the latents take {num_bytes / 2**30:.2f} GiB and {available / 2**30:.2f} GiB are "
            "available; pass a smaller resident_gib to read them from the files"
        )
    share = SharedArray.agree(num_bytes, rank, gather)
    rows = share.memory_array((len(stored), stored.record.num_bytes))
    with share.fill_collectively():
        for start in range(share.part * ROWS_PER_TASK, len(stored), share.num_parts * ROWS_PER_TASK):
            positions: Sequence[int] = range(start, min(start + ROWS_PER_TASK, len(stored)))
            stored.read(np.array(positions), rows[start : start + len(positions)])
    return torch.from_numpy(rows)
