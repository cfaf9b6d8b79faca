"""An HTTP server on this machine that misbehaves on demand."""

import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vaetrain.data.remote.remote_file import Persistence

HASTY = Persistence(timeout_s=0.3, attempts=3, first_wait_s=0.01, longest_wait_s=0.02)
CONTENT = bytes(range(256)) * 12_289  # three mebibytes and a bit


@dataclass
class Behaviour:
    """How the server answers requests for one path."""

    content: bytes = CONTENT
    status: int = 200
    statuses: list[int] = field(default_factory=list)  # for one request after the other; then `status`
    drop_after: list[int] = field(default_factory=list)  # bytes sent of the body, for one connection after the other
    ranges: bool = True
    etag: str | None = '"one"'
    content_type: str = "application/octet-stream"
    has_length: bool = True
    stall_s: float = 0.0  # between two pieces of the body
    wrong_range: bool = False
    longest_range: int | None = None
    raw: tuple[bytes, bytes] | None = None  # sent in place of an answer: first the one, then the other for ever
    redirect: str | None = None
    requests: list[dict[str, str]] = field(default_factory=list)


class Server:
    """Serves behaviours by path, and says what it was asked."""

    def __init__(self) -> None:
        paths: dict[str, Behaviour] = {}
        self.paths = paths
        self.closing = closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                behaviour = paths.get(self.path.lstrip("/"), Behaviour(status=404))
                behaviour.requests.append(dict(self.headers))
                if behaviour.raw:
                    self.trickle(*behaviour.raw)
                    return
                if behaviour.redirect:
                    self.send_response(302)
                    self.send_header("Location", behaviour.redirect)
                    self.end_headers()
                    return
                status = behaviour.statuses.pop(0) if behaviour.statuses else behaviour.status
                if status != 200:
                    self.send_error(status)
                    return
                start, last = self.range_of(behaviour)
                size = len(behaviour.content)
                if start is not None and start >= size:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.end_headers()
                    return
                self.send_response(200 if start is None else 206)
                if start is not None and behaviour.wrong_range:
                    start += 1
                body = behaviour.content[start or 0 : last + 1]
                if start is not None:
                    self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
                if behaviour.has_length:
                    self.send_header("Content-Length", str(len(body)))
                if behaviour.etag:
                    self.send_header("ETag", behaviour.etag)
                self.send_header("Content-Type", behaviour.content_type)
                self.end_headers()
                stop = behaviour.drop_after.pop(0) if behaviour.drop_after else len(body)
                try:
                    if behaviour.stall_s:
                        for position in range(0, stop, 16):
                            self.wfile.write(body[position : position + 16])
                            if closing.wait(behaviour.stall_s):
                                return
                    else:
                        self.wfile.write(body[:stop])
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up, as it should

            def trickle(self, first: bytes, again: bytes) -> None:
                with suppress(ConnectionError):
                    self.wfile.write(first)
                    while not closing.wait(0.02):
                        self.wfile.write(again)

            def range_of(self, behaviour: Behaviour) -> tuple[int | None, int]:
                end = len(behaviour.content) - 1
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not asked or not behaviour.ranges or self.headers.get("If-Range") not in (None, behaviour.etag):
                    return None, end
                last = int(asked[2] or end)
                if behaviour.longest_range:
                    last = min(last, int(asked[1]) + behaviour.longest_range - 1)
                return int(asked[1]), min(end, last)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, path: str, **behaviour: Any) -> str:
        self.paths[path] = Behaviour(**behaviour)
        return self.url + path

    def requests(self, path: str) -> list[dict[str, str]]:
        return self.paths[path].requests

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
