"""Draw new images from a trained VAE into a sample set, on any number of processes.

accelerate launch [--config_file launch/F.yaml] vaetrain/sample.py --run RUN --num-images 2000 --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaetrain.command_line import parse, plain, user_errors


@dataclass(frozen=True)
class SampleConfig:
    """A sample set: image i of it depends on the run, the seed, the temperature and i alone."""

    run: Path
    """Run directory of the trained model."""

    out: Path
    """Folder for shards and manifest; must not hold a sample set yet."""

    num_images: int = 2000
    """Images to draw."""

    seed: int = 0
    """Names the set: another seed, other images."""

    prior: Literal["standard"] = "standard"
    """Where latents come from: the standard normal the model was trained against."""

    temperature: float = 1.0
    """Standard deviation of the latents; below 1 safer and more alike."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest. EMA weights either way."""

    batch_size: int = 64
    """Images decoded at a time by one process."""

    images_per_shard: int = 1000
    """Images in one tar file."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name in ("num_images", "batch_size", "images_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; it must not be negative")


if __name__ == "__main__":
    CONFIG = parse(SampleConfig, __doc__)  # before the imports below, which take seconds

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from vaetrain import distributed
from vaetrain.data.encode import png
from vaetrain.data.shard_writer import ShardWriter
from vaetrain.export import load_run
from vaetrain.run import provenance, write_json
from vaetrain.sampling import generate


def sample(config: SampleConfig, accelerator: Accelerator) -> None:
    """Write `config.num_images` PNG images (decoder means, rounded to the nearest of 256 levels) and the manifest.

    Every process calls this and writes shards of its own, rank-RRRR-NNNNNN.tar; the manifest is written last.
    """
    if (config.out / "manifest.json").exists():
        raise FileExistsError(f"{config.out} already holds a sample set; choose another --out")
    trained = load_run(config.run, checkpoint=config.checkpoint, device=accelerator.device)
    config.out.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    with ShardWriter(config.out, f"rank-{accelerator.process_index:04d}", config.images_per_shard) as writer:
        blocks = generate(
            trained.vae, accelerator, config.num_images,
            seed=config.seed, temperature=config.temperature, batch_size=config.batch_size,
        )  # fmt: skip
        with tqdm(total=config.num_images, unit="img", disable=None if accelerator.is_main_process else True) as bar:
            for indices, images in blocks:
                for index, image in zip(indices, images.cpu(), strict=True):
                    writer.write(f"{index:08d}", png(image), "png", {"index": index, "seed": config.seed})
                bar.update(len(indices) * accelerator.num_processes)
    shards = gather_object([plain(shard) for shard in writer.shards])
    if accelerator.is_main_process:
        manifest = {
            "format_version": 1,
            "kind": "sample set",
            "run": str(config.run),
            "checkpoint": str(trained.checkpoint),
            "prior": config.prior,
            "temperature": config.temperature,
            "seed": config.seed,
            "count": config.num_images,
            "shards": shards,
            "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
            "provenance": provenance(
                device=distributed.device_name(accelerator.device),
                num_processes=accelerator.num_processes,
                dataset_fingerprint=trained.dataset["train"]["fingerprint"],
            ),
        }
        write_json(config.out / "manifest.json", manifest)
        print(f"{config.num_images:,} samples in {len(shards)} shard(s) written to {config.out}")


def main(config: SampleConfig) -> None:
    """Join the other processes and sample."""
    with user_errors():
        accelerator = distributed.start()
        with distributed.finishing(accelerator):
            sample(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
