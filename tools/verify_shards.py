"""Say what a shard set or a latent set holds and whether its files are as the manifest says, or what training would read of it.

python tools/verify_shards.py datasets/photos128 --full

python tools/verify_shards.py datasets/photos128 --plan 8 4 --global-batch-size 512
"""

from dataclasses import dataclass

from tyro.conf import Positional

from vaetrain.command_line import parse, user_errors
from vaetrain.data.config import DataConfig, ReaderName
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.read_plan import ReadPlan
from vaetrain.data.remote.remote import RemoteShards
from vaetrain.latents.manifest import is_latent_set


@dataclass(frozen=True)
class VerifyConfig:
    """Verify a shard set, or a set of latents."""

    dir: Positional[str]
    """Folder of the set, or its manifest.json; or, of shards, a URL of either, whose manifest and index alone are read."""

    full: bool = False
    """Also take every file's SHA-256 and decode every image, or read every latent, in place of comparing sizes."""

    plan: tuple[int, int] | None = None
    """NUM_PROCESSES NUM_WORKERS: also say what training on so many processes, each with so many decoding workers, would
    read, and the memory it needs. The options below are training's and count for the plan alone."""

    val: str | None = None
    """--data.val: shard set whose `val` split is scored; None: the same."""

    classes: tuple[str, ...] = ()
    """--data.classes: keep only these; none given: all."""

    reader: ReaderName = "auto"
    """--data.reader"""

    resident_gib: float = 4.0
    """--data.resident-gib: auto picks resident up to this size of a decoded split (GiB)."""

    global_batch_size: int | None = None
    """--train.global-batch-size: images per optimizer step over all processes; None: the largest up to 64 that divides among them
    and that the train split fills."""

    micro_batch_size: int | None = None
    """--train.micro-batch-size: images one process handles at a time; None: no accumulation."""


def main() -> None:
    """Print the facts and the plan, then OK, or the list of problems with exit 1."""
    config = parse(VerifyConfig, __doc__, flags=True)
    with user_errors():
        if is_latent_set(config.dir):
            verify_latents(config)
            return
        remote = RemoteShards.of(data_config(config, 0), config.dir)
        if remote and config.full:
            raise ValueError(f"--full reads local shards, and {config.dir} is a URL; copy them to a folder first")
        shard_set = remote.shard_set() if remote else ShardSet.open(config.dir)
        manifest = shard_set.manifest
        size = f"{manifest.image_size}×{manifest.image_size}" if manifest.image_size else "images of sizes of their own"
        print(f"{size}, {manifest.channels} channel(s), {manifest.encoding.format}")
        for name, split in manifest.splits.items():
            counts = ", ".join(f"{class_name} {count:,}" for class_name, count in split.class_counts.items())
            print(
                f"{name}: {split.num_images:,} images ({counts}), {len(split.shards):,} shards, {split.num_bytes:,} bytes"
            )
        print(f"fingerprint {manifest.fingerprint}")
        if config.plan:
            num_images = manifest.splits["train"].num_images if "train" in manifest.splits else 0
            print(forecast(config, num_images, *config.plan).describe())
        if remote:
            print("OK: manifest and index; shards behind a URL are checked as they are read")
            return
        shard_set.verify(config.full)
        print(
            "OK: every file and every image" if config.full else "OK: every file has its size (--full reads them too)"
        )


def verify_latents(config: VerifyConfig) -> None:
    """The same of a folder of latents."""
    if config.plan:
        raise ValueError(f"--plan is about shards of images, and {config.dir} holds latents")
    from vaetrain.latents.latent_set import LatentSet  # here, since it brings torch, which shards do without

    latents = LatentSet.open(config.dir)
    manifest = latents.manifest
    twins = "with mirrored twins" if manifest.flipped else "without twins"
    print(f"latents {'×'.join(map(str, manifest.latent_shape))} in {manifest.dtype}, {twins}, layout {manifest.layout}")
    for name, split in manifest.splits.items():
        counts = ", ".join(f"{class_name} {count:,}" for class_name, count in split.class_counts.items())
        print(
            f"{name}: {split.num_images:,} latents ({counts}), {len(split.shards):,} files, {split.num_bytes:,} bytes"
        )
        print(f"  of the shard set with fingerprint {split.source_fingerprint}")
    print(f"encoded by {manifest.encoder.checkpoint} ({manifest.encoder.weights}), SHA-256 {manifest.encoder.sha256}")
    print(f"fingerprint {manifest.fingerprint}")
    latents.verify(config.full)
    print("OK: every file, every latent and their statistics" if config.full else "OK: every file has its size")


def data_config(config: VerifyConfig, num_workers: int) -> DataConfig:
    """What training would be given."""
    return DataConfig(
        train=config.dir, val=config.val, classes=config.classes, reader=config.reader, num_workers=num_workers,
        resident_gib=config.resident_gib,
    )  # fmt: skip


def forecast(config: VerifyConfig, num_images: int, num_processes: int, num_workers: int) -> ReadPlan:
    """What training would read of a train split with so many images."""
    each = max(1, min(64, num_images) // max(1, num_processes))
    return ReadPlan.of(
        data_config(config, num_workers), num_processes=num_processes,
        global_batch_size=config.global_batch_size or each * max(1, num_processes),
        micro_batch_size=config.micro_batch_size,
    )  # fmt: skip


if __name__ == "__main__":
    main()
