"""Make a shard set from a folder, zip or tar of images, from MNIST's files, or from the built-in faces.

python tools/make_shards.py photos datasets/photos128 --size 128 --val-count 500
"""

from vaetrain.command_line import parse, user_errors
from vaetrain.data.shard_plan import ShardingConfig
from vaetrain.data.sharding import closing_line, make_shards


def main() -> None:
    """Make the shards and say what they hold; exit 1 with a message when that is not possible."""
    with user_errors():
        config = parse(ShardingConfig, __doc__, flags=True)
        print(closing_line(config.out, make_shards(config)))


if __name__ == "__main__":
    main()
