"""A compiled training captures its model once, through accumulation, validation and a resume, on one process and on two."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import nn

import compilation_scenarios
from together import succeed_together
from vaetrain.command_line import parse, to_yaml
from vaetrain.config import Config, TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.training import compilation
from vaetrain.training.compilation import compile_in_place, explaining_failure, missing_compiler, resolved
from vaetrain.training.resume import recorded_compile
from vaetrain.training.step import TrainStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("num_processes", "checkpointed"), [(1, False), (2, True)])
def test_a_model_is_captured_once(tiny_shards, tmp_path, num_processes, checkpointed):
    succeed_together(
        compilation_scenarios.scenarios, str(tiny_shards), tmp_path, checkpointed, num_processes=num_processes
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["first"] == results["resumed"] == {"graphs": 1, "breaks": 0}
    assert len(results["losses"]) == 6
    assert results["losses"] == pytest.approx(results["plain_losses"], rel=1e-5)


def config(*arguments: str) -> Config:
    return parse(Config, None, ["--data.train", "shards", *arguments])


@pytest.mark.parametrize(
    ("given", "expected"),
    [("True", "default"), ("False", False), ("auto", "auto"), ("reduce-overhead", "reduce-overhead"), (None, "auto")],
)
def test_modes_are_read_and_written(given, expected, tmp_path):
    read = config(*([] if given is None else ["--train.compile", given]))
    assert read.train.compile == expected
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(read))
    assert yaml.safe_load(file.read_text())["train"]["compile"] == expected
    assert parse(Config, None, ["--config", str(file)]) == read


def test_an_unknown_mode_is_refused(capsys):
    with pytest.raises(SystemExit):
        config("--train.compile", "faster")
    assert "reduce-overhead" in capsys.readouterr().err


def test_auto_compiles_on_a_gpu_where_all_have_a_compiler(monkeypatch, accelerator, capsys):
    asked = Config(DataConfig("shards"))
    others = {"problem": None}
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: None)
    monkeypatch.setattr(compilation, "gather_objects", lambda mine, what: [*mine, others["problem"]])
    assert resolved(asked, accelerator).train.compile is False
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(Accelerator, "device", CUDA)
    assert resolved(asked, accelerator).train.compile == "default"
    assert capsys.readouterr().out == "compile default: on a GPU\n"
    assert resolved(asked, accelerator, kept=False).train.compile is False
    assert capsys.readouterr().out == "compile False: as the run that goes on has it\n"
    named = replace(asked, train=TrainConfig(compile="max-autotune"))
    assert resolved(named, accelerator, kept=False) is named
    others["problem"] = "there is no gcc"
    assert resolved(asked, accelerator).train.compile is False
    assert capsys.readouterr().out == "compile False: there is no gcc\n"


@pytest.mark.parametrize(("device", "variable"), [(CPU, "CXX"), (CUDA, "CC")])
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, device, variable):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    assert f"name it in ${variable}" in missing_compiler(device)
    compiler = tmp_path / "own"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, f"{compiler} -O2")
    assert missing_compiler(device) is None
    monkeypatch.setenv(variable, "absent")
    assert "there is no absent" in missing_compiler(device)


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"--train.compile default: .*C compiler.*or pass --train.compile False"):
        compile_in_place(nn.Linear(1, 1), "default")


def test_a_failure_to_compile_says_how_to_go_without():
    def fails(graph, inputs):
        raise RuntimeError("no kernel for you")

    model = nn.Linear(2, 2)
    model.compile(backend=fails, fullgraph=True)
    expected = pytest.raises(ValueError, match=r"(?s)pass --train.compile False to train uncompiled.*no kernel for you")
    with expected, explaining_failure(config("--train.compile", "True")):
        model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="of another kind"), explaining_failure(config()):
        raise RuntimeError("of another kind")


def test_gradients_that_cuda_graphs_replay_are_added_to_tensors_of_the_models_own(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    model = nn.Linear(2, 2)
    compile_in_place(model, "reduce-overhead")
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())
    other = nn.Linear(2, 2)
    compile_in_place(other, "default")
    assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize(("mode", "its_own"), [("reduce-overhead", True), ("default", False)])
def test_steps_add_to_those_tensors(monkeypatch, accelerator, mode, its_own):
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    settings = config("--model.kind", "dense", "--model.image-size", "4", "--train.compile", mode)
    step = TrainStep.build(settings, BatchLayout.of(4, 2, 0, 1), accelerator)
    before = {parameter: parameter.grad for parameter in step.vae.parameters()}
    numbers = torch.zeros(2, dtype=torch.int64)
    batches = itertools.repeat(Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), numbers, numbers))
    for images_seen in (0, 4):
        step.accumulate(batches, images_seen, 1.0)
        step.update(1e-3, images_seen + 4)
    assert all((parameter.grad is before[parameter]) == its_own for parameter in step.vae.parameters())
    assert all(parameter.grad.ne(0).any() for parameter in step.vae.parameters())
    accelerator.free_memory()


def test_a_run_records_its_mode_and_is_found_by_who_goes_on(copy_of_tiny_run):
    run_dir = copy_of_tiny_run()
    assert recorded_compile(config("--run-dir", str(run_dir))) is False
    [checkpoint] = (run_dir / "checkpoints").glob("step-*")
    written = (checkpoint / "config.yaml").read_text()
    for words, expected in (("true", "default"), ("reduce-overhead", "reduce-overhead"), ("odd", None)):
        (checkpoint / "config.yaml").write_text(written.replace("compile: false", f"compile: {words}"))
        assert recorded_compile(config("--run-dir", str(run_dir))) == expected
    shutil.rmtree(checkpoint)
    assert recorded_compile(config("--run-dir", str(run_dir))) is None
