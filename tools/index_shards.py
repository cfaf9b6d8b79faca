"""Index WebDataset tars where they lie, in a folder or behind URLs, so that training reads them without a copy.

python tools/index_shards.py /data/imagenet-wds datasets/imagenet
python tools/index_shards.py 'https://HOST/cc3m-train-{0000..0575}.tar' datasets/cc3m --val-count 5000
"""

import sys

from vaetrain.command_line import parse, user_errors
from vaetrain.data.sharding.index_shards import IndexConfig, closing_line, index_shards


def main() -> None:
    """Write manifest and index and say what they hold; exit 1 with a message when that is not possible."""
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a path need not be Unicode
    with user_errors():
        config = parse(IndexConfig, __doc__, flags=True)
        print(closing_line(config, index_shards(config)))


if __name__ == "__main__":
    main()
