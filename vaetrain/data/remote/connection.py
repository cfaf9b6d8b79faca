"""One attempt to read a remote file from some byte on: over HTTP, or through fsspec.

A connection is told where to start and hands over what comes next. BrokenOffError means that another attempt may succeed,
UnavailableError that none will. Waiting is bounded in every case. No torch here.

HTTP is ours because fsspec's client does not hold: it hands over another range of bytes than the one asked for without a
word, takes 503 for a missing file, and cannot start over where a server knows no ranges (docs/LOG.md, 2026-11-28).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from email.message import Message
from functools import partial
from http.client import HTTPException, HTTPResponse
from threading import Thread
from typing import Any, Protocol, runtime_checkable
from urllib.error import HTTPError
from urllib.request import Request

from vaetrain.http_deadline import Deadline, open_within

PROGRESS_BYTES = 1 << 16  # what an HTTP server must bring within the timeout
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
RANGE_NOT_SATISFIABLE = 416
# A request to an object store takes some 50 ms however little it asks for.
FSSPEC_CHUNK_BYTES = 1 << 21


class BrokenOffError(Exception):
    """This connection is over; another may bring the rest."""


class UnavailableError(ValueError):
    """No attempt will bring this file."""


class CannotContinueError(UnavailableError):
    """What the other side sends does not go on where the bytes end that are here."""


@runtime_checkable  # for the type checks of the tests
class Connection(Protocol):
    """The bytes of a file from some byte on."""

    at: int
    """The byte that comes next; after opening it is the one asked for, or 0 where the other side only starts there."""

    num_bytes: int | None
    """Size of the file, where the other side says it."""

    seekable: bool
    """Whether another connection could start in the middle of the file."""

    version: str
    """What stands for these very bytes (a strong ETag, or when they were last modified); "" where nothing does."""

    content_type: str
    """What the other side calls it; "" where it does not."""

    def receive(self, view: memoryview) -> int:
        """Fill some of `view` with what comes next and say how much; 0: the file ends here.

        Raises BrokenOffError when it takes longer than the connection's timeout.
        """
        ...

    def close(self) -> None:
        """Give the connection up."""
        ...


def is_http(url: str) -> bool:
    """Whether a URL is read by HttpConnection."""
    return url.partition(":")[0].lower() in ("http", "https")


class HttpConnection:
    """A GET request, for a range of bytes where the server knows ranges.

    A connection is broken off that brings its headers, or less than PROGRESS_BYTES, in over `timeout_s` seconds, whatever it
    sends between them. With `version`, the whole file is asked for in place of the range if it has another one by now.
    """

    def __init__(self, url: str, start: int, stop: int | None, timeout_s: float, version: str = "") -> None:
        headers = {"User-Agent": "vaetrain", "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            if version:
                headers["If-Range"] = version
        self._timeout_s = timeout_s
        self._broken: str | None = None
        self._end: int | None
        self.num_bytes: int | None
        self._deadline = Deadline(timeout_s)
        self._response = _answer(url, headers, start, self._deadline)
        headers_there = self._response.headers
        self.content_type = headers_there.get_content_type()
        self.version = _version_in(headers_there)
        self.seekable = self._response.status != 200
        if self._response.status == RANGE_NOT_SATISFIABLE:
            self.at = self._end = self.num_bytes = start
        elif self.seekable:
            answered = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers_there.get("Content-Range", ""))
            if not answered or int(answered[1]) != start:
                self.close()
                raise CannotContinueError("the server answers with another range of bytes than the one asked for")
            self.at = start
            self._end = int(answered[2]) + 1
            self.num_bytes = int(answered[3]) if answered[3] != "*" else None
        else:
            length = headers_there.get("Content-Length", "")
            self.at = 0
            self.num_bytes = int(length) if length.isdecimal() else None
            # An answer without a length is over when the connection ends, whatever ended it.
            self._end = stop if self.num_bytes is None else self.num_bytes

    def receive(self, view: memoryview) -> int:
        """See Connection. What has come before the connection breaks is handed over first."""
        view = view[: PROGRESS_BYTES if self._end is None else min(PROGRESS_BYTES, self._end - self.at)]
        received = 0
        self._deadline.restart(self._timeout_s)
        while received < len(view) and self._broken is None and self.at != self._end:
            try:
                chunk = self._response.read1(len(view) - received)
            except TimeoutError:
                self._broken = f"the server brought {received:,} bytes in {self._timeout_s:.2g} s"
                break
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
        if self._broken and not received:
            raise BrokenOffError(self._broken)
        return received

    def close(self) -> None:
        """See Connection."""
        self._response.close()


def _answer(url: str, headers: dict[str, str], start: int, deadline: Deadline) -> HTTPResponse | HTTPError:
    """A server's answer with the bytes, or one that says that the file ends at `start`."""
    try:
        response = open_within(Request(url, headers=headers), deadline)
    except HTTPError as error:
        error.close()
        if error.code == RANGE_NOT_SATISFIABLE and start:
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return error
            raise CannotContinueError(f"the file there ends before byte {start:,}") from error
        said = f"the server answers {error.code} {error.reason}"
        if error.code in TRANSIENT_STATUS:
            raise BrokenOffError(said) from error
        raise UnavailableError(said) from error
    except (OSError, HTTPException) as error:
        raise BrokenOffError(f"no answer ({error})") from error
    return response


def _version_in(headers: Message) -> str:
    # A weak ETag promises the same meaning, not the same bytes.
    etag: str = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


class FsspecConnection:
    """A file opened by the package that fsspec has for its scheme, read one chunk ahead.

    Every call is made in a thread of its own: few of those packages can be told how long to wait.
    """

    def __init__(self, url: str, start: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._file = self._result(_in_thread(partial(_open_with_fsspec, url, start)))
        self.at, self.num_bytes, self.seekable = start, getattr(self._file, "size", None), True
        self.version = self.content_type = ""
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
        except ValueError as error:
            raise UnavailableError(str(error)) from error
        except (FileNotFoundError, PermissionError) as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
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
