"""Writing samples into tars, byte for byte the same for the same samples."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vaetrain.data.format.index import SplitIndex
from vaetrain.data.format.manifest import TAR_BLOCK, Shard
from vaetrain.files import create, fresh_name, naming_file

# tar pads a file to whole records of 20 blocks; other readers accept less, but GNU tar warns of "a lone zero block".
TAR_RECORD = 20 * TAR_BLOCK
# Of a file without a name: time, owner and group 0, so the same bytes whoever writes them, and no PAX header. To fill in name,
# size and checksum takes 3 µs, tarfile's own way 12, which counts where a sample is made in 100.
_HEADER = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
_HEADER[148:156] = bytes(8 * b" ")
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each record


class Row(NamedTuple):
    """Where a sample's image lies in its shard, or in a run of samples."""

    offset: int
    num_bytes: int
    label: int | None
    """Position in the classes; None in what is not indexed."""


def pack_sample(key: str, image: bytes, ext: str, record: dict[str, Any]) -> bytes:
    """KEY.EXT and KEY.json as tar members, the image TAR_BLOCK bytes from the beginning.

    WebDataset takes everything after a key's first dot for the extension, so keys have none.
    """
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key), f"key {key!r} is not letters, digits, - and _"
    # backslashreplace makes a lone surrogate, of a file name that is no UTF-8, its escape in JSON.
    text = _JSON.encode(record).encode(errors="backslashreplace")
    return _member(f"{key}.{ext}", image) + _member(f"{key}.json", text)


class ShardWriter:
    """Writes samples into FOLDER/PREFIX-000000.tar, PREFIX-000001.tar, … of `images_per_shard` samples each.

    A shard appears under its name only when it is complete: it is written aside (in the folder `aside`, by default the
    shards' own) and renamed. Use it in a `with` block: an exception inside leaves the complete shards and no half one.

    Attributes: `shards`, what has been completed so far.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        images_per_shard: int = 1000,
        *,
        first_shard: int = 0,
        aside: Path | None = None,
    ) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._prefix = prefix
        self._images_per_shard = images_per_shard
        self._first_shard = first_shard
        self._aside = aside or folder
        self._rows: list[tuple[int, int, int, int | None]] = []
        self._file: BinaryIO | None = None

    def write(self, key: str, image: bytes, ext: str, record: dict[str, Any]) -> None:
        """Add a sample, as pack_sample does; what is to be indexed has its class number as `label` in `record`."""
        self.append(pack_sample(key, image, ext, record), [Row(TAR_BLOCK, len(image), record.get("label"))])

    def append(self, samples: bytes, rows: Sequence[Row]) -> None:
        """Add samples that lie end to end; as many as are left in a shard at most."""
        if not rows:
            return
        if self._file is None:
            self._open()
        self._rows += [(len(self.shards), self._num_bytes + row.offset, row.num_bytes, row.label) for row in rows]
        self._put(samples)
        self._num_images += len(rows)
        assert self._num_images <= self._images_per_shard
        if self._num_images == self._images_per_shard:
            self.close()

    def close(self) -> None:
        """Complete the shard that has been begun, if one has."""
        if self._file is None:
            return
        end = bytes(2 * TAR_BLOCK)
        self._put(end + bytes(-(self._num_bytes + len(end)) % TAR_RECORD))
        with naming_file(self._partial):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        self._partial.replace(self._folder / self._name)
        self.shards.append(Shard(self._name, self._num_images, self._num_bytes, self._hash.hexdigest()))

    def index(self) -> SplitIndex:
        """Where each image written so far lies, as positions in `shards`."""
        assert all(label is not None for *_, label in self._rows), "an image without a label cannot be indexed"
        columns = np.array(self._rows, dtype=np.int64).reshape(-1, 4).T.copy()
        return SplitIndex(columns[0].astype(np.int32), columns[1], columns[2], columns[3])

    def __enter__(self) -> ShardWriter:
        """Nothing is opened before the first sample."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the last shard, or remove what there is of it after an exception."""
        try:
            if kind is None:
                self.close()
        finally:
            if self._file is not None:
                with suppress(OSError):  # of a full disk, of which the exception tells that is on its way
                    self._file.close()
                self._partial.unlink()

    def _open(self) -> None:
        self._name = f"{self._prefix}-{self._first_shard + len(self.shards):06d}.tar"
        # A fresh name keeps a second writer of the same shard from writing into the first one's file, and both out of links.
        self._partial = fresh_name(self._aside / self._name)
        self._file = create(self._partial)
        self._hash = hashlib.sha256()
        self._num_images = 0
        self._num_bytes = 0

    def _put(self, content: bytes) -> None:
        assert self._file is not None
        with naming_file(self._partial):
            self._file.write(content)
        self._hash.update(content)
        self._num_bytes += len(content)


def _member(name: str, content: bytes) -> bytes:
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % len(content)
    header[148:156] = b"%06o\0 " % sum(header)  # which is taken with spaces in its own place
    return bytes(header) + content + bytes(-len(content) % TAR_BLOCK)
