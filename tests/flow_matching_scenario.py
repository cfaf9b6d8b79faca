"""A prior trained on a few latents, on any number of processes; for test_train_prior.py."""

import json
from pathlib import Path
from unittest.mock import patch

import torch

from vaetrain.command_line import parse
from vaetrain.distributed import processes
from vaetrain.priors.flow_matching.config import PriorTraining
from vaetrain.priors.flow_matching.stage import FlowMatchingStage
from vaetrain.train import train
from vaetrain.train_prior import SecondStage

SMALL = (
    "--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--train.global-batch-size", "20",
    "--optim.warmup-images", "40", "--log.every-steps", "1", "--log.num-pictures", "8",
)  # fmt: skip


def prior_config(*arguments: object) -> PriorTraining:
    return parse(PriorTraining, None, [str(argument) for argument in (*SMALL, *arguments)])


def train_small(first_stage: str, latents: str, out: Path) -> None:
    """Losses of 20 steps, plain and accumulated, and how far the processes' weights are apart; OUT/results.json. A collective."""
    accelerator = processes.start()
    results = {}
    with processes.finishing(accelerator):
        for name, micro in (("plain", "None"), ("accumulated", "5")):
            built: list[SecondStage] = []
            build = FlowMatchingStage.build_model

            def remember(stage, built=built, build=build):
                build(stage)
                built.append(stage)

            config = prior_config(
                "--first-stage", first_stage, "--data.latents", latents, "--run-dir", out / name,
                "--train.num-images", 400, "--train.micro-batch-size", micro,
            )  # fmt: skip
            with (
                patch.object(FlowMatchingStage, "build_model", remember),
                patch.object(FlowMatchingStage, "finish"),
                patch.object(FlowMatchingStage, "draw"),
            ):
                train(config, accelerator, kind=SecondStage)
            weights = torch.cat([each.detach().flatten() for each in built[0].step.module.parameters()])
            everybody = accelerator.gather(weights[None])
            built.clear()
            records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
            results[name] = {
                "losses": [record["train/loss"] for record in records if record["split"] == "train"],
                "held_out": [record["val/flow_loss"] for record in records if record["split"] == "val"],
                "norm": float(weights.norm()),
                "apart": float((everybody - everybody[0]).abs().max()),
            }
            accelerator.wait_for_everyone()
            accelerator.free_memory()
        if accelerator.is_main_process:
            (out / "results.json").write_text(json.dumps(results))
