"""A remote file that is read in sequence whatever the line does: connected to anew where it breaks, and given up in time."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from vaetrain.data.remote.connection import (
    PROGRESS_BYTES,
    BrokenOffError,
    CannotContinueError,
    Connection,
    FsspecConnection,
    HttpConnection,
    UnavailableError,
    is_http,
)
from vaetrain.files import READ_BYTES

Result = TypeVar("Result")


@dataclass(frozen=True)
class Persistence:
    """When a file is given up; by default well within the 30 s in which a run that cannot go on must stop."""

    give_up_s: float = 15.0
    """Seconds, over all attempts, in which 64 KiB must come."""

    timeout_s: float = 6.0
    """Seconds in which an HTTP connection must bring 64 KiB, or an answer."""

    attempts: int = 8
    """Connections in a row that bring the file no further (by 64 KiB)."""

    first_wait_s: float = 0.25
    """Seconds between the first two attempts; doubled after each."""

    longest_wait_s: float = 4.0
    """Seconds between attempts, at most."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if (
            min(self.give_up_s, self.timeout_s) <= 0
            or self.attempts < 1
            or min(self.first_wait_s, self.longest_wait_s) < 0
        ):
            raise ValueError(f"{self} asks for no attempt, or for times below zero")


DEFAULT_PERSISTENCE = Persistence()


class RemoteFile(io.RawIOBase):
    """The file behind a URL from byte `start` to `stop` (None: its end).

    `num_bytes` is the size it should have. `version` is the version that it must have all along ("": the one it has when its first
    byte comes); None where whoever reads checks the bytes. Reading raises UnavailableError saying why the file is given up; the
    caller says which file it is. Seeking forward reads over up to a mebibyte and asks for a new range beyond.
    """

    def __init__(
        self,
        url: str,
        *,
        start: int = 0,
        stop: int | None = None,
        num_bytes: int | None = None,
        version: str | None = None,
        persistence: Persistence = DEFAULT_PERSISTENCE,
    ) -> None:
        self.version = version
        self._url, self._persistence = url, persistence
        self._position, self._stop, self._num_bytes = start, stop, num_bytes
        self._connection: Connection | None = None
        self._furthest = start
        self._failures: list[str] = []  # since the file came any further
        self._received, self._waited_s = 0, 0.0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes, and best forward."""
        return True

    def tell(self) -> int:
        """Position in the file."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte counted from the file's start, or from here."""
        assert whence in (io.SEEK_SET, io.SEEK_CUR), "a remote file is not read from its end"
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        self._furthest, self._failures = self._position, []
        connection = self._connection
        if connection and not 0 <= self._position - connection.at <= (
            READ_BYTES if connection.seekable else sys.maxsize
        ):
            self._disconnect()
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill some of a buffer; 0 at `stop`, and where the file ends without one."""
        view = memoryview(buffer).cast("B")
        if self._stop is not None:
            view = view[: max(0, self._stop - self._position)]
        if not view:
            return 0
        return self._persistently(lambda: self._receive(view))

    def connect(self) -> Connection:
        """The connection, opened where there is none; it tells of the file before the first byte is read."""
        return self._persistently(self._connected)

    def close(self) -> None:
        """Give the connection up."""
        self._disconnect()
        super().close()

    def _persistently(self, call: Callable[[], Result]) -> Result:
        while True:
            try:
                return call()
            except BrokenOffError as error:
                self._disconnect()
                self._back_off(error)

    def _connected(self) -> Connection:
        if self._connection is None:
            if self._position and self.version == "":
                raise CannotContinueError(
                    f"nothing would show that the file there is still the one of which {self._position:,} bytes are here"
                )
            left = self._persistence.give_up_s - self._waited_s
            with self._timed():
                if is_http(self._url):
                    timeout_s = min(left, self._persistence.timeout_s)
                    self._connection = HttpConnection(
                        self._url, self._position, self._stop, timeout_s, self.version or ""
                    )
                else:
                    self._connection = FsspecConnection(self._url, self._position, left)
            self._check(self._connection)
        return self._connection

    def _check(self, connection: Connection) -> None:
        found, expected = connection.num_bytes, self._num_bytes
        if found is not None and expected is not None and found != expected:
            raise UnavailableError(f"the file there has {found:,} bytes, not {expected:,}")
        if self.version is not None:
            # A server that goes on in the middle was asked to do so for this version only, and need not repeat its name.
            version = connection.version or (self.version if connection.at else "")
            if self._position and version != self.version:
                raise CannotContinueError(
                    f"the file there is no longer the one of which {self._position:,} bytes are here"
                )
            self.version = version

    def _receive(self, view: memoryview) -> int:
        connection = self._connected()
        while connection.at < self._position:
            before = memoryview(bytearray(min(READ_BYTES, self._position - connection.at)))
            if not self._receive_from(connection, before):
                raise UnavailableError(f"the file there ends at byte {connection.at:,}")
        received = self._receive_from(connection, view)
        if not received and self._position < (connection.num_bytes or 0):
            raise BrokenOffError(f"the answer ended at byte {self._position:,} of {connection.num_bytes:,}")
        if not received and self._stop is not None:
            raise UnavailableError(f"the file there ends at byte {self._position:,}")
        self._position += received
        if self._position - self._furthest >= PROGRESS_BYTES:
            self._furthest, self._failures = self._position, []
        return received

    def _receive_from(self, connection: Connection, view: memoryview) -> int:
        with self._timed():
            received = connection.receive(view)
        self._received += received
        if self._received >= PROGRESS_BYTES:
            self._received, self._waited_s = 0, 0.0
        return received

    def _back_off(self, error: BrokenOffError) -> None:
        persistence = self._persistence
        wait = min(persistence.longest_wait_s, persistence.first_wait_s * 2 ** len(self._failures))
        self._failures.append(str(error))
        if len(self._failures) >= persistence.attempts or self._waited_s + wait >= persistence.give_up_s:
            causes = ", then ".join(dict.fromkeys(self._failures))
            raise UnavailableError(f"{causes} (given up after {len(self._failures)} attempt(s))") from error
        print(f"{self._url.rpartition('/')[2]}: {error}; trying again in {wait:g} s", file=sys.stderr, flush=True)
        with self._timed():
            time.sleep(wait)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts what is spent waiting, and not the time in which nobody reads."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - began

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None
