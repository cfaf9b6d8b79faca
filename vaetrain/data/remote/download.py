"""Files over HTTP: from the first mirror that has them, resumed where they stopped, and checked before they get their name."""

from __future__ import annotations

import errno
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vaetrain.files import sha256_of_file
from vaetrain.progress_bar import ProgressBar

CHUNK_BYTES = 1 << 18
PROGRESS_BYTES = 1 << 20  # a connection that brings less than this counts as one more failure
SLOWEST_BYTES_PER_S = 1024
RANGE_NOT_SATISFIABLE = 416
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Patience:
    """When a mirror is given up."""

    timeout_s: float = 30.0
    """Seconds without an answer, or at less than a kilobyte a second, after which a connection is given up."""

    attempts: int = 6
    """Connections in a row that bring the file no further (by a mebibyte) before the mirror is given up."""

    first_wait_s: float = 1.0
    """Seconds between the first two attempts; doubled after each."""

    longest_wait_s: float = 30.0
    """Seconds between attempts, at most."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.timeout_s <= 0 or self.attempts < 1 or self.first_wait_s < 0 or self.longest_wait_s < 0:
            raise ValueError(f"{self} asks for no attempt, or for times below zero")


PATIENCE = Patience()


class _MirrorFailedError(Exception):
    """This mirror will not give the file."""


class _BrokenOffError(Exception):
    """This connection is over; another may bring the rest."""


def download(
    urls: Sequence[str],
    path: Path,
    *,
    max_bytes: int,
    sha256: str | None = None,
    patience: Patience = PATIENCE,
) -> str:
    """Download one file from the first of its mirrors that has it; returns its SHA-256.

    A file that is already there is checked and kept. What has arrived so far lies in `path`.part and a later call resumes
    it (Range, If-Range); without `sha256`, only when the server says that the file is still the same one. A file with
    another checksum is set aside as `path`.wrong and never used. Raises ValueError when no mirror has the file, when the
    file at `path` has another checksum, and when the disk is full.
    """
    with readable_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = sha256_of_file(path)
            if sha256 not in (None, found):
                raise ValueError(f"{path} has SHA-256 {found}, not {sha256}; delete it and run the same command again")
            return found
        failures = []
        for url in urls:
            try:
                found = _Transfer(url, path, max_bytes, sha256, patience).run()
            except _MirrorFailedError as error:
                failures.append(f"{url}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            return found
    raise ValueError(
        f"cannot download {path.name}:\n  "
        + "\n  ".join(failures)
        + "\ncheck the network connection and run the same command again; it goes on where it stopped"
    )


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a folder that can be written"
        raise ValueError(f"cannot write {path}: {error.strerror or error}; {remedy}, then run it again") from error


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise ValueError when so many bytes more do not fit."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(f"{what} needs {num_bytes:,} bytes in {folder}, which has {free:,}; free some space")


class _Transfer:
    """One file from one mirror."""

    def __init__(self, url: str, path: Path, max_bytes: int, sha256: str | None, patience: Patience) -> None:
        self.url, self.path, self.max_bytes, self.sha256, self.patience = url, path, max_bytes, sha256, patience
        self.part = path.with_name(f"{path.name}.part")
        self.version = path.with_name(f"{path.name}.part.version")

    def run(self) -> str:
        """Complete, check and name the file; returns its SHA-256."""
        resumed = self._size() > 0
        self._complete()
        found = sha256_of_file(self.part)
        if self.sha256 not in (None, found):
            if resumed:  # the fault may lie in what an earlier run, or another mirror, has left
                self.part.unlink()
                return self.run()
            wrong = self.path.with_name(f"{self.path.name}.wrong")
            self.part.replace(wrong)
            self.version.unlink(missing_ok=True)
            raise _MirrorFailedError(f"its SHA-256 is {found}, not {self.sha256}; the file is set aside as {wrong}")
        self.part.replace(self.path)
        self.version.unlink(missing_ok=True)
        return found

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _complete(self) -> None:
        furthest, failures = self._size(), 0
        while True:
            try:
                self._receive()
            except _BrokenOffError as error:
                # Measured against the furthest point ever reached, so that a server which always starts over and always
                # breaks off is given up too.
                advanced = self._size() - furthest >= PROGRESS_BYTES
                furthest = max(furthest, self._size())
                failures = 1 if advanced else failures + 1
                if failures >= self.patience.attempts:
                    raise _MirrorFailedError(f"{error} (given up after {failures} attempts)") from error
                wait = min(self.patience.longest_wait_s, self.patience.first_wait_s * 2 ** (failures - 1))
                print(f"{self.path.name}: {error}; trying again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)
            else:
                return

    def _receive(self) -> None:
        offset = self._size()
        version = self.version.read_text() if self.version.exists() else ""
        if not version and self.sha256 is None:
            offset = 0  # nothing would show that the two halves are of the same file
        response = self._open(offset, version)
        if response is None:
            return
        with response:
            if response.status != 206:
                offset = 0
            total = self._total_bytes(response, offset)
            with self.part.open("ab" if offset else "wb") as file:
                if not offset:
                    self.version.write_text(_version_of(response))
                check_free_space(self.part.parent, (total or offset) - offset, self.path.name)
                with ProgressBar(self.path.name, total, "MB", done=offset, scale=10**6) as progress:
                    for chunk in self._chunks(response):
                        file.write(chunk)
                        offset += len(chunk)
                        if offset > self.max_bytes:
                            raise _MirrorFailedError(f"it sends more than {self.max_bytes:,} bytes")
                        progress.update(len(chunk))
        if total is not None and offset < total:
            raise _BrokenOffError(f"the connection ended after {offset:,} of {total:,} bytes")

    def _open(self, offset: int, version: str) -> HTTPResponse | None:
        """The answer, or None when all bytes are here."""
        headers = {"User-Agent": "vaetrain", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if version:
                headers["If-Range"] = version
        try:
            response: HTTPResponse = urlopen(Request(self.url, headers=headers), timeout=self.patience.timeout_s)
        except HTTPError as error:
            error.close()
            if error.code == RANGE_NOT_SATISFIABLE and offset:
                if error.headers.get("Content-Range") == f"bytes */{offset}":
                    return None
                self.part.unlink()
                raise _BrokenOffError("the file there is shorter than what had arrived of it") from error
            kind = _BrokenOffError if error.code in TRANSIENT_STATUS else _MirrorFailedError
            raise kind(f"the server answers {error.code} {error.reason}") from error
        except (OSError, HTTPException) as error:
            raise _BrokenOffError(f"no answer ({error})") from error
        return response

    def _total_bytes(self, response: HTTPResponse, offset: int) -> int | None:
        if response.headers.get_content_type() == "text/html":
            raise _MirrorFailedError("it answers with a web page in place of the file")
        if response.status == 206:
            answered = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not answered or int(answered[1]) != offset:
                self.part.unlink()
                raise _BrokenOffError("it answers with another range of bytes than the one asked for")
            total = int(answered[2])
        elif (length := response.headers.get("Content-Length", "")).isdecimal():
            total = int(length)
        elif self.sha256 is None:
            raise _MirrorFailedError(
                "it does not say how long the file is, so that nothing would show that it is whole"
            )
        else:
            return None
        if total > self.max_bytes:
            raise _MirrorFailedError(
                f"it offers {total:,} bytes, more than the {self.max_bytes:,} that this file may have"
            )
        return total

    def _chunks(self, response: HTTPResponse) -> Iterator[bytes]:
        start, received = time.perf_counter(), 0
        while True:
            try:
                chunk = response.read1(CHUNK_BYTES)
            except (OSError, HTTPException) as error:
                raise _BrokenOffError(f"the connection broke ({error or type(error).__name__})") from error
            if not chunk:
                return
            yield chunk
            received += len(chunk)
            elapsed = time.perf_counter() - start
            if elapsed > self.patience.timeout_s:
                if received < SLOWEST_BYTES_PER_S * elapsed:
                    raise _BrokenOffError(f"it sends only {received / elapsed:,.0f} bytes a second")
                start, received = time.perf_counter(), 0


def _version_of(response: HTTPResponse) -> str:
    # A weak ETag promises the same meaning, not the same bytes.
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
