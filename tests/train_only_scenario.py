"""A part of a model trained alone, on any number of processes."""

import json
from pathlib import Path
from unittest.mock import patch

import torch

import vaetrain.train
from launching import TINY
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.distributed import processes
from vaetrain.training.figures import RunFigures
from vaetrain.training.step import TrainStep

SMALL_KL = ("--model.kind", "autoencoder-kl", "--model.base-channels", "32", "--model.channel-mult", "1", "1")


def train(shards: str, source: Path, out: Path) -> None:
    """For each part: losses, and how far the processes' weights are apart in the end; OUT/results.json. A collective."""
    accelerator = processes.start()
    results = {}
    with processes.finishing(accelerator):
        for part in ("encoder", "decoder"):
            built: list[TrainStep] = []
            own = [
                "--data.train",
                shards,
                "--run-dir",
                str(out / part),
                "--init-from",
                str(source),
                "--train.only",
                part,
            ]
            length = ["--train.num-images", "80", "--train.micro-batch-size", "5", "--log.every-steps", "1"]
            config = parse(Config, None, [*TINY, *SMALL_KL, *own, *length])
            build = TrainStep.build

            def remember(*arguments, built=built, build=build, **options):
                built.append(build(*arguments, **options))
                return built[-1]

            with patch.object(RunFigures, "draw"), patch.object(TrainStep, "build", remember):
                vaetrain.train.train(config, accelerator)
            weights = torch.cat([each.detach().flatten() for each in built[0].vae.parameters()])
            everybody = accelerator.gather(weights[None])
            built.clear()
            records = [json.loads(line) for line in (out / part / "metrics.jsonl").read_text().splitlines()]
            results[part] = {
                "losses": [record["train/loss"] for record in records if record["split"] == "train"],
                "apart": float((everybody - everybody[0]).abs().max()),
            }
            accelerator.wait_for_everyone()
            accelerator.free_memory()
        if accelerator.is_main_process:
            (out / "results.json").write_text(json.dumps(results))
