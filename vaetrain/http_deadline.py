"""HTTP requests that end in time, whatever the server sends and however slowly. Without importing torch.

http.client bounds each wait for bytes, so that a server that brings one now and then holds its reader for ever: in a header, in
the size of a chunk, in a trailer. Here one deadline stands over all of them, over redirects, and over each address of a host.
"""

from __future__ import annotations

import io
import socket
import time
import urllib.error
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any


class Deadline:
    """A moment by which an answer, or the next piece of one, must have come."""

    def __init__(self, timeout_s: float) -> None:
        self.restart(timeout_s)

    def restart(self, timeout_s: float) -> None:
        """Count anew from now."""
        self._until = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds; raises TimeoutError where there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        return left


def open_within(request: urllib.request.Request, deadline: Deadline) -> HTTPResponse:
    """As urllib's urlopen, over HTTP alone; each read of the answer ends by `deadline`, which its reader may restart.

    Raises what urlopen does, and TimeoutError, within an OSError or as it is.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), _Http(deadline), _Https(deadline), _Redirects(),
        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    response: HTTPResponse = opener.open(request, timeout=deadline.left_s())
    return response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's, which also follows to FTP, where no deadline holds."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise urllib.error.HTTPError(
                req.full_url, code, f"it leads to {newurl[:60]!r}, which is not HTTP", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _TimedFile(io.RawIOBase):
    """What comes through a socket until its deadline."""

    def __init__(self, file: Any, connected: socket.socket, deadline: Deadline) -> None:
        self._file, self._socket, self._deadline = file, connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._deadline.left_s())
        received: int | None = self._file.readinto(buffer)
        return received

    def close(self) -> None:
        self._file.close()
        super().close()


class _TimedResponse(HTTPResponse):
    def __init__(self, connected: socket.socket, *arguments: Any, deadline: Deadline, **options: Any) -> None:
        super().__init__(connected, *arguments, **options)
        self.fp = io.BufferedReader(_TimedFile(self.fp.detach(), connected, deadline))


def _connect(
    deadline: Deadline, address: tuple[str, int], timeout: object, source_address: Any = None
) -> socket.socket:
    """socket.create_connection, which would give each address of a host all of the time."""
    error: OSError = OSError(f"{address[0]} has no address")
    for found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            return socket.create_connection(found[4][:2], deadline.left_s(), source_address)  # type: ignore[arg-type]
        except OSError as failed:
            error = failed
    raise error


class _TimedConnection(HTTPConnection):
    def __init__(self, deadline: Deadline, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.response_class = partial(_TimedResponse, deadline=deadline)  # type: ignore[assignment]
        self._create_connection = partial(_connect, deadline)


class _TimedHttpsConnection(HTTPSConnection):
    def __init__(self, deadline: Deadline, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.response_class = partial(_TimedResponse, deadline=deadline)  # type: ignore[assignment]
        self._create_connection = partial(_connect, deadline)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_TimedConnection, self._deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_TimedHttpsConnection, self._deadline), req)
