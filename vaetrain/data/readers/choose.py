"""Which reader reads a split, without importing torch."""

from __future__ import annotations

import math
from typing import Literal

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.decoded_file import no_room
from vaetrain.data.readers.selection import Selection

DECODED_BYTES_PER_S = 60e6
"""Of JPEGs, by one worker (docs/LOG.md: 7,000 of 9 KB)."""
RESIZED_BYTES_PER_S = 25e6
"""The same with resizing, in Pillow."""
DEVICE_PIXELS_PER_S = 20_000 * 128 * 128
"""What a small network on a large GPU trains on; an estimate, above what the ready configurations ask for."""


def choose_reader(
    config: DataConfig, selection: Selection, *, remote: bool, num_workers: int | None = None
) -> tuple[Literal["indexed", "resident", "stream", "decoded"], str]:
    """The reader that `config` asks for or, with `auto`, the fastest that can read these images; and why.

    `num_workers` decode for a GPU; None: it is not for one, or not known.
    """
    reason = f"--data.reader {config.reader}"
    is_cut_anew = config.crop == "random" and selection.split == "train"
    if config.reader in ("resident", "decoded") and is_cut_anew:
        raise ValueError(
            f"--data.crop random cuts each image anew, and --data.reader {config.reader} keeps one cut; use indexed"
        )
    if config.reader != "auto":
        return config.reader, reason
    if remote:
        return "stream", f"{reason}, the shards are behind a URL"
    if is_cut_anew:
        return "indexed", f"{reason}, --data.crop random cuts each image anew"
    fits = selection.decoded_bytes <= config.resident_gib * 2**30
    size = f"{selection.decoded_bytes / 2**30:.2f} GiB decoded"
    reason += f", {size}, {'within' if fits else 'over'} --data.resident-gib {config.resident_gib:g}"
    if fits:
        return "resident", reason
    if num_workers is None:
        return "indexed", reason
    rate, wanted = decoding_rate(selection, num_workers), DEVICE_PIXELS_PER_S / math.prod(selection.image_shape[:2])
    if rate >= wanted:
        return "indexed", f"{reason}, {num_workers} workers decode some {rate:,.0f} images/s"
    reason += f", {num_workers} workers decode some {rate:,.0f} images/s, a GPU may ask for {wanted:,.0f}"
    if why_not := no_room(config, selection):
        return "indexed", f"{reason}, and decoded on disk it is {why_not}"
    return "decoded", reason


def decoding_rate(selection: Selection, num_workers: int) -> float:
    """About how many images so many workers decode in a second, by the size of their files."""
    bytes_per_s = RESIZED_BYTES_PER_S if selection.shard_set.manifest.resized else DECODED_BYTES_PER_S
    return max(1, num_workers) * bytes_per_s / float(selection.index.num_bytes.mean())
