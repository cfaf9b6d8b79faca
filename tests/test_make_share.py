"""Several tasks make one shard set, as a Slurm array does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from test_make_shards import ROOT, content, make, pets, run  # noqa: F401 (pets is a fixture)
from test_sources import pack_tar
from vaetrain.data.format.manifest import Manifest
from vaetrain.data.sharding import make_shards as sharding
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_share
from vaetrain.data.sharding.task import SampleChunk, ShardTask


def share(src: Path | str, out: Path, task: int, num_tasks: int, **options: Any) -> Manifest | None:
    defaults = {"size": 16, "workers": 1, "images_per_shard": 8, "val_count": 9}
    return make_share(ShardingConfig(str(src), out, **defaults | options, task=task, num_tasks=num_tasks))


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 7])
def test_tasks_together_write_the_bytes_of_one_run(pets: Path, tmp_path: Path, num_tasks: int) -> None:  # noqa: F811
    expected = make(pets, tmp_path / "whole", val_count=9)  # 5 shards: the last tasks of 7 have none
    for task in reversed(range(1, num_tasks)):
        assert share(pets, tmp_path / "out", task, num_tasks) is None
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert share(pets, tmp_path / "out", 0, num_tasks) == expected
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert share(pets, tmp_path / "out", num_tasks - 1, num_tasks) == expected  # requeued when all was done


def test_a_run_without_task_makes_what_is_missing_and_merge_does_not(pets: Path, tmp_path: Path) -> None:  # noqa: F811
    make(pets, tmp_path / "whole", val_count=9)
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="holds no shards to merge"):
        make(pets, out, val_count=9, merge=True)
    assert not out.exists()
    share(pets, out, 1, 2)
    with pytest.raises(ValueError, match=r"lacks 3 of 5 shards, first train-000000; run the tasks that failed again"):
        make(pets, out, val_count=9, merge=True)
    assert len(list(out.glob("*.tar"))) == 2
    make(pets, out, val_count=9)
    assert content(out) == content(tmp_path / "whole")


def test_merge_completes_what_tasks_were_killed_before_completing(
    pets: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(pets, tmp_path / "whole", val_count=9)
    out = tmp_path / "out"
    share(pets, out, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "_complete", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            share(pets, out, 1, 2)
    shard = out / "train-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match="lacks 1 of 5 shards, first train-000001"):
        make(pets, out, val_count=9, merge=True)
    shard.write_bytes(whole)
    make(pets, out, val_count=9, merge=True)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["_describe", "_report_rejected", "write_shard"])
def test_a_task_that_is_overtaken_finds_the_set_complete(
    pets: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Another task completes the set and removes .partial just when this one is about to do the same."""
    expected = make(pets, tmp_path / "whole", val_count=9)
    packed = pack_tar(pets, tmp_path / "pets.tar.gz", "w:gz")  # decompressed into .partial, which goes away
    out = tmp_path / "out"
    original = getattr(sharding, moment)

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(sharding, moment, original)
        share(packed, out, 0, 2)
        share(packed, out, 1, 2)
        assert (out / "manifest.json").exists()
        return original(*arguments)

    share(packed, out, 1, 2)
    monkeypatch.setattr(sharding, moment, overtaken)
    manifest = share(packed, out, 0, 2)
    assert manifest is not None
    assert manifest.fingerprint == expected.fingerprint
    shards = {name: data for name, data in content(tmp_path / "whole").items() if name != "manifest.json"}
    assert {name: data for name, data in content(out).items() if name != "manifest.json"} == shards


def test_a_run_that_takes_over_does_not_let_a_straggler_spoil_a_shard(
    pets: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = pack_tar(pets, tmp_path / "pets.tar.gz", "w:gz")
    make(packed, tmp_path / "whole", val_count=9)
    out, write_shard = tmp_path / "out", sharding.write_shard

    def taken_over(task: ShardTask, pieces: Iterable[SampleChunk]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sharding, "write_shard", write_shard)
            patch.setattr(sharding, "_complete", lambda *_: pytest.fail("killed"))
            with pytest.raises(pytest.fail.Exception, match="killed"):
                make(packed, out, val_count=9)
        return write_shard(task, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "write_shard", taken_over)
        with pytest.raises(FileNotFoundError):
            share(packed, out, 0, 2)
    make(packed, out, val_count=9, merge=True)
    assert content(out) == content(tmp_path / "whole")


def test_processes_that_race_leave_one_right_shard_set(tmp_path: Path) -> None:
    make("faces", tmp_path / "whole", size=32, num_images=60, images_per_shard=4)
    command = [
        sys.executable,
        "tools/make_shards.py",
        "faces",
        str(tmp_path / "out"),
        "--size",
        "32",
        "--num-images",
        "60",
    ]
    command += ["--images-per-shard", "4", "--workers", "1", "--num-tasks", "2", "--task"]
    # The second task runs twice, as after a requeue whose first process still lives.
    processes = [
        subprocess.Popen([*command, task], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for task in ("0", "1", "1")
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert any("60 train images" in out for out, _ in said)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_tasks_with_other_arguments_are_refused(pets: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    share(pets, out, 0, 2)
    for again in (lambda: share(pets, out, 1, 2, size=12), lambda: make(pets, out, val_count=9, size=12, merge=True)):
        with pytest.raises(FileExistsError, match="is being made with other arguments"):
            again()
    make(pets, tmp_path / "whole", val_count=9)
    share(pets, out, 1, 2)
    assert content(out) == content(tmp_path / "whole")


def test_rejected_originals_of_all_tasks_are_counted(pets: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("cat/00.png", "cat/01.png", "dog/02.png"):
        (pets / name).write_text("no picture")
    out = tmp_path / "out"
    share(pets, out, 1, 2)
    with pytest.raises(ValueError, match=r"3 image\(s\) cannot be read"):
        share(pets, out, 0, 2)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {each["source"] for each in rejected} == {"cat/00.png", "cat/01.png", "dog/02.png"}
    make(pets, out, val_count=9, merge=True, max_rejected=3)
    make(pets, tmp_path / "whole", val_count=9, max_rejected=3)
    assert content(out) == content(tmp_path / "whole")


def test_what_is_no_shard_set_is_left_alone(pets: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(pets, tmp_path / "home")
    with pytest.raises(FileExistsError, match="is not empty and holds no shard set"):
        share(pets, tmp_path / "home", 0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": 0}, "--task I and --num-tasks N belong together"),
        ({"num_tasks": 2}, "belong together"),
        ({"task": 2, "num_tasks": 2}, "--task is 2; with --num-tasks 2 it is 0 to 1"),
        ({"task": -1, "num_tasks": 2}, "--task is -1"),
        ({"task": 0, "num_tasks": 0}, "--num-tasks is 0"),
        ({"task": 0, "num_tasks": 2, "merge": True}, "leave out --task"),
    ],
)
def test_tasks_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardingConfig("faces", Path("out"), size=16, **options)


def test_the_command_says_what_a_task_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("faces", tmp_path / "out", "--size", 16, "--num-images", 6, "--images-per-shard", 2, "--workers", 1)
    for task in (0, 1):
        assert run(monkeypatch, "make_shards", *arguments, "--task", task, "--num-tasks", 2) == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first == f"task 0 of 2 has written its shards to {tmp_path / 'out'}"
    assert second.startswith("6 train images (cat 2, dog 2, wild 2), 0 rejected")
    assert said.err == "1 of 3 shards are other tasks' and not finished\n"
