"""How far long work has come: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from vaetrain.data.shard_task import Piece

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Counts images on stderr, in a `with` block; `doing` is said first when it is not the main work."""

    def __init__(self, total: int, done: int = 0, doing: str = "") -> None:
        self.bar = tqdm(total=total, initial=done, desc=doing or None, unit="img", disable=not sys.stderr.isatty())
        self.total, self.done, self.first = total, done, done
        self.doing = f"{doing}: " if doing else ""
        self.start = self.last_line = time.perf_counter()

    def update(self, num_images: int) -> None:
        """So many more are done."""
        self.done += num_images
        self.bar.update(num_images)
        now = time.perf_counter()
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = (self.done - self.first) / (now - self.start)
            print(
                f"{self.doing}{self.done:,} of {self.total:,} images, {rate:,.0f} images/s", file=sys.stderr, flush=True
            )

    def counting(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """`pieces`, each of which is counted when it comes."""
        for piece in pieces:
            self.update(piece.num_originals)
            yield piece

    def __enter__(self) -> Progress:
        """The bar is there already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
