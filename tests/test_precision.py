"""`--train.precision auto`: what it means on which device, that a run keeps it, and that it is said and recorded."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from launching import ROOT
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.data.config import DataConfig
from vaetrain.training import precision
from vaetrain.training.precision import choose, computes_bf16_natively, cpu_speedup, resolved
from vaetrain.training.resume import recorded_precision


@pytest.fixture(autouse=True)
def alone(accelerator):
    """Choosing is a collective of the processes there are."""


def on_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_is_asked_for_its_capability(monkeypatch, capability, expected):
    on_gpu(monkeypatch, capability)
    found = choose("auto")
    assert found.name == expected
    assert f"NVIDIA T has compute capability {capability[0]}.{capability[1]}" in found.reason


@pytest.mark.parametrize(("speedup", "expected"), [(0.1, "fp32"), (1.05, "fp32"), (1.8, "bf16")])
def test_a_cpu_is_measured(monkeypatch, speedup, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_speedup", lambda: speedup)
    found = choose("auto")
    assert found.name == expected
    assert ("10.0 times slower" if speedup < 1 else f"{speedup:.1f} times faster") in found.reason


def test_the_measurement_is_of_both_arithmetics(monkeypatch):
    """Timed by a clock that runs by what was computed: products in bf16 cost five, in fp32 one."""
    now = [0.0]
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    for module, name in ((precision.F, "conv2d"), (torch, "matmul")):
        compute = getattr(module, name)

        def costly(a, b, _compute=compute, **options):
            now[0] += 5.0 if a.dtype == torch.bfloat16 else 1.0
            return _compute(a, b, **options)

        monkeypatch.setattr(module, name, costly)
    cpu_speedup.cache_clear()
    assert cpu_speedup() == pytest.approx(1 / 5)
    cpu_speedup.cache_clear()


def test_all_processes_follow_the_least_of_them(monkeypatch):
    devices = [(True, "new GPU"), (False, "old GPU"), (True, "new GPU")]
    monkeypatch.setattr(precision, "gather_objects", lambda mine, what: [None] if mine == [None] else devices)
    assert choose("auto") == precision.Choice("fp32", "old GPU")


def test_what_was_asked_for_is_kept_and_what_is_slow_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_speedup", lambda: 0.2)
    assert choose("fp32") is None
    assert choose("bf16").name == "bf16"
    assert "5.0 times slower" in choose("bf16").reason
    assert "fp32 would be faster" in choose("bf16").reason
    assert choose("auto", kept="fp32") == precision.Choice("fp32", "as the run that goes on has it")
    kept = choose("auto", kept="bf16")
    assert (kept.name, "5.0 times slower" in kept.reason) == ("bf16", True)
    with pytest.raises(ValueError, match=r"fp16 needs a GPU and there is none; use auto, fp32 or bf16"):
        choose("fp16")
    monkeypatch.setattr(precision, "cpu_speedup", lambda: 2.0)
    assert choose("bf16") is None
    assert choose("auto", kept="bf16") == precision.Choice("bf16", "as the run that goes on has it")


def test_the_choice_is_said_and_used(monkeypatch, capsys):
    monkeypatch.setattr(precision, "choose", lambda asked, kept: precision.Choice("fp32", "a good reason"))
    accelerator = precision.start("auto")
    assert capsys.readouterr().out == "precision fp32: a good reason\n"
    assert accelerator.mixed_precision == "no"
    config = resolved(Config(DataConfig("shards")), accelerator)
    assert config.train.precision == "fp32"
    named = replace(config, train=replace(config.train, precision="bf16"))
    assert resolved(named, accelerator) is named


def test_a_run_records_its_precision_and_is_found_by_who_goes_on(train_tiny, tmp_path):
    run_dir = train_tiny(epochs=1)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["precision"] == "fp32"
    assert json.loads((run_dir / "provenance.json").read_text())["precision"] == "fp32"

    def recorded(*arguments):
        return recorded_precision(parse(Config, None, ["--data.train", "shards", *map(str, arguments)]))

    assert recorded("--run-dir", run_dir) == "fp32"
    assert recorded("--run-dir", tmp_path / "new", "--resume", run_dir) == "fp32"
    assert recorded("--run-dir", tmp_path / "new") is None
    [checkpoint] = (run_dir / "checkpoints").glob("step-*")
    config = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(config.replace("precision: fp32", "precision: bf16"))
    assert recorded("--run-dir", run_dir) == "bf16"
    (checkpoint / "config.yaml").write_text("nothing: [")
    assert recorded("--run-dir", run_dir) is None


def test_every_config_fits_its_arithmetic_to_the_machine():
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(configs) > 20
    for file in configs:
        train = (yaml.safe_load(file.read_text()) or {}).get("train") or {}
        assert train.get("precision", "auto") == "auto", file


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which is not measured")
def test_this_machine_is_measured():
    native, reason = computes_bf16_natively()
    assert native == (cpu_speedup() >= precision.WORTHWHILE)
    assert "than fp32 on " in reason
