"""Which reader reads a split, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.decoded_file import no_room
from vaetrain.data.readers.selection import Selection
from vaetrain.data.readers.shared_array import Gather

DEVICE_PIXELS_PER_S = 20_000 * 128 * 128
"""What a small network on a large GPU trains on; an estimate, above what the ready configurations ask for."""


def choose_reader(
    config: DataConfig,
    selection: Selection,
    *,
    remote: bool,
    decoding_rate: Callable[[], float] | None = None,
    gather: Gather | None = None,
) -> tuple[Literal["indexed", "resident", "stream", "decoded"], str]:
    """The reader that `config` asks for or, with `auto`, the fastest that can read these images; and why.

    `decoding_rate` measures how many images a second the workers of a GPU decode, and is called where that decides; None: it is
    not for a GPU, or not known. With `gather` a collective: the slowest process and the fullest disk decide for all.
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
    if decoding_rate is None:
        return "indexed", reason
    why_not = no_room(config, selection)
    mine = [round(decoding_rate()), int(why_not is None)]
    rates, have_room = zip(*(gather(mine) if gather else [mine]), strict=True)
    rate, wanted = min(rates), DEVICE_PIXELS_PER_S / math.prod(selection.image_shape[:2])
    reason += f", measured: the workers of a GPU decode {rate:,} images/s"
    if rate >= wanted:
        return "indexed", reason
    reason += f", and it may ask for {wanted:,.0f}"
    if not all(have_room):
        why_not = why_not or f"more than is free on the node of process {have_room.index(0)}"
        return "indexed", f"{reason}, and decoded on disk it is {why_not}"
    return "decoded", reason
