"""Which image is read when: the order of an epoch and each process's part of it, without importing torch.

An epoch is a permutation of the split that depends on (seed, epoch) alone. Global batch k is a slice of it, process r
takes its part of that slice, and the images left over after the last whole global batch are dropped (others in every
epoch, since the next permutation leaves others at its end). So the same seed and global batch see the same images in the
same order on any number of processes, and the position in the data is one integer, `images_seen`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, UInt64


def epoch_order(num_images: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """The permutation of range(num_images) that epoch `epoch` of a run seeded `seed` follows."""
    # RandomState's stream is frozen (NEP 19), a Generator's may change with NumPy: a resumed run may have upgraded.
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(num_images).astype(np.int64, copy=False)


@dataclass(frozen=True)
class BatchLayout:
    """Who takes which part of a global batch: process r the r-th equal part of it, cut into micro-batches."""

    global_batch_size: int
    """Images per optimizer step, over all processes and accumulation steps."""

    micro_batch_size: int
    """Images per forward pass in one process."""

    rank: int
    """This process, counted from 0."""

    num_processes: int
    """Processes that share the global batch."""

    @classmethod
    def of(cls, global_batch_size: int, micro_batch_size: int | None, rank: int, num_processes: int) -> BatchLayout:
        """The same with `micro_batch_size` None for a process's whole part of the global batch: no accumulation."""
        return cls(global_batch_size, micro_batch_size or global_batch_size // num_processes or 1, rank, num_processes)

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide, naming the nearest that do."""
        assert 0 <= self.rank < self.num_processes, f"rank {self.rank} of {self.num_processes}"
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--train.{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.global_batch_size % self.num_processes:
            raise ValueError(
                f"--train.global-batch-size {self.global_batch_size} does not divide among {self.num_processes} "
                f"processes of --train.micro-batch-size {self.micro_batch_size}; the nearest that work are "
                f"{self._nearest_global_batch_sizes()}"
            )
        per_process = self.per_process_batch_size
        if per_process % self.micro_batch_size:
            divisors = [size for size in range(1, per_process + 1) if per_process % size == 0]
            below = max(size for size in divisors if size <= self.micro_batch_size)
            above = min((size for size in divisors if size > self.micro_batch_size), default=None)
            raise ValueError(
                f"--train.micro-batch-size {self.micro_batch_size} does not divide the {per_process} images per process "
                f"of --train.global-batch-size {self.global_batch_size} on {self.num_processes} process(es); the nearest "
                f"that work are {below}{f' and {above}' if above else ''}, or --train.global-batch-size "
                f"{self._nearest_global_batch_sizes()}"
            )

    def _nearest_global_batch_sizes(self) -> str:
        unit = self.num_processes * self.micro_batch_size
        below = self.global_batch_size // unit * unit
        return f"{below} and {below + unit}" if below else f"{unit}"

    @property
    def per_process_batch_size(self) -> int:
        """Images of a global batch that each process takes."""
        return self.global_batch_size // self.num_processes

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches a process sums over before one optimizer step."""
        return self.per_process_batch_size // self.micro_batch_size

    def images_per_epoch(self, num_images: int) -> int:
        """Images in the whole global batches of one epoch; raises ValueError when there is not even one."""
        if num_images < self.global_batch_size:
            raise ValueError(
                f"the split has {num_images} images, fewer than one global batch; "
                f"set --train.global-batch-size to at most {num_images} (it is {self.global_batch_size})"
            )
        return num_images // self.global_batch_size * self.global_batch_size

    def steps_per_epoch(self, num_images: int) -> int:
        """Global batches of one epoch."""
        return self.images_per_epoch(num_images) // self.global_batch_size

    def micro_batches_per_epoch(self, num_images: int) -> int:
        """Micro-batches of one epoch in each process."""
        return self.steps_per_epoch(num_images) * self.grad_accum_steps

    def check_position(self, images_seen: int) -> None:
        """Raise ValueError unless `images_seen` lies between two global batches."""
        if images_seen < 0 or images_seen % self.global_batch_size:
            raise ValueError(
                f"cannot start after {images_seen} images: it is no multiple of --train.global-batch-size "
                f"{self.global_batch_size}; resume with the global batch size the run was started with"
            )

    def positions(self, global_batch_start: int) -> tuple[slice, ...]:
        """This process's micro-batches of the global batch that starts there, as slices of the epoch's order."""
        start = global_batch_start + self.rank * self.per_process_batch_size
        stop = start + self.per_process_batch_size
        return tuple(slice(at, at + self.micro_batch_size) for at in range(start, stop, self.micro_batch_size))


def train_indices(
    num_images: int, seed: int, images_seen: int, layout: BatchLayout
) -> Iterator[Int64[np.ndarray, " micro"]]:
    """Endless micro-batches of image indices for this process, from the global position `images_seen` on.

    Raises ValueError when `images_seen` is inside a global batch or the split is smaller than one.
    """
    images_per_epoch = layout.images_per_epoch(num_images)
    layout.check_position(images_seen)
    # The checks stand outside the generator so that they fail here and not at its first batch.
    return _endless_micro_batches(num_images, images_per_epoch, seed, images_seen, layout)


def _endless_micro_batches(
    num_images: int, images_per_epoch: int, seed: int, images_seen: int, layout: BatchLayout
) -> Iterator[Int64[np.ndarray, " micro"]]:
    epoch, start = divmod(images_seen, images_per_epoch)
    while True:
        order = epoch_order(num_images, seed, epoch)
        for global_batch_start in range(start, images_per_epoch, layout.global_batch_size):
            for micro_batch in layout.positions(global_batch_start):
                yield order[micro_batch]
        epoch, start = epoch + 1, 0


def seen_before(micro_batch: int, layout: BatchLayout) -> Int64[np.ndarray, " micro"]:
    """How many images a run has seen, over all processes, before each image of this process's micro-batch number `micro_batch`."""
    step, part = divmod(micro_batch, layout.grad_accum_steps)
    place = layout.positions(step * layout.global_batch_size)[part]
    return np.arange(place.start, place.stop, dtype=np.int64)


def crop_places(seed: int, seen: Int64[np.ndarray, " b"]) -> Float64[np.ndarray, " b"]:
    """Where a training image is cut out of its longer side, in [0, 1), by the seed and the images seen before it.

    SplitMix64 (Steele, Lea and Flood 2014) of a counter, started from the seed: the same with any NumPy.
    """
    with np.errstate(over="ignore"):
        state = _mixed(np.full(1, seed % 2**64, np.uint64)) + (seen.astype(np.uint64) + np.uint64(1)) * GOLDEN
    return (_mixed(state) >> np.uint64(11)) / 2.0**53


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(state: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def eval_indices(
    num_images: int, batch_size: int, rank: int, num_processes: int
) -> Iterator[Int64[np.ndarray, " batch"]]:
    """Every image exactly once over all processes: block j of `batch_size` consecutive images goes to j mod processes.

    The blocks are the same for any number of processes; the last may be partial, and a process may have none.
    """
    for start in eval_starts(num_images, batch_size, rank, num_processes):
        yield np.arange(start, min(start + batch_size, num_images), dtype=np.int64)


def eval_starts(num_images: int, batch_size: int, rank: int, num_processes: int) -> range:
    """The first image of each of a process's evaluation batches."""
    return range(rank * batch_size, num_images, num_processes * batch_size)
