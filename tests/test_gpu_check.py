"""tools/gpu_check.py: every item on a CPU, where it proves that its code runs, and, marked `gpu`, where it proves something."""

import json
from unittest.mock import patch

import pytest
import torch

import gpu_check
from gpu_bench import Bench, speed
from gpu_check import ITEMS, GpuCheckConfig, checked, main, refusing_to_wait, show
from launching import run_here

on_a_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
ONCE = {"no wait in a step: indexed, fp32", "no wait in a step: stream, bf16", "gradients in tf32"}
"""Of the items that differ by reader and arithmetic alone, those that are rehearsed."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def bench(request, tmp_path_factory):
    return Bench(GpuCheckConfig(device=request.param, tiny=True, steps=1), tmp_path_factory.mktemp("bench"))


@pytest.fixture
def in_this_process(monkeypatch):
    """Training started as a command runs here, which has paid for the imports; what it sets for the process is set back."""

    def run(command, **_):
        code = run_here(*command[1:])
        torch.use_deterministic_algorithms(False)
        return type("Ended", (), {"returncode": code, "stderr": "see above"})

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(gpu_check.subprocess, "run", run)


@pytest.mark.parametrize(("name", "item"), ITEMS, ids=[name for name, _ in ITEMS])
def test_an_item_passes(bench, name, item, in_this_process):
    """No wait, gradients, noise, saves, memory and exact resumes."""
    if bench.device.type == "cpu" and name.startswith(("no wait", "gradients")) and name not in ONCE:
        pytest.skip("differs from another by reader or arithmetic alone")
    row = checked(bench, name, item)
    assert row["verdict"] == ("skipped" if bench.device.type == "cpu" and name.startswith("memory") else "pass"), row


def test_a_speed_is_measured(bench):
    row = speed(bench, "bf16", 2, False, True)
    assert row["images_per_s"] > 0
    assert 0 <= row["data_wait"] < 1
    assert row["gib"] > 0
    with patch.object(bench, "deadline", 0.0):
        assert speed(bench, "bf16", 2, False, True)["note"] == "time was up"


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_a_gpu)])
def test_a_wait_is_refused_on_a_gpu(marked):
    """Otherwise the items above could not fail."""
    with refusing_to_wait(torch.device("cuda")), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def test_whatever_differs_fails_its_item(bench, in_this_process, monkeypatch):
    """Weights of a rerun, noise of a cut, a snapshot that is written to, gradients: each breaks in turn."""
    items = dict(ITEMS)
    broken = {
        "noise of any cut": patch.object(
            gpu_check, "noise_of_training", lambda *_, shape, device: (torch.rand(64, 1), torch.rand(64) < 0.5)
        ),
        "gradients in tf32": patch.object(gpu_check, "gradient", lambda *_: torch.randn(1000)),
        "save beside training": patch.object(gpu_check.SnapshotWriter, "_copy", lambda _, key, tensor: tensor.detach() * 0),
        "rerun and resume, exact": patch.object(gpu_check, "trained", lambda *_: {"w": torch.rand(3)}),
        "layout after loading": patch.object(
            gpu_check, "load_into", lambda vae, _: vae.to(memory_format=torch.contiguous_format)
        ),
    }  # fmt: skip
    for name, breaking in broken.items():
        with breaking:
            row = checked(bench, name, items[name])
        assert row["verdict"] == "FAIL", row
        assert "AssertionError" in row["found"]


def test_the_command_writes_what_it_shows_and_ends_by_what_it_found(tmp_path, monkeypatch, capsys):
    def wrong(_):
        raise ValueError("of this\nand that")

    monkeypatch.setattr(gpu_check, "speeds", lambda bench: iter([speed(bench, "bf16", 2, False, False)]))
    for items, code in (((("good", lambda _: "all well"),), 0), ((("bad", wrong),), 1)):
        monkeypatch.setattr(gpu_check, "ITEMS", items)
        file = tmp_path / "found.json"
        assert main(GpuCheckConfig(device="cpu", tiny=True, steps=1, json=file)) == code
        printed = capsys.readouterr().out
        assert gpu_check.REHEARSAL in printed, "a CPU's numbers must not pass for a result"
        assert main(GpuCheckConfig(show=file)) == 0
        shown = capsys.readouterr().out
        assert shown.strip() in printed
        assert "rehearsal" in shown
        assert ("| good | pass | all well |" if code == 0 else "| bad | FAIL | ValueError: of this |") in shown
        assert "| bf16 | 2 | no | no |" in shown
    assert not show(json.loads(file.read_text()) | {"rehearsal": False}).startswith("**")


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(GpuCheckConfig()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line
