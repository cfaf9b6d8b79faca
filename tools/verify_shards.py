"""Say what a shard set holds and whether its files are as the manifest says.

python tools/verify_shards.py datasets/photos128 --full
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from vaetrain.command_line import parse, user_errors
from vaetrain.data.shards import ShardSet


@dataclass(frozen=True)
class VerifyConfig:
    """Verify a shard set."""

    dir: Positional[Path]
    """Folder of the shard set, or its manifest.json."""

    full: bool = False
    """Also take every file's SHA-256 and decode every image, in place of comparing sizes."""


def main() -> None:
    """Print the facts, then OK, or the list of problems with exit 1."""
    config = parse(VerifyConfig, __doc__, flags=True)
    with user_errors():
        shard_set = ShardSet.open(config.dir)
        manifest = shard_set.manifest
        print(
            f"{manifest.image_size}×{manifest.image_size}, {manifest.channels} channel(s), {manifest.encoding.format}"
        )
        for name, split in manifest.splits.items():
            counts = ", ".join(f"{class_name} {count:,}" for class_name, count in split.class_counts.items())
            print(
                f"{name}: {split.num_images:,} images ({counts}), {len(split.shards):,} shards, {split.num_bytes:,} bytes"
            )
        print(f"fingerprint {manifest.fingerprint}")
        shard_set.verify(config.full)
        print(
            "OK: every file and every image" if config.full else "OK: every file has its size (--full reads them too)"
        )


if __name__ == "__main__":
    main()
