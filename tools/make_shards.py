"""Make a shard set from a folder, zip or tar of images, Parquet files, MNIST's files, another shard set, or the built-in faces.

python tools/make_shards.py photos datasets/photos128 --size 128 --val-count 10%
python tools/make_shards.py datasets/photos128 datasets/photos64 --size 64
"""

import sys

from vaetrain.command_line import parse, user_errors
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import closing_line, make_shards, make_share


def main() -> None:
    """Make the shards and say what they hold; exit 1 with a message when that is not possible."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a path need not be Unicode
    with user_errors():
        config = parse(ShardingConfig, __doc__, flags=True)
        manifest = make_shards(config) if config.task is None else make_share(config)
        if manifest is None:
            print(f"task {config.task} of {config.num_tasks} has written its shards to {config.out}")
        else:
            print(closing_line(config.out, manifest))


if __name__ == "__main__":
    main()
