"""Which reader reads a split, without importing torch."""

from __future__ import annotations

from typing import Literal

from vaetrain.data.config import DataConfig
from vaetrain.data.readers.selection import Selection


def choose_reader(
    config: DataConfig, selection: Selection, *, remote: bool
) -> tuple[Literal["indexed", "resident", "stream"], str]:
    """The reader that `config` asks for or, with `auto`, the fastest that can read these images; and why."""
    reason = f"--data.reader {config.reader}"
    is_cut_anew = config.crop == "random" and selection.split == "train"
    if config.reader == "resident" and is_cut_anew:
        raise ValueError("--data.crop random cuts each image anew, and --data.reader resident keeps one cut; use indexed")
    if config.reader != "auto":
        return config.reader, reason
    if remote:
        return "stream", f"{reason}, the shards are behind a URL"
    if is_cut_anew:
        return "indexed", f"{reason}, --data.crop random cuts each image anew"
    fits = selection.decoded_bytes <= config.resident_gib * 2**30
    size = f"{selection.decoded_bytes / 2**30:.2f} GiB decoded"
    reason += f", {size}, {'within' if fits else 'over'} --data.resident-gib {config.resident_gib:g}"
    return "resident" if fits else "indexed", reason
