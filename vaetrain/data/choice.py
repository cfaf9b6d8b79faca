"""Which reader reads a split, without importing torch."""

from __future__ import annotations

from typing import Literal

from vaetrain.data.config import DataConfig
from vaetrain.data.selection import Selection
from vaetrain.data.shards import MANIFEST_NAME


def remote_folder(location: str) -> str | None:
    """The folder of a shard set named by a URL, with its trailing slash, and None for a path.

    Raises ValueError for a scheme that is not read, such as webdataset's `pipe:`, which runs a command.
    """
    scheme = location.partition(":")[0].lower() if ":" in location else ""
    if scheme in ("http", "https"):
        return location.removesuffix(MANIFEST_NAME).rstrip("/") + "/"
    if "://" in location or scheme == "pipe":
        raise ValueError(f"{location}: only paths and http(s) URLs are read, not {scheme}:")
    return None


def choose_reader(
    config: DataConfig, selection: Selection, *, remote: bool
) -> tuple[Literal["indexed", "resident", "stream"], str]:
    """The reader that `config` asks for or, with `auto`, the fastest that can read these images; and why."""
    reason = f"--data.reader {config.reader}"
    if config.reader != "auto":
        return config.reader, reason
    if remote:
        return "stream", reason
    fits = selection.decoded_bytes <= config.resident_gib * 2**30
    size = f"{selection.decoded_bytes / 2**30:.2f} GiB decoded"
    reason += f", {size}, {'within' if fits else 'over'} --data.resident-gib {config.resident_gib:g}"
    return "resident" if fits else "indexed", reason
