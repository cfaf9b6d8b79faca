"""One attempt to read a remote file from some byte on: over HTTP, through fsspec, or from a command's output.

A connection is told where to start and hands over what comes next. BrokenOffError means that another attempt may succeed, a
ValueError that none will. Waiting is bounded in every case. No torch here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from http.client import HTTPException, HTTPResponse
from threading import Thread
from typing import Any, Protocol, runtime_checkable
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vaetrain.data.remote.download import TRANSIENT_STATUS

HTTP_TIMEOUT_S = 6.0
PROGRESS_BYTES = 1 << 16  # what an HTTP server must bring in that time
# A request to an object store takes some 50 ms however little it asks for.
FSSPEC_CHUNK_BYTES = 1 << 21


class BrokenOffError(Exception):
    """This connection is over; another may bring the rest."""


@runtime_checkable  # for the type checks of the tests
class Connection(Protocol):
    """The bytes of a file from some byte on."""

    at: int
    """The byte that comes next; after opening it is the one asked for, or 0 where the other side only starts there."""

    num_bytes: int | None
    """Size of the file, where the other side says it."""

    seekable: bool
    """Whether another connection could start in the middle of the file."""

    def receive(self, view: memoryview) -> int:
        """Fill some of `view` with what comes next and say how much; 0: the file ends here.

        Raises BrokenOffError when it takes longer than the connection's timeout.
        """
        ...

    def close(self) -> None:
        """Give the connection up."""
        ...


def connect(folder: str, name: str, start: int, stop: int | None, timeout_s: float) -> Connection:
    """Open file `name` of a remote folder, at byte `start` where that can be; byte `stop` will not be asked for.

    A connection is broken off that brings nothing for `timeout_s` seconds, or for HTTP_TIMEOUT_S if that is less.
    """
    scheme = folder.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return HttpConnection(folder + name, start, stop, min(timeout_s, HTTP_TIMEOUT_S))
    return FsspecConnection(folder + name, start, timeout_s)


class HttpConnection:
    """A GET request, for a range of bytes where the server knows ranges."""

    def __init__(self, url: str, start: int, stop: int | None, timeout_s: float) -> None:
        headers = {"User-Agent": "vaetrain", "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        self._timeout_s = timeout_s
        self._broken: str | None = None
        try:
            self._response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=timeout_s)
        except HTTPError as error:
            error.close()
            said = f"the server answers {error.code} {error.reason}"
            if error.code in TRANSIENT_STATUS:
                raise BrokenOffError(said) from error
            raise ValueError(said) from error
        except (OSError, HTTPException) as error:
            raise BrokenOffError(f"no answer ({error})") from error
        headers_there = self._response.headers
        self.seekable = self._response.status == 206
        if self.seekable:
            answered = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers_there.get("Content-Range", ""))
            if not answered or int(answered[1]) != start:
                self.close()
                raise BrokenOffError("the server answers with another range of bytes than the one asked for")
            self.at = start
            self._end: int | None = int(answered[2]) + 1
            self.num_bytes = int(answered[3]) if answered[3] != "*" else None
        else:
            length = headers_there.get("Content-Length", "")
            self.at = 0
            self._end = self.num_bytes = int(length) if length.isdecimal() else None
            if self._end is None:
                self._end = stop  # an answer without a length is over when the connection ends, whatever ended it

    def receive(self, view: memoryview) -> int:
        """See Connection. What has come before the connection breaks is handed over first."""
        view = view[:PROGRESS_BYTES]
        late, received = time.monotonic() + self._timeout_s, 0
        while received < len(view) and self._broken is None:
            try:
                chunk = self._response.read1(len(view) - received)
            except (OSError, HTTPException) as error:
                self._broken = f"the connection broke ({error or type(error).__name__})"
                break
            view[received : received + len(chunk)] = chunk
            received += len(chunk)
            self.at += len(chunk)
            if not chunk:
                if self._end is not None and self.at < self._end:
                    self._broken = f"the connection ended at byte {self.at:,} of {self._end:,}"
                break
            if time.monotonic() > late and received < len(view):
                self._broken = f"the server brought {received:,} bytes in {self._timeout_s:.2g} s"
        if self._broken and not received:
            raise BrokenOffError(self._broken)
        return received

    def close(self) -> None:
        """See Connection."""
        self._response.close()


class FsspecConnection:
    """A file opened by the package that fsspec has for its scheme, read one chunk ahead.

    Every call is made in a thread of its own: few of those packages can be told how long to wait.
    """

    def __init__(self, url: str, start: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._file = self._result(_in_thread(partial(_open_with_fsspec, url, start)))
        self.at, self.num_bytes, self.seekable = start, getattr(self._file, "size", None), True
        self._chunk = memoryview(b"")
        self._next = _in_thread(partial(self._file.read, FSSPEC_CHUNK_BYTES))

    def receive(self, view: memoryview) -> int:
        """See Connection."""
        if not self._chunk:
            self._chunk = memoryview(self._result(self._next))
            if self._chunk:
                self._next = _in_thread(partial(self._file.read, FSSPEC_CHUNK_BYTES))
        part, self._chunk = self._chunk[: len(view)], self._chunk[len(view) :]
        view[: len(part)] = part
        self.at += len(part)
        return len(part)

    def close(self) -> None:
        """See Connection."""
        # Not while a thread reads; it may never end.
        self._next.add_done_callback(lambda _: self._file.close())

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            said = (
                str(error)
                or f"it took over {self._timeout_s:.2g} s to open it or to bring {FSSPEC_CHUNK_BYTES:,} bytes"
            )
            raise BrokenOffError(said) from error
        except ValueError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # each package has errors of its own
            raise BrokenOffError(f"{type(error).__name__}: {error}") from error


def _open_with_fsspec(url: str, start: int) -> Any:
    import fsspec  # here, because few runs need it

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise ValueError(
            f"{scheme}: is read with a package that is not installed ({error}); install it, for example with pip install, "
            "or copy the shards to a folder"
        ) from error
    # Its own cache would fetch more than is read.
    file = files.open(path, "rb", cache_type="none")
    file.seek(start)
    return file


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # Not an executor, whose threads the interpreter waits for at its end.
    Thread(target=run, daemon=True).start()
    return future
