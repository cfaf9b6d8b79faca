"""Exports as ONNX, and to the Hub: what is written is the model, and what is pushed is what was written."""

import json
import re
import sys

import huggingface_hub.constants
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import vaetrain
from fake_hub import FakeHub
from launching import free_port, run_here
from vaetrain.export import load_run
from vaetrain.interchange import onnx_graph


def test_onnx_graphs_are_the_model(copy_of_tiny_run, tmp_path, capsys):
    run_dir, out = copy_of_tiny_run(), tmp_path / "onnx"
    assert run_here("tools/export.py", run_dir, out, "--format", "onnx") == 0
    assert "onnxruntime and the model differ by at most" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {
        "encoder.onnx", "decoder.onnx", "vaetrain.json", "provenance.json", "README.md",
    }  # fmt: skip
    vae = load_run(run_dir).vae
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # As the card has it.
    encoder, decoder = (onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("encoder", "decoder"))
    x = images.numpy().astype("float32") * (2 / 255) - 1
    mean, logvar = encoder.run(["mean", "logvar"], {"x": x})
    recon = decoder.run(["image"], {"z": mean})[0]
    posterior = vae.encode(vae.from_uint8(images))
    np.testing.assert_allclose(mean, posterior.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logvar, posterior.logvar, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(recon, vae.decode(posterior.mean), rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text()
    assert 'x = images.astype("float32") * 0.00784313725490196 + -1 ' in card
    assert "library_name: onnx" in card
    assert run_here("tools/export.py", run_dir, out) == 1
    assert "choose another folder" in capsys.readouterr().err


class Doubled(nn.Module):
    """What a graph is not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return (self.module(x) * (1.0 if torch.compiler.is_compiling() else 1.001),)


def test_a_graph_that_differs_is_not_shipped(tmp_path):
    with pytest.raises(ValueError, match=r"encoder.onnx differs from the model by 1.0e-03 under onnxruntime"):
        onnx_graph._write(Doubled(nn.Identity()), {"x": torch.ones(3, 4)}, ["y"], tmp_path / "encoder.onnx")


def test_without_the_extra_it_is_named(copy_of_tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run_here("tools/export.py", copy_of_tiny_run(), tmp_path / "out", "--format", "onnx") == 1
    assert "--format onnx needs onnxscript; install vaetrain[onnx]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and nobody's token but its own."""
    hub = FakeHub("hf_of_a_test")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("no_proxy", "*")
    yield hub
    hub.close()


def test_an_export_is_pushed_whole(hub, copy_of_tiny_run, tmp_path, capsys):
    run_dir, out = copy_of_tiny_run(), tmp_path / "out"
    assert run_here("tools/export.py", run_dir, out, "--push-to-hub", "me/faces") == 0
    assert f"pushed to {hub.url}/me/faces" in capsys.readouterr().out
    assert hub.private == {"me/faces": True}
    assert hub.files["me/faces"] == {file.name: file.read_bytes() for file in out.iterdir()}
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in hub.files["me/faces"].items():
        (pulled / name).write_bytes(content)
    assert torch.equal(vaetrain.load(pulled).sample(2), load_run(run_dir).vae.sample(2))
    # Once more, to the repository that is there; and a new one for everybody.
    assert run_here("tools/export.py", run_dir, tmp_path / "again", "--push-to-hub", "me/faces") == 0
    assert run_here("tools/export.py", run_dir, tmp_path / "public", "--push-to-hub", "me/open", "--public") == 0
    assert hub.private == {"me/faces": True, "me/open": False}
    assert hub.commits == ["Export of vaetrain"] * 3


def test_what_cannot_be_pushed_is_said(hub, copy_of_tiny_run, tmp_path, monkeypatch, capsys):
    run_dir, out = copy_of_tiny_run(), tmp_path / "out"
    hub.refused_commits = 1
    assert run_here("tools/export.py", run_dir, out, "--push-to-hub", "me/faces") == 1
    said = capsys.readouterr().err
    assert f"{out} is exported but not pushed to me/faces" in said
    assert "quota exceeded" in said
    assert f"`hf upload me/faces {out}` pushes it" in said
    assert json.loads((out / "config.json").read_text())["format_version"] == 1
    for variable, value, repository, message in (
        ("HF_TOKEN", "hf_of_somebody_else", "me/faces", "not pushed to me/faces: .*401"),
        ("HF_TOKEN", "", "me/faces", "needs a token: set HF_TOKEN"),
        ("HF_TOKEN", hub.token, "faces", "--push-to-hub is faces; give OWNER/NAME"),
    ):
        monkeypatch.setenv(variable, value)
        assert run_here("tools/export.py", run_dir, tmp_path / message[:20], "--push-to-hub", repository) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(message, said), said
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert run_here("tools/export.py", run_dir, tmp_path / "alone", "--push-to-hub", "me/faces") == 1
    assert "is exported but not pushed to me/faces" in capsys.readouterr().err
