"""tools/fuzz.py on a small scale, and that it tells what is not clean."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

from launching import ROOT, succeed

sys.path.insert(0, str(ROOT / "tools"))

import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_clean(kind: str) -> None:
    """As a user runs it, in a process without type checks, which would double the time."""
    printed = succeed("tools/fuzz.py", kind, "--num", 1000)
    line = printed.splitlines()[-1]
    found = re.fullmatch(rf"{kind}: 1,000 files, (\d+) read, (\d+) refused, memory \+\d+ MiB, no other end", line)
    assert found is not None, printed
    read, refused = map(int, found.groups())
    assert read + refused == 1000
    assert min(read, refused) > 0


def test_what_is_not_clean_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(rng: random.Random) -> None:
        raise rng.choice([ValueError("fine"), KeyError("a bug"), SystemExit(2)])

    monkeypatch.setitem(fuzz.KINDS, "image", lambda _: read)
    outcome = fuzz.fuzz("image", 50, seed=0, folder=tmp_path)
    assert not outcome.is_clean
    assert 'KeyError: "' in outcome.describe()
    assert "SystemExit" in outcome.describe()
