"""Results side by side: what differs is named, what is equal is said to be, and records are compared to the bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from launching import run_here, succeed
from vaetrain.export import export
from vaetrain.runs.comparison import Agreement, Comparison, Result
from vaetrain.runs.directory import RunDirectory
from vaetrain.sample import SampleConfig, sample


def record(step: int, loss: float, speed: float = 1.0) -> dict:
    return {"step": step, "split": "train", "train/loss": loss, "perf/images_per_s": speed}


def test_equal_records_agree_whatever_the_clock_said():
    agreement = Agreement.of([record(1, 3.0), record(2, 2.0)], [record(1, 3.0, 9.0), record(2, 2.0, 8.0)])
    assert agreement.is_whole
    assert agreement.describe() == "the 2 records are equal, bit for bit, up to step 2"


def test_the_first_difference_is_named_however_small():
    agreement = Agreement.of([record(1, 3.0), record(2, 2.0)], [record(1, 3.0), record(2, 2.0000000000000004)])
    assert not agreement.is_whole
    assert (agreement.num_equal, agreement.last_step) == (1, 1)
    assert "they part at step 2, train/loss: 2.0 and 2.0000000000000004" in agreement.describe()
    added = {**record(2, 2.0), "train/exploded_steps": 1}
    assert "train/exploded_steps: None and 1" in Agreement.of([record(2, 2.0)], [added]).describe()


def test_a_run_that_goes_on_is_not_equal():
    agreement = Agreement.of([record(1, 3.0)], [record(1, 3.0), record(2, 2.0)])
    assert not agreement.is_whole
    assert agreement.describe() == "1 of 2 records are equal, bit for bit; only the second goes on after step 1"
    assert not Agreement.of([], []).is_whole


def test_runs_are_told_apart(train_tiny, tmp_path):
    first = train_tiny(run_dir="first", epochs=1)
    second = train_tiny("--optim.lr", 0.002, "--objective.beta", 2, run_dir="second", epochs=1)
    comparison = Comparison((Result.read(first), Result.read(second)))
    assert set(comparison.differing("config")) == {"optim.lr", "objective.beta", "run_dir"}
    for section in ("data", "code", "packages", "machine"):
        assert comparison.differing(section) == []
    headline = comparison.headline().splitlines()
    assert headline[0] == "same data, code, packages, machine"
    assert headline[1] in ("config differs: optim.lr, objective.beta", "config differs: objective.beta, optim.lr")
    assert "records are equal, bit for bit; they part at step 1, train/" in headline[2]
    table = comparison.table()
    [row] = [line.split() for line in table.splitlines() if line.startswith("  optim.lr")]
    assert row == ["optim.lr", "0.001", "0.002"]
    assert "torch-fidelity" not in table
    assert "torch-fidelity" in comparison.table(everything=True)
    last = RunDirectory(second).metrics()[-1]
    assert comparison.results[1].facts["results"]["val/psnr_db"] == last["val/psnr_db"]
    assert comparison.to_json()["records"][0]["equal"] is False


def test_a_copy_of_a_run_its_export_and_its_samples_are_recognised(tiny_run, accelerator, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    export(copy, tmp_path / "export")
    sample(SampleConfig(copy, tmp_path / "samples", num_images=3), accelerator)
    paths = (tiny_run, copy, tmp_path / "export", tmp_path / "samples")
    comparison = Comparison(tuple(map(Result.read, paths)))
    for section in ("config", "data", "code", "packages", "machine"):
        assert comparison.differing(section) == [], section
    assert comparison.agreements[0].is_whole
    for folder in ("export", "samples"):
        made_by = json.loads((tmp_path / folder / "provenance.json").read_text())
        assert made_by["training"]["started"] == RunDirectory(tiny_run).provenance()["started"]
        assert made_by["packages"]["torch"]


def test_the_tool_prints_and_writes(tiny_run, tmp_path):
    printed = succeed("tools/compare_runs.py", tiny_run, tiny_run, "--json", tmp_path / "c.json", python=sys.executable)
    assert "same config, data, code, packages, machine" in printed
    assert json.loads((tmp_path / "c.json").read_text())["records"][0]["equal"] is True


def test_what_cannot_be_compared_is_named(tiny_run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere is no run directory"):
        Result.read(tmp_path / "nowhere")
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    (copy / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"copy/dataset\.json is damaged"):
        Result.read(copy)
    (copy / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no dataset\.json"):
        Result.read(copy)
    assert run_here("tools/compare_runs.py", tiny_run) == 1
    assert capsys.readouterr().err == "error: name at least two run directories\n"


def test_the_commits_between_two_runs_are_counted(tmp_path):
    def git(*arguments: str) -> str:
        own = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *own, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    revisions = []
    (tmp_path / "vaetrain").mkdir()
    for number in range(3):
        (tmp_path / "vaetrain" / "code.py").write_text(f"{number}\n")
        git("add", ".")
        git("commit", "-qm", "x")
        revisions.append(git("rev-parse", "HEAD"))
    results = [
        Result(tmp_path, {"code": {"git_revision": revision}}, None)
        for revision in (revisions[0], revisions[2], "0" * 40)
    ]
    between = Comparison(tuple(results[:2])).code_between(tmp_path)
    assert between.startswith("2 commit(s) from the first to the second; in vaetrain/: 1 file changed")
    assert Comparison((results[0], results[0])).code_between(tmp_path) == ""
    assert "not both in this checkout" in Comparison((results[0], results[2])).code_between(tmp_path)
