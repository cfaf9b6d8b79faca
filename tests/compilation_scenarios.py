"""Trainings of a compiled model that count what was captured, for test_compilation.py; without the type checks of the tests,
whose wrappers a graph cannot hold."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.utils import counters

from parity_scenarios import config
from vaetrain.config import Config
from vaetrain.distributed import processes
from vaetrain.model.autoencoder import VAE
from vaetrain.train import train
from vaetrain.training.figures import RunFigures


def compile_cheaply(vae: VAE, **options: object) -> None:
    """Capture as asked, and run what was captured as it is: generating and compiling C++ takes a minute."""
    nn.Module.compile(vae, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])


def captured(accelerator: Accelerator, settings: Config) -> dict[str, int]:
    """Graphs captured in a training, and how often it was left for uncompiled code."""
    torch.compiler.reset()
    counters.clear()
    with patch.object(VAE, "compile", compile_cheaply), patch.object(RunFigures, "draw"):
        train(settings, accelerator)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for record in map(json.loads, lines) if record["split"] == "train"]


def scenarios(shards: str, out: Path, checkpointed: bool) -> None:
    """Write OUT/results.json; a collective of all processes."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        plain = config(shards, out / "plain", micro_batch_size=8)
        optim = replace(plain.optim, schedule="constant")  # whose length is not that of the training
        plain = replace(plain, optim=optim, train=replace(plain.train, num_images=6 * 32, compile=False))
        model = replace(plain.model, checkpoint_levels=(0, 1) if checkpointed else ())
        compiled = replace(
            plain, model=model, run_dir=out / "compiled", train=replace(plain.train, compile=True, num_images=3 * 32)
        )
        results = {
            "first": captured(accelerator, compiled),  # 3 steps, each of several micro-batches, and a validation
            "resumed": captured(accelerator, replace(compiled, train=replace(compiled.train, num_images=6 * 32))),
        }
        with patch.object(RunFigures, "draw"):
            train(plain, accelerator)
        accelerator.wait_for_everyone()
        results |= {"losses": losses(out / "compiled"), "plain_losses": losses(out / "plain")}
        if accelerator.is_main_process:
            (out / "results.json").write_text(json.dumps(results))
        accelerator.free_memory()
