"""Sweeps as a user runs them: trials train, are not trained twice, fail one by one, and stop when told."""

from __future__ import annotations

import json
import signal
import time
import warnings
from dataclasses import replace

import pytest
import yaml

from launching import TINY, finish, run, start
from vaetrain.runs.directory import RunDirectory
from vaetrain.sweeps.jobs import Job
from vaetrain.sweeps.results import TrialRow, best_row, draw, rows_of, table
from vaetrain.sweeps.runner import TrialRun, trial_name
from vaetrain.sweeps.sweep_file import Sweep

COMMAND = [
    "${env}",
    "${interpreter}",
    "${program}",
    *TINY,
    "--train.epochs",
    "1",
    "--run-dir",
    "x/$WANDB_RUN_ID",
    "${args}",
]


@pytest.fixture
def sweep_file(tmp_path):
    def write(program="vaetrain/train.py", **parameters):
        content = {
            "program": str(program),
            "method": "grid",
            "metric": {"name": "val/elbo_nats", "goal": "maximize"},
            "parameters": parameters,
            "command": COMMAND,
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "tiny.yaml"

    return write


def test_trials_train_side_by_side_and_only_once(sweep_file, tiny_shards, tmp_path):
    file = sweep_file(**{"optim.lr": {"values": [1e-3, -1.0]}, "data.train": {"value": str(tiny_shards)}})
    out = tmp_path / "out"
    arguments = ("tools/sweep.py", file, "--out", out, "--processes", 2, "--", "--train.epochs", 2)
    result = run(*arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 of 2 trials did not finish" in result.stdout
    good, bad = json.loads((out / "results.json").read_text())["trials"]
    assert (good["state"], bad["state"]) == ("finished", "failed")
    assert "--optim.lr is -1.0; it must be positive" in bad["reason"]
    metrics = RunDirectory(out / good["run"]).metrics()
    assert [record["epoch"] for record in metrics if record["split"] == "val"] == [1.0, 2.0]
    [row, _] = json.loads((out / "results.json").read_text())["rows"]
    assert row["final"] == [metrics[-1]["val/elbo_nats"]]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    written = (out / good["run"] / "provenance.json").stat().st_mtime_ns
    again = run(*arguments)
    assert "2 trials, 1 of them finished already" in again.stdout
    assert (out / good["run"] / "provenance.json").stat().st_mtime_ns == written
    assert again.stdout.count("started") == 1  # the failed one, whose cause may be mended


def test_an_edited_sweep_or_config_trains_in_folders_of_its_own(sweep_file, tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\n")

    def names(extra=(), **parameters):
        sweep = Sweep.read(sweep_file(**parameters))
        return [trial_name(sweep, trial, extra, tmp_path) for trial in sweep.trials()]

    varied = {"optim.lr": {"values": [1e-3, 2e-3]}, "config": {"value": "base.yaml"}}
    before = names(**varied)
    assert len(set(before)) == 2
    assert names(**varied) == before
    assert set(names(**varied, seed={"value": 1})).isdisjoint(before)
    assert set(names(("--train.epochs", "3"), **varied)).isdisjoint(before)
    (tmp_path / "base.yaml").write_text("seed: 2\n")
    assert set(names(**varied)).isdisjoint(before)


SLOW = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir", sys.argv.index("--run-dir") + 1) + 1])
folder.mkdir(parents=True, exist_ok=True)
if (folder / "saved").exists():
    sys.exit(0)
def stop(*_):
    (folder / "saved").write_text("")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "up").write_text("")
time.sleep(600)
"""


def test_told_to_stop_it_tells_its_trials_and_goes_on_later(sweep_file, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    file = sweep_file(tmp_path / "slow.py", a={"values": [1, 2, 3]})
    out = tmp_path / "out"
    process = start("tools/sweep.py", file, "--out", out, "--processes", 2)
    deadline = time.monotonic() + 300
    while len(list(out.glob("*/up"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.returncode == 75, result.stderr
    assert "stopped; the same command goes on" in result.stdout
    assert len(list(out.glob("*/saved"))) == 2
    assert sorted(json.loads(file.read_text())["state"] for file in out.glob("*.trial.json")) == ["stopped", "stopped"]
    (tmp_path / "slow.py").write_text("")  # the third ends at once now
    result = run("tools/sweep.py", file, "--out", out)
    assert "3 trials, 0 of them finished already" in result.stdout
    assert "no record has val/elbo_nats" in result.stdout
    assert [json.loads(file.read_text())["state"] for file in out.glob("*.trial.json")] == ["finished"] * 3


RECORDS = (
    SLOW.split("if ")[0]
    + """
with (folder / "metrics.jsonl").open("a") as file:
    file.write('{"split": "val", "step": 1, "images_seen": 4, "val/elbo_nat": -1.0}\\n')
"""
)


def test_a_search_says_what_it_cannot_give_and_fails_without_its_metric(sweep_file, tmp_path):
    (tmp_path / "records.py").write_text(RECORDS)
    file = sweep_file(tmp_path / "records.py", a={"values": [1, 2]})
    file.write_text(file.read_text().replace("method: grid", "method: random\nrun_cap: 4"))
    result = run("tools/sweep.py", file, "--out", tmp_path / "out", "--processes", 2)
    assert f"{file}: 4 trials are asked for, its parameters have 2; each runs once" in result.stdout
    assert result.stdout.count("finished  a=") == 2
    assert result.returncode == 1
    assert f"no record of any trial has the metric val/elbo_nats; give metric in {file} a name" in result.stderr
    assert "such as val/elbo_nat\n" in result.stderr
    file.write_text(file.read_text().replace("val/elbo_nats", "val/elbo_nat"))
    result = run("tools/sweep.py", file, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr


def test_seeds_are_averaged_and_the_best_row_is_marked(sweep_file, tmp_path):
    sweep = Sweep.read(sweep_file(**{"optim.lr": {"values": [1, 2]}, "seed": {"values": [0, 1]}}))
    runs = []
    for number, (trial, elbos) in enumerate(zip(sweep.trials(), ([-9, -5], [-8, -7], [-3, -4], [-1, -2]), strict=True)):
        job = Job(str(number), (), tmp_path / "record", tmp_path / "log", state="finished")
        runs.append(TrialRun(trial, tmp_path / str(number), job))
        runs[-1].folder.mkdir()
        lines = [
            json.dumps({"step": n, "images_seen": n, "split": "val", "val/elbo_nats": elbo, "perf/images_per_s": 7.0})
            for n, elbo in enumerate(elbos)
        ]
        (runs[-1].folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    low, high = rows_of(sweep, runs)
    assert (low.values, low.final, low.best, low.mean) == ({"optim.lr": 1}, (-5, -7), (-5, -7), -6)
    assert (high.final, high.best, high.mean, high.images_per_s) == ((-4, -2), (-3, -1), -3, 7.0)
    assert low.standard_error == pytest.approx(1.0)
    assert best_row(sweep, [low, high]) is high
    lines = table(sweep, [low, high]).splitlines()
    assert lines[0].split() == ["optim.lr", "val/elbo_nats", "±", "se", "best", "seeds", "images/s"]
    assert lines[2].split() == ["2", "-3", "1", "-2", "2", "7", "←", "best"]
    runs[3].job.state, runs[3].job.reason = "failed", "why"
    _, high = rows_of(sweep, runs)
    assert (high.final, high.standard_error, high.unfinished) == ((-4,), None, ("failed: why",))


@pytest.mark.parametrize("num_parameters", [1, 2, 3])
def test_values_of_any_name_are_drawn(sweep_file, tmp_path, num_parameters):
    values = ["data/Ba$$in", "A$^$B", "_x_", "猫\ue000", "w" * 500]
    names = ["data.train", "data.val", "run_dir"][:num_parameters]
    sweep = Sweep.read(sweep_file(**{name: {"values": values} for name in names}))
    rows = [TrialRow(dict.fromkeys(names, value), (1.0, 2.0), (1.0, 2.0), None, ()) for value in values]
    sweep = replace(sweep, path=tmp_path / "$_$.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(sweep, rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
