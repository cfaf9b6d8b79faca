"""Who reads which stretch of the shards when they are read front to back, without importing torch.

An epoch lays the shards end to end in an order that depends on (seed, epoch), drops what exceeds whole global batches (a
random part of it at either end), and cuts the rest into equal pieces by image count: one per process, and that one into
one per worker. A shard may lie in several pieces: each of their workers opens it and reads over what is not its own. So any
number of processes and workers can read any number of shards; with fewer shards than workers the only cost is bytes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vaetrain.data.readers.order import BatchLayout

# Encoded images a worker holds to shuffle; at 9 KB (128 pixels) 18 MB.
SHUFFLE_BUFFER = 2000


@dataclass(frozen=True)
class WorkerSlice:
    """What one worker reads of one epoch."""

    images: range
    """In the epoch's shards laid end to end."""

    batches: range
    """The micro-batches it makes of them, as numbers in the sequence of its process, counted from the run's start."""


def train_piece(
    num_images: int, seed: int, epoch: int, layout: BatchLayout, piece: int, num_workers: int
) -> WorkerSlice:
    """Piece number `piece` of the `num_workers` of a process in an epoch. Micro-batch t is in piece t mod num_workers."""
    per_epoch = layout.micro_batches_per_epoch(num_images)

    def batches_of(piece: int) -> range:
        first = epoch * per_epoch
        return range(first + (piece - first) % num_workers, first + per_epoch, num_workers)

    num_dropped = num_images - layout.images_per_epoch(num_images)
    dropped_before = random.Random(f"{seed} {epoch}").randint(0, num_dropped)
    batches_before = layout.rank * per_epoch + sum(len(batches_of(other)) for other in range(piece))
    batches = batches_of(piece)
    first = dropped_before + batches_before * layout.micro_batch_size
    return WorkerSlice(range(first, first + len(batches) * layout.micro_batch_size), batches)


def eval_piece(num_images: int, batch_size: int, part: int, num_parts: int) -> range:
    """The images of part `part` of a pass: whole batches, but for the last of the split, an equal stretch of them each."""
    num_batches = -(-num_images // batch_size)
    start, stop = (num_batches * edge // num_parts * batch_size for edge in (part, part + 1))
    return range(start, min(stop, num_images))


def too_few_shards(num_shards: int, num_processes: int, num_workers: int) -> str | None:
    """Why training does not stream from so few shards; None when each worker has one of its own.

    Every image would still come once, but workers would open the same shards and read each in part, over a network.
    """
    if num_shards >= num_processes * max(1, num_workers):
        return None
    fits = num_shards // num_processes
    fewer = f"lower --data.num-workers to {fits} or less" if fits else f"use at most {num_shards:,} processes"
    return (
        f"{num_shards:,} shards are fewer than {num_processes} × {max(1, num_workers)} stream workers, which would all open the "
        f"same ones; {fewer}, or make more shards (tools/make_shards.py --images-per-shard)"
    )


def workers_for(num_shards: int, num_processes: int, num_workers: int) -> int:
    """At most `num_workers` in each process, so that each has a shard of its own where there are as many as processes."""
    return min(num_workers, max(1, num_shards // num_processes))
