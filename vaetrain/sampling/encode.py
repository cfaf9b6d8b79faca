"""PNG files of new images, made by threads while the next images are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jaxtyping import UInt8
from torch import Tensor

from vaetrain.data.format.encode import png
from vaetrain.distributed import processes
from vaetrain.machine import num_cores

MOST_THREADS = 16
Numbers = TypeVar("Numbers", bound=Sequence[int] | Tensor)


def with_png(
    blocks: Iterable[tuple[Numbers, UInt8[Tensor, "b c h w"]]],
) -> Iterator[tuple[Numbers, UInt8[Tensor, "b c h w"], Iterator[bytes]]]:
    """Each block of numbered images with the PNG files of its images in their order.

    A block comes when the one after it has been drawn. The threads share the node's cores with those of its other processes;
    Pillow compresses without the GIL.
    """
    num_threads = min(MOST_THREADS, max(1, num_cores() // processes.processes_per_node()))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="png") as threads:
        before = None
        for numbers, images in blocks:
            block = numbers, images, threads.map(png, images.cpu())
            if before is not None:
                yield before
            before = block
        if before is not None:
            yield before
