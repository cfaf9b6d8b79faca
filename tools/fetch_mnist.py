"""Download MNIST's four files and check them.

python tools/fetch_mnist.py mnist
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from vaetrain.command_line import parse, user_errors
from vaetrain.data.remote.download import PERSISTENCE, download
from vaetrain.data.remote.remote_file import Persistence

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

# SHA-256 of the files as yann.lecun.com first gave them out; torchvision and TensorFlow Datasets pin the same ones.
FILES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class FetchMnistConfig:
    """Download MNIST."""

    out: Positional[Path]
    """Folder for the four files; those that are there already are checked and kept."""


def fetch(
    out: Path,
    mirrors: Sequence[str] = MIRRORS,
    files: Mapping[str, str] = FILES,
    persistence: Persistence = PERSISTENCE,
) -> str:
    """Put the files into `out`; returns the closing line."""
    for name, sha256 in files.items():
        download(
            [mirror + name for mirror in mirrors],
            out / name,
            sha256=sha256,
            max_bytes=MAX_BYTES,
            persistence=persistence,
        )
    return (
        f"MNIST's 70,000 digits are in {out}; next: python tools/make_shards.py {out} datasets/mnist --size 28 --gray"
    )


def main() -> None:
    """Fetch and say what to run next; exit 1 with a message when that is not possible."""
    config = parse(FetchMnistConfig, __doc__, flags=True)
    with user_errors():
        print(fetch(config.out))


if __name__ == "__main__":
    main()
