"""Sweep files: every one of ours names valid options, draws what it says, and what we do not know is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from launching import ROOT
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.sweeps.sweep_file import Sweep

OURS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
TAKEAWAYS = sorted(
    file
    for folder in ("takeaways", "scaling")
    for file in (ROOT / "configs" / folder).rglob("*.yaml")
    if "parameters:" in file.read_text()
)

BASE = {
    "program": "vaetrain/train.py",
    "method": "grid",
    "metric": {"name": "val/elbo_nats", "goal": "maximize"},
    "parameters": {"optim.lr": {"values": [1e-3, 2e-3]}, "seed": {"values": [0, 1, 2]}},
    "command": ["${env}", "${interpreter}", "${program}", "--run-dir", "x/$WANDB_RUN_ID", "${args}"],
}


def write(folder: Path, **changes: object) -> Sweep:
    (folder / "s.yaml").write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
    return Sweep.read(folder / "s.yaml")


def test_there_are_sweeps_of_what_the_lecture_says_decides_everything():
    assert {file.stem for file in OURS} == {"architecture", "beta", "epochs", "lr_batch"}


@pytest.mark.parametrize("file", [*OURS, *TAKEAWAYS], ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_the_options_of_our_sweeps_are_train_pys(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    sweep = Sweep.read(file)
    for trial in sweep.trials(num_trials=3):
        command = sweep.command_of(trial, "python")
        config = parse(Config, None, command[command.index("vaetrain/train.py") + 1 :])
        assert config.run_dir == Path("runs") / file.relative_to(ROOT / "configs").parts[0] / file.stem / "abc"
        assert config.log.wandb == "online"
        for name, value in trial.items():
            if name == "config":
                assert (ROOT / value).is_file()
                continue
            found: object = config
            for part in name.split("."):
                found = getattr(found, part)
            assert str(found) == str(value), name


def test_an_option_that_train_py_has_not_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    sweep = write(tmp_path, parameters={"optim.learning_rate": {"values": [1]}})
    command = sweep.command_of(sweep.trials()[0], "python")
    assert command[:3] == ["/usr/bin/env", "python", "vaetrain/train.py"]
    with pytest.raises(SystemExit):
        parse(Config, None, ["--data.train", "x", *command[3:]])
    assert "learning_rate" in capsys.readouterr().err


def test_a_grid_is_the_product_in_the_order_of_the_file(tmp_path):
    sweep = write(tmp_path)
    trials = sweep.trials()
    assert [(trial["optim.lr"], trial["seed"]) for trial in trials] == [
        (lr, s) for lr in (1e-3, 2e-3) for s in (0, 1, 2)
    ]
    assert sweep.trials(num_trials=4) == trials[:4]
    assert sweep.varied == ["optim.lr", "seed"]
    assert sweep.arguments(trials[1]) == ["--optim.lr=0.001", "--seed=1"]


def test_a_random_search_draws_by_its_seed(tmp_path):
    sweep = write(
        tmp_path,
        method="random",
        parameters={
            "a": {"values": [1, 2]}, "b": {"min": 1, "max": 3}, "c": {"min": 0.0, "max": 1.0},
            "d": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
            "e": {"distribution": "q_uniform", "min": 0, "max": 100, "q": 25}, "f": {"value": "fixed"},
        },
    )  # fmt: skip
    trials = sweep.trials(400, seed=3)
    assert trials == sweep.trials(400, seed=3)
    assert trials[:7] == sweep.trials(7, seed=3)
    assert trials != sweep.trials(400, seed=4)
    assert {trial["a"] for trial in trials} == {1, 2}
    assert {trial["b"] for trial in trials} == {1, 2, 3}
    assert 0.4 < sum(trial["c"] for trial in trials) / 400 < 0.6
    logs = [math.log10(trial["d"]) for trial in trials]
    assert -4 <= min(logs) <= -3.9
    assert -2.7 < sum(logs) / 400 < -2.3
    assert {trial["e"] for trial in trials} == {0, 25, 50, 75, 100}
    assert {trial["f"] for trial in trials} == {"fixed"}
    assert sweep.varied == ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match="give --num-trials N"):
        sweep.trials()


def test_no_trial_is_drawn_twice(tmp_path):
    two = write(tmp_path, method="random", run_cap=4, parameters={"optim.lr": {"values": [1e-3, 2e-3]}})
    for seed in range(20):
        assert sorted(trial["optim.lr"] for trial in two.trials(seed=seed)) == [1e-3, 2e-3]
    many = write(
        tmp_path, method="random",
        parameters={"a": {"values": [*range(10)]}, "b": {"distribution": "q_uniform", "min": 1, "max": 10, "q": 1}},
    )  # fmt: skip
    trials = many.trials(1000)
    assert sorted((trial["a"], trial["b"]) for trial in trials) == [(a, b) for a in range(10) for b in range(1, 11)]
    assert trials[:60] == many.trials(60)
    assert write(tmp_path, parameters={"a": {"values": [1, 2, 1]}}).trials() == [{"a": 1}, {"a": 2}]


def test_a_grid_ends_at_its_run_cap(tmp_path):
    assert len(write(tmp_path, run_cap=2).trials()) == 2
    assert len(write(tmp_path, run_cap=2).trials(3)) == 3


def random_search(**parameter: object) -> dict[str, object]:
    return {"method": "random", "parameters": {"optim.lr": parameter}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (random_search(min="1e-3", max=1), r"s\.yaml, optim\.lr: min is '1e-3', no finite number; write 1\.0e-3"),
        (random_search(min=0, max="1.0e3"), r"max is '1\.0e3', no finite number; write 1\.0e\+3"),
        (random_search(min=0, max=math.inf), r"s\.yaml is not valid YAML: line 9: \.inf is no finite number"),
        (random_search(min=None, max=1), r"min is None, no finite number"),
        (random_search(min=0, max=1, distribution="q_uniform", q=0), r"optim\.lr: q is 0; give the positive step"),
        (random_search(min=0.5, max=3, distribution="int_uniform"), r"must be whole numbers"),
        (random_search(min=0, max=1, quantile=2), r"optim\.lr: quantile does not go with int_uniform"),
        (random_search(min=0, max=1.0, q=0.1), r"optim\.lr: q does not go with uniform"),
        (random_search(values=[1, 2], min=1), r"min does not go with values"),
        (random_search(values=[1, 2], distribution="uniform"), r"distribution uniform does not go with values"),
        (random_search(), r"give value, values, or min and max"),
        ({"parameters": {"optim.lr": 3}}, r"optim\.lr is 3; write \{value: 3\}"),
        ({"parameters": {"optim.lr": {"values": 3}}}, r"optim\.lr: values is 3; write a list, such as \[3\]"),
        ({"parameters": [1]}, r"s\.yaml: parameters is \[1\]; write a mapping"),
        ({"parameters": None}, r"s\.yaml: parameters is None; write a mapping"),
        ({"metric": "val/elbo_nats"}, r"s\.yaml: metric is 'val/elbo_nats'; write \{name: "),
        ({"metric": {"name": "x", "goal": "minimize", "target": 1}}, r"metric is .*target.*; write \{name: "),
        ({"command": "python"}, r"s\.yaml: program is a path and command a list"),
        ({"program": 3}, r"s\.yaml: program is a path and command a list"),
        ({"run_cap": "x"}, r"s\.yaml: run_cap is 'x'; give a whole number of trials, at least 1"),
        ({"run_cap": 0}, r"run_cap is 0; give a whole number"),
        ({"method": "bayes"}, "method bayes needs a server"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate is not known here"),
        ({"metric": {"name": "x"}}, "metric is .*; write"),
        ({"metric": {"name": "x", "goal": "up"}}, "metric needs a name, and a goal"),
        ({"parameters": {"a": {"min": 1, "max": 2}}}, "a grid needs value or values"),
        ({"parameters": {"a": {"values": []}}}, "values is empty"),
        ({"method": "random", "parameters": {"a": {"distribution": "normal", "mu": 0}}}, "distribution normal is not known"),
        ({"method": "random", "parameters": {"a": {"min": 2, "max": 1}}}, "are no range"),
        ({"command": ["${env}", "${program}"]}, r"the command has no \$\{args\}"),
        ({"command": ["${args_json}", "${args}"]}, r"\$\{args_json\} is not known here"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(tmp_path, changes, message):
    def read_and_fill() -> None:
        sweep = write(tmp_path, **changes)
        sweep.command_of(sweep.trials(1)[0], "python")

    with pytest.raises(ValueError, match=message):
        read_and_fill()


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml does not exist"):
        Sweep.read(tmp_path / "nothing.yaml")
    (tmp_path / "s.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds no mapping"):
        Sweep.read(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text("method: grid")
    with pytest.raises(ValueError, match="lacks command, metric, parameters, program"):
        Sweep.read(tmp_path / "s.yaml")


def test_a_run_directory_needs_its_variables(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    with pytest.raises(ValueError, match=r"the environment has no \$WANDB_RUN_ID"):
        Config(data=parse(Config, None, ["--data.train", "x"]).data, run_dir=Path("a/$WANDB_RUN_ID"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"optim": {"parameters": {"lr": {"values": [1e-3]}}}},
            r"s\.yaml, optim: nested parameters are not known here; write optim\.lr: \{values: \[…\]\}",
        ),
        ({"data.classes": {"values": [["cat"], ["dog"]]}}, r"data\.classes: \['cat'\] is no single value"),
        ({"data.classes": {"value": {"a": 1}}}, r"data\.classes: \{'a': 1\} is no single value"),
    ],
)
def test_nested_and_list_valued_parameters_are_refused_when_the_file_is_read(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, parameters=parameters)
