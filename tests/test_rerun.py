"""A recorded run trained again gives the same losses, and what would not is refused or said."""

from __future__ import annotations

import json
import platform
import re
import shutil

import pytest
import yaml

from launching import TINY, run_here, succeed
from together import script_succeeds
from vaetrain.command_line import to_yaml
from vaetrain.runs import rerun
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import git_state, uncommitted_changes


@pytest.fixture
def recorded(tiny_run, tmp_path) -> RunDirectory:
    """A copy of the tiny run, as if made by this very checkout."""
    return RunDirectory(shutil.copytree(tiny_run, tmp_path / "run"))


def change(run: RunDirectory, **facts: object) -> None:
    run.provenance_file.write_text(json.dumps({**run.provenance(), **facts}))


def test_a_rerun_has_the_same_losses_on_one_and_two_processes(tiny_shards, tmp_path):
    """The tool starts processes of its own, as many as there were, two of them through a launcher."""
    for two_processes in (False, True):
        folder = tmp_path / f"run{two_processes}"
        script_succeeds(
            "vaetrain/train.py", *TINY, "--data.train", tiny_shards, "--train.epochs", 1, "--run-dir", folder,
            num_processes=1 + two_processes,
        )  # fmt: skip
        printed = succeed("tools/rerun.py", folder, "--allow-differences")
        count = len(RunDirectory(folder).metrics())
        assert f"same losses: the {count} records are equal, bit for bit, up to step 5; rerun written to" in printed
        again = RunDirectory(tmp_path / f"run{two_processes}-rerun").provenance()
        assert again["num_processes"] == 1 + two_processes
        assert again["device"] == RunDirectory(folder).provenance()["device"]


def test_other_losses_fail(recorded, monkeypatch, capsys):
    """Of a training that does the same once more; here a copy of the run as it was, which takes no time."""
    before = shutil.copytree(recorded.path, recorded.path.with_name("before"))
    monkeypatch.setattr(rerun, "start", lambda config, _: shutil.copytree(before, config.run_dir) and 0)
    assert (
        run_here("tools/rerun.py", recorded.path, "--allow-differences", "--out", recorded.path.with_name("same")) == 0
    )
    assert "\nsame losses" in "\n" + capsys.readouterr().out
    lines = recorded.metrics_file.read_text()
    first = recorded.metrics()[0]["train/loss"]
    recorded.metrics_file.write_text(lines.replace(str(first), str(first * (1 + 1e-12)), 1))
    assert run_here("tools/rerun.py", recorded.path, "--allow-differences") == 1
    assert "NOT the same losses: 0 of" in capsys.readouterr().out


def test_other_data_are_refused_before_anything_starts(recorded):
    dataset = json.loads(recorded.dataset_file.read_text())
    dataset["val"]["fingerprint"] = "0" * 64
    recorded.dataset_file.write_text(json.dumps(dataset))
    with pytest.raises(ValueError, match=f"is another shard set than {re.escape(str(recorded.path))} was trained on"):
        rerun.check_data(recorded)


def test_what_is_not_as_it_was_is_listed(recorded, monkeypatch):
    revision = "a" * 40
    packages = recorded.provenance()["packages"]
    change(recorded, git_revision=revision, git_dirty=False)
    monkeypatch.setattr(rerun, "git_state", lambda _: (revision, False))
    assert list(rerun.differences(recorded)) == []
    recorded.patch_file.unlink(missing_ok=True)  # there when this checkout has changes
    change(recorded, git_revision="b" * 40, git_dirty=True, packages={**packages, "torch": "1.0"}, python="3.0.0")
    monkeypatch.setattr(rerun, "git_state", lambda _: (revision, True))
    code, patch, here, package, python = rerun.differences(recorded)
    assert f"the run's revision is {'b' * 40}, this is {revision}" in code
    assert "nobody kept them" in patch
    assert "this checkout has uncommitted changes" in here
    assert package.startswith("package torch: 1.0 then, ")
    assert python.startswith("python: 3.0.0 then, ")
    change(recorded, git_revision=revision, git_dirty=False, packages=packages, python=platform.python_version())
    monkeypatch.setattr(rerun, "git_state", lambda _: (revision, False))
    monkeypatch.setattr(rerun, "cpu_model", lambda: "another processor")
    monkeypatch.setattr(rerun, "device_of_a_start", lambda: "NVIDIA H100")
    processor, device = rerun.differences(recorded)
    assert processor == f"processor: {recorded.provenance()['cpu']} then, another processor now"
    assert device == "device: cpu then, NVIDIA H100 now"


def test_the_changes_of_a_run_are_named_where_they_were_kept(recorded):
    change(recorded, git_dirty=True)
    recorded.patch_file.write_text("diff")
    assert "run/uncommitted.patch has them" in "\n".join(rerun.differences(recorded))


def test_a_difference_is_refused_unless_allowed(recorded, capsys):
    change(recorded, python="3.0.0")
    assert run_here("tools/rerun.py", recorded.path) == 1
    said = capsys.readouterr().err
    assert "python: 3.0.0 then, " in said
    assert "--allow-differences" in said
    assert not recorded.path.with_name("run-rerun").exists()


def test_a_history_that_no_single_start_repeats_is_told(recorded):
    assert list(rerun.caveats(recorded)) == []
    first = recorded.provenance()
    change(recorded, device="NVIDIA H100")
    assert "GPU without --train.deterministic" in "\n".join(rerun.caveats(recorded))
    change(recorded, device=first["device"])
    change(recorded, resumes=[{**first, "num_processes": 2, "git_revision": "c" * 40, "command": ["other"]}])
    assert len(list(rerun.caveats(recorded))) == 3
    change(recorded, num_processes=16, processes_per_node=8)
    with pytest.raises(ValueError, match="16 processes on several machines"):
        rerun.start(recorded.config(), recorded.provenance())


def test_the_rerun_takes_every_option_but_folder_trackers_and_resume(recorded, tmp_path):
    config = yaml.safe_load(to_yaml(rerun.config_of_rerun(recorded, tmp_path / "new")))
    own = yaml.safe_load(recorded.config_file.read_text())
    assert config["run_dir"] == str(tmp_path / "new")
    assert config["resume"] == "never"
    for name in ("run_dir", "resume"):
        config.pop(name), own.pop(name)
    assert config == own


def test_what_is_not_committed_is_kept_with_the_run(tmp_path):
    import subprocess

    def git(*arguments: str) -> None:
        own = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *arguments], check=True, capture_output=True)

    git("init", "-q")
    assert git_state(tmp_path) == (None, None)
    for name in ("file", "vaetrain/runs/provenance.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n")
    git("add", ".")
    git("commit", "-qm", "x")
    assert uncommitted_changes(tmp_path) == b""
    revision, dirty = git_state(tmp_path)
    assert (len(revision or ""), dirty) == (40, False)
    (tmp_path / "vaetrain" / "new.py").touch()
    assert git_state(tmp_path) == (revision, True)
    (tmp_path / "vaetrain" / "new.py").unlink()
    (tmp_path / "file").write_text("after\n")
    (tmp_path / "untracked").write_text("private\n")
    patch = uncommitted_changes(tmp_path)
    assert b"-before\n+after\n" in patch
    assert b"private" not in patch
    (tmp_path / "file").write_text("x" * (1 << 21))
    assert uncommitted_changes(tmp_path) == b""

    # An environment inside somebody's repository: its revision says nothing about the code there.
    (tmp_path / ".venv" / "vaetrain" / "runs").mkdir(parents=True)
    (tmp_path / ".venv" / "vaetrain" / "runs" / "provenance.py").touch()
    assert git_state(tmp_path / ".venv") == (None, None)
    assert uncommitted_changes(tmp_path / ".venv") == b""


def test_a_run_without_provenance_is_refused(recorded, capsys):
    recorded.provenance_file.unlink()
    for tell in (rerun.differences, rerun.caveats):
        with pytest.raises(FileNotFoundError, match="nobody knows what made this run"):
            list(tell(recorded))
    assert run_here("tools/rerun.py", recorded.path) == 1
    assert "provenance.json does not exist, so nobody knows what made this run" in capsys.readouterr().err
