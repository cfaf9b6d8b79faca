"""The shipped model: weights, a config and a model card; and `load`, which reads those of this format and whole runs.

              weights (the exponential moving average)   architecture          all that made the weights
vaetrain      OUT/model.safetensors                      OUT/config.json       OUT/config.json
diffusers     OUT/diffusion_pytorch_model.safetensors    OUT/config.json       OUT/vaetrain.json
onnx          OUT/encoder.onnx, OUT/decoder.onnx                               OUT/vaetrain.json

All that made the weights: training config, data, provenance, scores. Each has OUT/provenance.json, what made the export and the
run, and OUT/README.md, the model card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from vaetrain.command_line import plain
from vaetrain.data.readers.reader import open_split
from vaetrain.distributed.exchange import meet
from vaetrain.documents import read_json
from vaetrain.files import fresh_name, replace_file, sha256_of_file
from vaetrain.interchange.diffusers_config import WEIGHTS_FILE, config_of, is_diffusers_folder
from vaetrain.interchange.diffusers_weights import diffusers_tensors
from vaetrain.interchange.onnx_graph import require_onnx, write_onnx
from vaetrain.metrics.latent_statistics import LatentStatistics, latent_statistics
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.runs.directory import RunDirectory, read_dataset, write_json
from vaetrain.runs.provenance import provenance
from vaetrain.runs.recorded import Exported
from vaetrain.strict_json import from_json
from vaetrain.training import checkpoint as checkpoints

FORMAT_VERSION = 1

PRIOR_OF_EXPORT = "flow-matching.safetensors"
"""The prior that an export carries, if one was trained on the model's latents."""

CheckpointName = Literal["best", "last"]
Normalisation = Literal["scalar", "channels"]
WeightsName = Literal["ema", "raw"]
WEIGHTS_FILES: dict[WeightsName, str] = {"ema": "ema.safetensors", "raw": "model.safetensors"}


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
    weights: WeightsName = "ema",
    device: str | torch.device = "cpu",
) -> VAE:
    """A ready VAE (evaluation mode, float32) from an export or a run directory.

    `checkpoint` and `weights` choose among what a run holds; an export holds one set. Raises FileNotFoundError when
    there is neither, ValueError when a file is damaged or of another format.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return load_run(folder, checkpoint=checkpoint, weights=weights, device=device).vae
    if is_diffusers_folder(folder):
        raise ValueError(
            f"{folder} is a diffusers folder: diffusers.AutoencoderKL.from_pretrained reads it, and --init-from starts a training "
            "with it"
        )
    content = read_json(folder / "config.json", Exported, remedy="export the run again", nulls=True)
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/config.json has format {content['format_version']}, this vaetrain reads {FORMAT_VERSION}; "
            "use the version named in it, or export the run again"
        )
    model = {"checkpoint_levels": [], "quant_conv": True} | content["model"]  # which exports did not have at first
    config = from_json(ModelConfig, model, f"{folder}/config.json is damaged: model")
    return ready(checkpoints.load_vae(config, folder / "model.safetensors"), device)


def load_run(
    run: Path,
    *,
    checkpoint: CheckpointName = "best",
    weights: WeightsName = "ema",
    device: str | torch.device = "cpu",
) -> TrainedModel:
    """A run's VAE with its records; see `load`."""
    directory = RunDirectory.open(run)
    chosen = checkpoints.best(run) if checkpoint == "best" else checkpoints.find(run)
    checkpoints.check(chosen)
    config = RunDirectory(chosen).config()
    vae = checkpoints.load_vae(config.model, chosen / WEIGHTS_FILES[weights])
    return TrainedModel(
        vae=ready(vae, device),
        checkpoint=chosen.relative_to(directory.path),
        config=plain(config),
        provenance=RunDirectory(chosen).provenance(),
        dataset=read_dataset(RunDirectory(chosen).dataset_file),
        progress=checkpoints.read_state(chosen)["progress"],
    )


def weights_sha256(run: Path, trained: TrainedModel, weights: WeightsName = "ema") -> str:
    """SHA-256 of the weights of the checkpoint that was loaded, from its checksums."""
    checksums, file = checkpoints.read_checksums(run / trained.checkpoint), WEIGHTS_FILES[weights]
    if file not in checksums:
        raise ValueError(f"{run / trained.checkpoint} is no whole checkpoint: its checksums.json lacks {file}")
    return checksums[file]


def ready(vae: VAE, device: str | torch.device) -> VAE:
    """Move to the device, in the memory format of training; evaluation mode, no gradients."""
    on_device: VAE = vae.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return on_device.eval().requires_grad_(False)


def export(run: Path, out: Path, *, checkpoint: CheckpointName = "best", prior: Path | None = None) -> Path:
    """Write the export of a run's checkpoint (its EMA weights) to `out`, with a copy of the file of its prior; returns `out`.

    Raises FileExistsError when `out` already holds one, so that nothing shipped is overwritten.
    """
    refuse_to_overwrite(out)
    trained = load_run(run, checkpoint=checkpoint)
    scores = scores_of(run, trained)
    card, record = model_card(trained, scores, USE if prior is None else USE_WITH_PRIOR), record_of(trained, scores)
    if prior is not None:
        record["prior_sha256"] = sha256_of_file(prior)
    write_records(out, trained, card, {"config.json": record})
    if prior is not None:
        replace_file(out / PRIOR_OF_EXPORT, prior.read_bytes())
    save_whole(checkpoints.plain_tensors(trained.vae), out / "model.safetensors")
    return out


def export_diffusers(
    run: Path,
    out: Path,
    accelerator: Accelerator,
    *,
    checkpoint: CheckpointName = "best",
    normalise: Normalisation = "scalar",
    data: str | None = None,
    batch_size: int = 64,
) -> Path:
    """The same as a folder that `diffusers.AutoencoderKL.from_pretrained` reads. A collective; the main process writes.

    With what a second stage normalises latents by, of all images of the training split, which lies at `data` or where the run
    found it. Either one number for all channels or one for each is told, never both: diffusers' pipelines that know the second
    apply the first on top. Raises ValueError for a model that is no autoencoder-kl, and for other images than the run's.
    """
    refuse_to_overwrite(out)
    trained = load_run(run, checkpoint=checkpoint, device=accelerator.device)
    vae, trained_on = trained.vae, RunDirectory.open(run).config().data
    if vae.config.kind != "autoencoder-kl":
        raise ValueError(
            f"{run} is a {vae.config.kind} model, and diffusers has no such network; train with --model.kind autoencoder-kl"
        )
    reader = open_split(trained_on if data is None else replace(trained_on, train=data, val=None), accelerator, "train")
    try:
        expected, found = trained.dataset["train"]["fingerprint"], reader.manifest.fingerprint
        if found != expected:
            raise ValueError(
                f"{reader.description}: fingerprint {found}, but {run} was trained on {expected}; name those images with --data"
            )
        latents = latent_statistics(vae, reader, accelerator, batch_size)
    finally:
        reader.close()
    if accelerator.is_main_process:
        scores = scores_of(run, trained)
        config = config_of(vae.config) | normalisation(latents, normalise)
        use = USE_IN_DIFFUSERS[normalise].format(
            scale=config["scaling_factor"], num_images=latents.num_images, mean=latents.mean, std=latents.std
        )
        record = record_of(trained, scores) | {"latents": asdict(latents)}
        card = model_card(trained, scores, use, library="diffusers")
        write_records(out, trained, card, {"vaetrain.json": record, "config.json": config})
        save_whole(diffusers_tensors(vae), out / WEIGHTS_FILE)
    meet("the main process to write the export")
    return out


def export_onnx(run: Path, out: Path, *, checkpoint: CheckpointName = "best") -> tuple[Path, float]:
    """The same as ONNX graphs of encoder and decoder; returns `out` and how far onnxruntime is from the model.

    Raises ValueError where the extra is missing, and when that is too far.
    """
    require_onnx()
    refuse_to_overwrite(out)
    trained = load_run(run, checkpoint=checkpoint)
    scores = scores_of(run, trained)
    out.mkdir(parents=True, exist_ok=True)
    difference = write_onnx(trained.vae, out)
    card = model_card(trained, scores, USE_OF_ONNX, library="onnx")
    write_records(out, trained, card, {"vaetrain.json": record_of(trained, scores)})
    return out, difference


def refuse_to_overwrite(out: Path) -> None:
    """Raise FileExistsError when `out` already holds an export, of any format."""
    if any((out / name).exists() for name in ("model.safetensors", WEIGHTS_FILE, "encoder.onnx")):
        raise FileExistsError(f"{out} already holds an exported model; choose another folder")


def scores_of(run: Path, trained: TrainedModel) -> dict[str, Any] | None:
    """What evaluate.py measured of this checkpoint, None if it has not."""
    file = RunDirectory(run).evaluation_file
    if not file.is_file():
        return None
    scores: dict[str, Any] = read_json(file, remedy="score the run again, or delete it", nulls=True)
    # Those of another checkpoint are not this model's.
    return scores if scores.get("checkpoint") == str(trained.checkpoint) else None


def record_of(trained: TrainedModel, scores: dict[str, Any] | None) -> dict[str, Any]:
    """All that made the weights."""
    return {
        "format_version": FORMAT_VERSION,
        "model": trained.config["model"],
        "training": trained.config,
        "checkpoint": str(trained.checkpoint),
        "progress": trained.progress,
        "dataset": trained.dataset,
        "provenance": trained.provenance,
        "scores": scores,
    }


def write_records(out: Path, trained: TrainedModel, card: str, records: Mapping[str, dict[str, Any]]) -> None:
    """Model card, provenance, and the JSON files of `records`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, record in records.items():
        write_json(out / name, record)
    made_by = provenance(None, trained.dataset["train"]["fingerprint"])
    write_json(out / "provenance.json", {**made_by, "training": trained.provenance})
    replace_file(out / "README.md", card.encode())


def save_whole(tensors: dict[str, Tensor], file: Path) -> None:
    """Write weights aside and rename them: last of all, for the export is whole when they are there."""
    aside = fresh_name(file)
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.rename(file)


def normalisation(latents: LatentStatistics, normalise: Normalisation) -> dict[str, Any]:
    """diffusers' config of how latents become those of a second stage, z′ of mean 0 and deviation 1.

    scalar: z′ = (z − shift_factor) · scaling_factor. channels: z′ = (z − latents_mean) · scaling_factor / latents_std.
    """
    if normalise == "scalar":
        shift, scale, mean, std = latents.mean, 1 / latents.std, None, None
    else:
        shift, scale, mean, std = None, 1.0, list(latents.channel_mean), list(latents.channel_std)
    return {"scaling_factor": scale, "shift_factor": shift, "latents_mean": mean, "latents_std": std}


USE = """```python
import vaetrain

vae = vaetrain.load("path/to/this/folder")
x = vae.from_uint8(images)          # uint8 (b, c, h, w) → float in [{low:g}, {high:g}]
z = vae.encode(x).mode()
recon = vae.decode(z)
new = vae.likelihood.to_uint8(vae.sample(16, seed=0))
```"""

USE_WITH_PRIOR = USE.replace(
    "vae.sample(16, seed=0))", "vae.sample(16, seed=0))   # from its flow-matching prior; class_=NAME draws one class"
)

USE_IN_DIFFUSERS: dict[Normalisation, str] = {
    "scalar": """```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("path/to/this/folder")
x = images / 127.5 - 1                                                            # uint8 (b, c, h, w) → float in [-1, 1]
z = (vae.encode(x).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor
recon = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
```

`encode` and `decode` neither shift nor scale. Latents z ~ q(z|x) of the {num_images:,} training images have mean {mean:.6g} and
standard deviation {std:.6g}, all channels together; `scaling_factor` is 1 over the second.""",
    "channels": """```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("path/to/this/folder")
mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
x = images / 127.5 - 1                                                            # uint8 (b, c, h, w) → float in [-1, 1]
z = (vae.encode(x).latent_dist.sample() - mean) / std
recon = vae.decode(z * std + mean).sample.clamp(-1, 1)
```

`encode` and `decode` neither shift nor scale. `latents_mean` and `latents_std` are those of each channel of z ~ q(z|x) over the
{num_images:,} training images; `scaling_factor` is {scale:g}, for pipelines that apply it on top of them.""",
}

USE_OF_ONNX = """```python
import onnxruntime

encoder, decoder = (onnxruntime.InferenceSession(f"path/to/this/folder/{{name}}.onnx") for name in ("encoder", "decoder"))
x = images.astype("float32") * {scale!r} + {low:g}            # uint8 (b, c, h, w) → float in [{low:g}, {high:g}]
z = encoder.run(["mean"], {{"x": x}})[0]
recon = decoder.run(["image"], {{"z": z}})[0]
```"""


def started_from(provenance: Mapping[str, Any]) -> str:
    """A sentence for each set of weights that a training, or one that it went on from, started with."""
    sentences = []
    made_by: Mapping[str, Any] | None = provenance
    while made_by:
        if source := made_by.get("init_from"):
            sha256 = made_by.get("init_from_sha256")
            sentences.append(f"Started from the weights of `{source}`" + (f" (SHA-256 `{sha256}`)." if sha256 else "."))
        made_by = made_by.get("parent")
    return "\n".join(sentences)


def model_card(trained: TrainedModel, scores: dict[str, Any] | None, use: str, library: str = "vaetrain") -> str:
    """The README of an export: what it is, how to `use` it, what it was trained on, and its measured scores."""
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
    use = use.format(low=low, high=high, scale=(high - low) / 255) if library != "diffusers" else use
    only = config["train"]["only"]
    frozen = "" if only == "all" else f"Only the {only} was trained; the rest is as it was.\n"
    begin = started_from(trained.provenance)
    return f"""---
library_name: {library}
tags: [vae, image-generation]
---

# {Path(config["run_dir"]).name}

A {model["kind"]} {kind} for {model["image_size"]}×{model["image_size"]} images with {model["in_channels"]} channel(s):
{num_parameters:,} parameters, latent {" × ".join(map(str, vae.config.latent_shape))}, likelihood {model["likelihood"]}.

{use}

## Data

{split["num_images"]:,} training images ({", ".join(classes)}), fingerprint `{data["fingerprint"]}`. The images' licence
binds this model too: whoever publishes it must name the data's source and keep to its terms (Animal Faces HQ, for
example, is © NAVER Corp., CC BY-NC 4.0: attribution, no commercial use).

## Training

{begin + chr(10) if begin else ""}{frozen}{trained.progress["images_seen"]:,} images seen in {trained.progress["step"]:,} steps of
{config["train"]["global_batch_size"]}, β {config["objective"]["beta"]:g}, learning rate {config["optim"]["lr"]:g}, seed
{config["seed"]}, on {made["num_processes"]} process(es), {made["device"]}; vaetrain {made["packages"].get("vaetrain")}, git
revision {made["git_revision"]}{" with uncommitted changes" if made["git_dirty"] else ""}. `config.json` holds the whole
configuration and all package versions.

## Scores

{table if rows else "Not yet measured: run `vaetrain/evaluate.py` before exporting."}
"""
