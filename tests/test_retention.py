"""Which checkpoints stay, and whether they fit on the disk."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from vaetrain.config import CheckpointConfig
from vaetrain.runs.checkpoint_names import list_checkpoints, step_of
from vaetrain.training.retention import Retention, put_in_place, remove

MIB = 2**20


def write(folder: Path, *steps: int, num_bytes: int = 1) -> None:
    """Make folders that look like checkpoints."""
    for step in steps:
        checkpoint = folder / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        with (checkpoint / "checksums.json").open("wb") as file:
            file.truncate(num_bytes)  # without writing them


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("config", "best", "kept"),
    [
        (CheckpointConfig(keep_last=1), None, [7]),
        (CheckpointConfig(keep_last=3), 2, [2, 5, 6, 7]),
        (CheckpointConfig(keep_last=2), 7, [6, 7]),
        # 10 images a step: the multiples of 25 are first reached at steps 3, 5 and (75) none but 8, which is yet to come.
        (CheckpointConfig(keep_last=1, keep_every_images=25), 1, [1, 3, 5, 7]),
        (CheckpointConfig(keep_last=1, keep_every_images=20), None, [2, 4, 6, 7]),
        (CheckpointConfig(keep_last=1, keep_every_images=1000), None, [7]),
    ],
)
def test_what_stays(tmp_path, config, best, kept):
    """Whether checkpoints are dropped one at a time or all at once."""
    retention = Retention(tmp_path / "each", config)
    for step in range(1, 8):
        write(tmp_path / "each", step)
        retention.drop_old(step, best if best is None or best <= step else None, images_per_step=10)
    write(tmp_path / "once", *range(1, 8))
    Retention(tmp_path / "once", config).drop_old(7, best, images_per_step=10)
    assert steps(tmp_path / "each") == steps(tmp_path / "once") == kept


def test_the_one_to_go_back_to_stays_as_long_as_steps_are_skipped(tmp_path):
    """All steps from the fourth on are skipped."""
    retention = Retention(tmp_path, CheckpointConfig(keep_last=2))
    for step in range(1, 8):
        write(tmp_path, step)
        retention.drop_old(step, None, images_per_step=10, sound_step=min(step, 3))
    assert steps(tmp_path) == [3, 6, 7]
    retention.drop_old(7, None, images_per_step=10, sound_step=5)
    assert steps(tmp_path) == [3, 6, 7]
    write(tmp_path, 8)
    retention.drop_old(8, None, images_per_step=10, sound_step=8)
    assert steps(tmp_path) == [7, 8]


def test_checkpoints_that_training_passed_over_do_not_count(tmp_path):
    """Step 9 is damaged: training went on from 3, and 4 is its newest checkpoint."""
    write(tmp_path, 3, 9, 4)
    Retention(tmp_path, CheckpointConfig(keep_last=2, keep_every_images=1)).drop_old(4, None, images_per_step=1)
    assert steps(tmp_path) == [3, 4]


def test_leftovers_of_killed_processes_go(tmp_path, monkeypatch):
    write(tmp_path, 1, 2, 3)
    (tmp_path / ".step-00000009.1234").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove(tmp_path / "step-00000001")  # killed after it lost its name
    monkeypatch.undo()
    assert steps(tmp_path) == [2, 3]
    Retention(tmp_path, CheckpointConfig()).drop_old(3, None, images_per_step=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003"}


@pytest.mark.parametrize("refused", ["rename", "delete"])
def test_what_cannot_be_deleted_is_told_and_ends_nothing(tmp_path, monkeypatch, capsys, refused):
    """NFS keeps a file that somebody has open; the next checkpoint tries again."""

    def refuse(*_):
        raise OSError("Device or resource busy")

    write(tmp_path, 1, 2, 3)
    with monkeypatch.context() as patched:
        if refused == "rename":
            patched.setattr(Path, "rename", refuse)
        else:
            patched.setattr(shutil, "rmtree", refuse)
        for _ in range(2):
            Retention(tmp_path, CheckpointConfig()).drop_old(3, None, images_per_step=1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all("step-00000001" in line and line.endswith("room: Device or resource busy") for line in said)
    Retention(tmp_path, CheckpointConfig()).drop_old(3, None, images_per_step=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000003"}


def test_a_kill_while_one_replaces_another_loses_neither_name_nor_content(tmp_path, monkeypatch):
    write(tmp_path, 1, num_bytes=7)
    write(tmp_path / "aside", 1, num_bytes=9)
    aside, target = tmp_path / ".step-00000001.partial", tmp_path / "step-00000001"
    (tmp_path / "aside" / "step-00000001").rename(aside)
    original = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: 1 / 0 if self == aside else original(self, to))
    with pytest.raises(ZeroDivisionError):
        put_in_place(aside, target)
    monkeypatch.undo()
    assert steps(tmp_path) == []
    Retention(tmp_path, CheckpointConfig()).clear_leftovers()
    assert steps(tmp_path) == [1]
    assert (target / "checksums.json").stat().st_size == 7
    write(tmp_path / "aside", 1, num_bytes=9)
    put_in_place(tmp_path / "aside" / "step-00000001", target)
    assert (target / "checksums.json").stat().st_size == 9
    assert not list(tmp_path.glob(".step-*"))


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    """Last two, best, one to go back to, one being written: five of 100 MiB; with a multiple kept for ever, one more for each."""

    def check(free_mib: int, config: CheckpointConfig) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free_mib * MIB))
        Retention(tmp_path, config).check_space(100 * MIB, total_images=1000)

    check(500, CheckpointConfig())
    with pytest.raises(
        ValueError, match=r"will need 500\.0 MiB more .* 499\.0 free.*5 checkpoints of 100\.0.*keep-last"
    ):
        check(499, CheckpointConfig())
    check(800, CheckpointConfig(keep_every_images=300))
    with pytest.raises(ValueError, match="3 kept for ever"):
        check(799, CheckpointConfig(keep_every_images=300))
    # After a resume the room of those that are there will be theirs; what a killed save left makes room for one.
    write(tmp_path, 1, 2, num_bytes=100 * MIB)
    write(tmp_path / ".step-00000009.1234", 0)
    check(300, CheckpointConfig())
    assert not (tmp_path / ".step-00000009.1234").exists()
    with pytest.raises(ValueError, match=r"will need 300\.0 MiB more .* 299\.0 free.*200\.0 MiB are there"):
        check(299, CheckpointConfig())
    # More are there than may stay: they go when the next one is whole, for which there must be room.
    write(tmp_path, 3, 4, 5, num_bytes=100 * MIB)
    check(100, CheckpointConfig())
    with pytest.raises(ValueError, match=r"will need 100\.0 MiB more"):
        check(99, CheckpointConfig())
