"""tools/fuzz.py on a small scale, and that it tells what is not clean."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_clean(kind: str, tmp_path: Path) -> None:
    outcome = fuzz.fuzz(kind, 1000, seed=0, folder=tmp_path)
    assert outcome.ends.total() == 1000
    assert outcome.is_clean, outcome.describe()
    assert outcome.ends["read"] > 0
    assert outcome.ends["refused"] > 0


def test_what_is_not_clean_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(rng: random.Random) -> None:
        raise rng.choice([ValueError("fine"), KeyError("a bug"), SystemExit(2)])

    monkeypatch.setitem(fuzz.KINDS, "image", lambda _: read)
    outcome = fuzz.fuzz("image", 50, seed=0, folder=tmp_path)
    assert not outcome.is_clean
    assert 'KeyError: "' in outcome.describe()
    assert "SystemExit" in outcome.describe()
