"""Trains and validates on however many processes there are, and writes what happened as JSON; for test_parity.py."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import vaetrain.train
import vaetrain.training.step
from vaetrain.config import Config, LogConfig, OptimConfig, TrainConfig
from vaetrain.data.config import DataConfig
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.distributed import processes
from vaetrain.metrics.validation import validate
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.objective.config import AdversarialConfig, ObjectiveConfig, PerceptualConfig
from vaetrain.training.figures import RunFigures
from vaetrain.training.step import TrainStep

NUM_STEPS = 20
MODEL = ModelConfig(image_size=16, base_channels=16, channel_mult=(1, 2), num_res_blocks=1, latent_channels=4)
ADVERSARIAL = ("adversarial", "adversarial_weight", "discriminator_loss")
EVAL_BATCH_SIZES = {0: (1, 7, 23, 64), 2: (7, 64)}
"""By number of workers: every batch size starts workers of its own, which takes seconds."""


def perceptual(lpips: Path) -> ObjectiveConfig:
    """LPIPS that counts about as much as the distortion."""
    files = {"backbone": lpips / "alex-backbone.pth", "heads": lpips / "alex-heads.pth"}
    return ObjectiveConfig(perceptual=PerceptualConfig(weight=200.0, net="alex", resize=32, **files))


def adversarial() -> ObjectiveConfig:
    """With all that has a state or draws at random, from the first step on."""
    return ObjectiveConfig(
        adversarial=AdversarialConfig(
            weight=0.1, layers=1, channels=16, norm="spectral", start_fraction=0.1, ramp_fraction=0.2, lecam=0.01, r1=0.1,
            augment=("colour", "translation"),
        )
    )  # fmt: skip


def config(shards: str, run_dir: Path, micro_batch_size: int | None = None) -> Config:
    return Config(
        data=DataConfig(train=shards),
        model=MODEL,
        optim=OptimConfig(warmup_images=64),
        train=TrainConfig(num_images=NUM_STEPS * 32, global_batch_size=32, micro_batch_size=micro_batch_size),
        log=LogConfig(every_steps=1, num_pictures=2),
        run_dir=run_dir,
    )


def train(accelerator: Accelerator, settings: Config) -> dict[str, object]:
    """Losses of every step, and how far the weights of the processes are apart in the end."""
    built: list[VAE] = []

    class RememberedVAE(VAE):
        def __init__(self, model_config: ModelConfig) -> None:
            super().__init__(model_config)
            if not torch.empty(0).is_meta:
                built.append(self)

    with patch.object(vaetrain.training.step, "VAE", RememberedVAE):
        vaetrain.train.train(settings, accelerator)
    weights = torch.cat([parameter.detach().flatten() for parameter in built[0].parameters()])
    everybody = accelerator.gather(weights[None])
    records = [json.loads(line) for line in (settings.run_dir / "metrics.jsonl").read_text().splitlines()]
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return {
        "losses": [record["train/loss"] for record in records if record["split"] == "train"],
        "grad_norms": [record["train/grad_norm"] for record in records if record["split"] == "train"],
        "perceptual": [record.get("train/perceptual") for record in records if record["split"] == "train"],
        "adversarial": [
            [record.get(f"train/{name}") for name in ADVERSARIAL] for record in records if record["split"] == "train"
        ],
        "lpips": [record.get("val_raw/lpips") for record in records if record["split"] == "val"],
        "elbos": [record["val_raw/elbo_nats"] for record in records if record["split"] == "val"],
        "apart": float((everybody - everybody[0]).abs().max()),
        "norm": float(weights.norm()),
    }


def how_gradients_are_reduced(accelerator: Accelerator, settings: Config) -> dict[str, bool]:
    """What DDP does with a model that has a buffer (a fixed σ)."""
    model = dataclasses.replace(settings.model, likelihood="gaussian-fixed")
    layout = BatchLayout.of(32, None, accelerator.process_index, accelerator.num_processes)
    uncompiled = dataclasses.replace(settings.train, compile=False)
    wrapped = TrainStep.build(dataclasses.replace(settings, model=model, train=uncompiled), layout, accelerator).model
    accelerator.free_memory()
    assert list(wrapped.buffers())
    return {
        "into views of buckets": wrapped.gradient_as_bucket_view,
        "with buffers": wrapped.will_sync_module_buffers(),
    }


def train_unwrapped(accelerator: Accelerator, settings: Config) -> dict[str, object]:
    """The mistake that the parity test must catch: the step calls the model inside DDP, so nothing reduces gradients."""
    prepare = accelerator.prepare

    def prepare_and_unwrap(model, optimizer):
        wrapped, prepared = prepare(model, optimizer)
        return accelerator.unwrap_model(wrapped), prepared

    with patch.object(accelerator, "prepare", prepare_and_unwrap):
        return train(accelerator, settings)


def validation(accelerator: Accelerator, shards: str) -> dict[str, object]:
    """For each reader, number of workers and batch size: the images each process saw, and the mean scores."""
    torch.manual_seed(0)
    vae = VAE(MODEL).eval()
    results = {}
    for reader_name, num_workers in (("resident", 0), ("indexed", 0), ("indexed", 2), ("stream", 0)):
        data = DataConfig(train=shards, reader=reader_name, num_workers=num_workers)
        reader = open_reader(data, "val", device=accelerator.device)
        for batch_size in EVAL_BATCH_SIZES[num_workers]:
            batches = reader.eval_batches(batch_size, accelerator.process_index, accelerator.num_processes)
            mine = [index for batch in batches for index in batch.indices.tolist()]
            scores = validate(vae, reader, accelerator, batch_size, seed=0)
            results[f"{reader_name}, {num_workers} workers, batches of {batch_size}"] = {
                "indices": gather_object(mine),
                "scores": scores.record,
            }
        reader.close()
    return results


def scenarios(shards: str, out: Path, lpips: Path) -> None:
    """Write OUT/results.json; a collective of all processes."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        results = {
            "num_processes": accelerator.num_processes,
            "plain": train(accelerator, config(shards, out / "plain")),
            "validation": validation(accelerator, shards),
        }
        with patch.object(RunFigures, "draw"):  # which take longer than the trainings; once is enough
            results["accumulated"] = train(accelerator, config(shards, out / "accumulated", micro_batch_size=8))
            for term, objective in (("perceptual", perceptual(lpips)), ("adversarial", adversarial())):
                for name, micro_batch_size in ((term, None), (f"{term}, accumulated", 8)):
                    with_term = config(shards, out / name, micro_batch_size)
                    once_at_the_end = dataclasses.replace(with_term.train, val_every_epochs=100)
                    with_term = dataclasses.replace(with_term, train=once_at_the_end, objective=objective)
                    results[name] = train(accelerator, with_term)
            compressed = config(shards, out / "compressed")
            compressed = dataclasses.replace(
                compressed, train=dataclasses.replace(compressed.train, gradient_compression="bf16")
            )
            results["compressed"] = train(accelerator, compressed)
            if accelerator.num_processes > 1:
                results["reduction"] = how_gradients_are_reduced(accelerator, config(shards, out))
            results["unwrapped"] = train_unwrapped(accelerator, config(shards, out / "unwrapped"))
        if accelerator.is_main_process:
            (out / "results.json").write_text(json.dumps(results))
