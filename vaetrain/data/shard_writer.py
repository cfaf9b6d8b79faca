"""Writing samples into tars, byte for byte the same for the same samples."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from vaetrain.data.shards import TAR_BLOCK, Shard, SplitIndex

# tar pads a file to whole records of 20 blocks; other readers accept less, but GNU tar warns of "a lone zero block".
TAR_RECORD = 20 * TAR_BLOCK


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
        """Add a sample KEY.EXT and KEY.json; what is to be indexed has its class number as `label` in `record`.

        WebDataset takes everything after a key's first dot for the extension, so keys have none.
        """
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key), f"key {key!r} is not letters, digits, - and _"
        if self._file is None:
            self._open()
        offset = self._add(f"{key}.{ext}", image)
        self._add(f"{key}.json", json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode())
        self._rows.append((len(self.shards), offset, len(image), record.get("label")))
        self._num_images += 1
        if self._num_images == self._images_per_shard:
            self.close()

    def close(self) -> None:
        """Complete the shard that has been begun, if one has."""
        if self._file is None:
            return
        end = bytes(2 * TAR_BLOCK)
        self._put(end + bytes(-(self._num_bytes + len(end)) % TAR_RECORD))
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
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._partial.unlink()

    def _open(self) -> None:
        self._name = f"{self._prefix}-{self._first_shard + len(self.shards):06d}.tar"
        # The process number keeps a second writer of the same shard from writing into the first one's file.
        self._partial = self._aside / f".{self._name}.{os.getpid()}"
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._num_images = 0
        self._num_bytes = 0

    def _add(self, name: str, content: bytes) -> int:
        header = tarfile.TarInfo(name)  # time, owner and group 0: the same bytes whoever writes them, and no PAX header
        header.size = len(content)
        self._put(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._num_bytes
        self._put(content + bytes(-len(content) % TAR_BLOCK))
        return offset

    def _put(self, content: bytes) -> None:
        assert self._file is not None
        self._file.write(content)
        self._hash.update(content)
        self._num_bytes += len(content)
