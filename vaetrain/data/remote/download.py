"""Files over HTTP: from the first mirror that has them, resumed where they stopped, and checked before they get their name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vaetrain.data.remote.connection import CannotContinueError, UnavailableError
from vaetrain.data.remote.remote_file import Persistence, RemoteFile
from vaetrain.files import check_free_space, readable_disk_errors, sha256_of_file
from vaetrain.progress_bar import ProgressBar

CHUNK_BYTES = 1 << 18
PERSISTENCE = Persistence(give_up_s=600.0, timeout_s=30.0, attempts=6, first_wait_s=1.0, longest_wait_s=30.0)


def download(
    urls: Sequence[str],
    path: Path,
    *,
    max_bytes: int,
    sha256: str | None = None,
    persistence: Persistence = PERSISTENCE,
) -> str:
    """Download one file from the first of its mirrors that has it; returns its SHA-256.

    A file that is already there is checked and kept. What has arrived so far lies in `path`.part and a later call resumes
    it; without `sha256`, only when the server says that the file is still the same one. A file with
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
                return _Transfer(url, path, max_bytes, sha256, persistence).run()
            except UnavailableError as error:
                failures.append(f"{url}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
    raise ValueError(
        f"cannot download {path.name}:\n  "
        + "\n  ".join(failures)
        + "\ncheck the network connection and run the same command again; it goes on where it stopped"
    )


class _Transfer:
    """One file from one mirror."""

    def __init__(self, url: str, path: Path, max_bytes: int, sha256: str | None, persistence: Persistence) -> None:
        self.url, self.path, self.max_bytes, self.sha256, self.persistence = url, path, max_bytes, sha256, persistence
        self.part = path.with_name(f"{path.name}.part")
        self.version = path.with_name(f"{path.name}.part.version")

    def run(self) -> str:
        """Complete, check and name the file; returns its SHA-256."""
        for _ in range(self.persistence.attempts):
            resumed = self._size() > 0
            try:
                self._complete()
            except CannotContinueError as error:
                reason = str(error)
            else:
                found = sha256_of_file(self.part)
                if self.sha256 in (None, found):
                    self.part.replace(self.path)
                    self.version.unlink(missing_ok=True)
                    return found
                reason = f"its SHA-256 is {found}, not {self.sha256}"
                if not resumed:  # else the fault may lie in what an earlier run, or another mirror, has left
                    wrong = self.path.with_name(f"{self.path.name}.wrong")
                    self.part.replace(wrong)
                    raise UnavailableError(f"{reason}; the file is set aside as {wrong}")
            self.part.unlink(missing_ok=True)
            self.version.unlink(missing_ok=True)
            print(f"{self.path.name}: {reason}; starting over", file=sys.stderr, flush=True)
        raise UnavailableError(f"{reason} (given up after {self.persistence.attempts} attempts)")

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _complete(self) -> None:
        offset = self._size()
        version = None if self.sha256 else self.version.read_text() if self.version.exists() else ""
        if version == "":
            offset = 0  # nothing would show that the two halves are of the same file
        with RemoteFile(self.url, start=offset, version=version, persistence=self.persistence) as there:
            total = self._checked_size(there)
            with self.part.open("ab" if offset else "wb") as file:
                if there.version is not None:
                    self.version.write_text(there.version)
                check_free_space(self.part.parent, (total or offset) - offset, self.path.name)
                with ProgressBar(self.path.name, total, "MB", done=offset, scale=10**6) as progress:
                    while chunk := there.read(CHUNK_BYTES):
                        file.write(chunk)
                        offset += len(chunk)
                        if offset > self.max_bytes:
                            raise UnavailableError(f"it sends more than {self.max_bytes:,} bytes")
                        progress.update(len(chunk))

    def _checked_size(self, there: RemoteFile) -> int | None:
        connection = there.connect()
        if connection.content_type == "text/html":
            raise UnavailableError("it answers with a web page in place of the file")
        if connection.num_bytes is None and self.sha256 is None:
            raise UnavailableError("it does not say how long the file is, so that nothing would show that it is whole")
        if (connection.num_bytes or 0) > self.max_bytes:
            raise UnavailableError(
                f"it offers {connection.num_bytes:,} bytes, more than the {self.max_bytes:,} that this file may have"
            )
        return connection.num_bytes
