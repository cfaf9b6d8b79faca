"""The shipped model: safetensors, a config and a model card; and `load`, which reads those and whole runs.

OUT/model.safetensors   weights (the exponential moving average)
OUT/config.json         architecture, and everything that made the weights: training config, data, provenance, scores
OUT/provenance.json     what made the export, and the run
OUT/README.md           model card
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from vaetrain.command_line import plain
from vaetrain.documents import read_json
from vaetrain.files import fresh_name, replace_file
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.runs.directory import RunDirectory, read_dataset, write_json
from vaetrain.runs.provenance import provenance
from vaetrain.runs.recorded import Exported
from vaetrain.strict_json import from_json
from vaetrain.training import checkpoint as checkpoints

FORMAT_VERSION = 1

CheckpointName = Literal["best", "last"]


@dataclass(frozen=True)
class TrainedModel:
    """A VAE and the records of what made it."""

    vae: VAE
    checkpoint: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    dataset: dict[str, Any]
    progress: dict[str, Any]

    def position(self) -> dict[str, int | float]:
        """How far training was at the checkpoint, under the names that training's own records have."""
        step, images_seen = self.progress["step"], self.progress["images_seen"]
        split, classes = self.dataset["train"]["splits"]["train"], self.config["data"]["classes"]
        if unknown := set(classes) - split["class_counts"].keys():
            raise ValueError(
                f"{self.checkpoint} was trained on classes that its dataset.json has not: {sorted(unknown)}"
            )
        num_images = sum(split["class_counts"][name] for name in classes) if classes else split["num_images"]
        batch_size = self.config["train"]["global_batch_size"]
        if batch_size > num_images:
            raise ValueError(
                f"{self.checkpoint} is damaged: it was trained in batches of {batch_size} of {num_images} images; take another run"
            )
        return {
            "step": step,
            "images_seen": images_seen,
            # An epoch is whole global batches.
            "epoch": round(images_seen / (num_images // batch_size * batch_size), 6),
        }


def load(
    path: str | Path,
    *,
    checkpoint: CheckpointName = "best",
    weights: Literal["ema", "raw"] = "ema",
    device: str | torch.device = "cpu",
) -> VAE:
    """A ready VAE (evaluation mode, float32) from an export or a run directory.

    `checkpoint` and `weights` choose among what a run holds; an export holds one set. Raises FileNotFoundError when
    there is neither, ValueError when a file is damaged or of another format.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return load_run(folder, checkpoint=checkpoint, weights=weights, device=device).vae
    content = read_json(folder / "config.json", Exported, remedy="export the run again", nulls=True)
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/config.json has format {content['format_version']}, this vaetrain reads {FORMAT_VERSION}; "
            "use the version named in it, or export the run again"
        )
    model = {"checkpoint_levels": []} | content["model"]  # which exports did not have at first
    config = from_json(ModelConfig, model, f"{folder}/config.json is damaged: model")
    return ready(checkpoints.load_vae(config, folder / "model.safetensors"), device)


def load_run(
    run: Path,
    *,
    checkpoint: CheckpointName = "best",
    weights: Literal["ema", "raw"] = "ema",
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """A run's VAE with its records; see `load`."""
    directory = RunDirectory.open(run)
    chosen = checkpoints.best(run) if checkpoint == "best" else checkpoints.find(run)
    checkpoints.check(chosen)
    config = RunDirectory(chosen).config()
    file = chosen / ("ema.safetensors" if weights == "ema" else "model.safetensors")
    vae = checkpoints.load_vae(config.model, file)
    return TrainedModel(
        vae=ready(vae, device),
        checkpoint=chosen.relative_to(directory.path),
        config=plain(config),
        provenance=RunDirectory(chosen).provenance(),
        dataset=read_dataset(RunDirectory(chosen).dataset_file),
        progress=checkpoints.read_state(chosen)["progress"],
    )


def ready(vae: VAE, device: str | torch.device) -> VAE:
    """Move to the device, in the memory format of training; evaluation mode, no gradients."""
    on_device: VAE = vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return on_device.eval().requires_grad_(False)


def export(run: Path, out: Path, *, checkpoint: CheckpointName = "best") -> Path:
    """Write the export of a run's checkpoint (its EMA weights) to `out`; returns `out`.

    Raises FileExistsError when `out` already holds one, so that nothing shipped is overwritten.
    """
    if (out / "model.safetensors").exists():
        raise FileExistsError(f"{out} already holds an exported model; choose another folder")
    trained = load_run(run, checkpoint=checkpoint)
    evaluation_file = RunDirectory(run).evaluation_file
    again = "score the run again, or delete it"
    scores = read_json(evaluation_file, remedy=again, nulls=True) if evaluation_file.is_file() else None
    if scores is not None and scores.get("checkpoint") != str(trained.checkpoint):
        scores = None  # of another checkpoint: they are not this model's
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "config.json",
        {
            "format_version": FORMAT_VERSION,
            "model": trained.config["model"],
            "training": trained.config,
            "checkpoint": str(trained.checkpoint),
            "progress": trained.progress,
            "dataset": trained.dataset,
            "provenance": trained.provenance,
            "scores": scores,
        },
    )
    made_by = provenance(None, trained.dataset["train"]["fingerprint"])
    write_json(out / "provenance.json", {**made_by, "training": trained.provenance})
    replace_file(out / "README.md", model_card(trained, scores).encode())
    aside = fresh_name(out / "model.safetensors")
    save_file(checkpoints.plain_tensors(trained.vae), aside, metadata={"format": "pt"})
    aside.rename(out / "model.safetensors")
    return out


def model_card(trained: TrainedModel, scores: dict[str, Any] | None) -> str:
    """The README of an export: what it is, how to use it, what it was trained on, and its measured scores."""
    config, data, made = trained.config, trained.dataset["train"], trained.provenance
    model, vae = config["model"], trained.vae
    num_parameters = sum(parameter.numel() for parameter in vae.parameters())
    split = data["splits"]["train"]
    classes = config["data"]["classes"] or data["classes"]
    rows = [
        (name, f"{value:.4f}")
        for name, value in (scores or {}).items()
        if isinstance(value, int | float) and "/" in name and math.isfinite(value)
    ]
    table = "\n".join(["| score | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    low, high = vae.likelihood.pixel_range
    kind = "variational autoencoder" if model["variational"] else "deterministic autoencoder"
    return f"""---
library_name: vaetrain
tags: [vae, image-generation]
---

# {Path(config["run_dir"]).name}

A {model["kind"]} {kind} for {model["image_size"]}×{model["image_size"]} images with {model["in_channels"]} channel(s):
{num_parameters:,} parameters, latent {" × ".join(map(str, vae.config.latent_shape))}, likelihood {model["likelihood"]}.

```python
import vaetrain

vae = vaetrain.load("path/to/this/folder")
x = vae.from_uint8(images)          # uint8 (b, c, h, w) → float in [{low:g}, {high:g}]
z = vae.encode(x).mode()
recon = vae.decode(z)
new = vae.likelihood.to_uint8(vae.sample(16, seed=0))
```

## Data

{split["num_images"]:,} training images ({", ".join(classes)}), fingerprint `{data["fingerprint"]}`. The images' licence
binds this model too: whoever publishes it must name the data's source and keep to its terms (Animal Faces HQ, for
example, is © NAVER Corp., CC BY-NC 4.0: attribution, no commercial use).

## Training

{trained.progress["images_seen"]:,} images seen in {trained.progress["step"]:,} steps of
{config["train"]["global_batch_size"]}, β {config["objective"]["beta"]:g}, learning rate {config["optim"]["lr"]:g}, seed
{config["seed"]}, on {made["num_processes"]} process(es), {made["device"]}; vaetrain {made["packages"].get("vaetrain")}, git
revision {made["git_revision"]}{" with uncommitted changes" if made["git_dirty"] else ""}. `config.json` holds the whole
configuration and all package versions.

## Scores

{table if rows else "Not yet measured: run `vaetrain/evaluate.py` before exporting."}
"""
