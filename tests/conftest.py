"""What several test files need: shard sets small enough to be made anew, a tiny training, a misbehaving server."""

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

# Before torch starts its threads: they spin while they wait, and tests that run side by side with something else, such as
# their own two processes, take many times longer with two threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every full collection looks at all that was imported, for a tenth of a second: none while it is, and none of it afterwards.
gc.disable()

import type_checks  # noqa: E402

type_checks.install()

from launching import TINY, WARM_PYTHON, can_wait_for_forks, start_warm_python  # noqa: E402
from rude_server import Server  # noqa: E402
from vaetrain.data.format.shard_set import ShardSet  # noqa: E402
from vaetrain.data.sharding.make_shards import make_shards  # noqa: E402
from vaetrain.data.sharding.plan import ShardingConfig  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):  # make floor does without it
    from hypothesis import settings

    # It would fail an example that takes more than 200 ms, as any does now and then on a machine that others use.
    settings.register_profile("no stopwatch", deadline=None)
    settings.load_profile("no stopwatch")

SEVERAL_PROCESSES = (
    "test_resume", "test_scale", "test_parity", "test_preemption", "test_launch", "test_exit", "test_rerun", "test_watchdog",
    "test_damaged_data", "test_time_limit", "test_likelihood_scores", "test_distributed",
)  # fmt: skip
"""Files whose tests start several processes that wait for each other: `make test` runs them one after the other, for two such
tests at a time on two cores take more than twice as long."""

SLOWEST_FIRST = (
    "test_fuzz_tool", "test_train", "test_scoring", "test_fake_cuda", "test_adversarial", "test_report_in_a_browser",
    "test_generation", "test_train_prior", "test_divergence", "test_latents", "test_demo", "test_report",
    "test_autoencoder_kl", "test_priors", "test_make_shards", "test_sweep_runner", "test_gpu_check", "test_reproduce",
    "test_jobs", "test_remote", "test_use", "test_workers",
)  # fmt: skip
"""Of the other files those that take longest, so that `make test`, which hands out whole files in order, does not end waiting
for one of them."""


def pytest_configure(config: pytest.Config) -> None:
    """One Python that has imported everything for all processes of the tests."""
    if getattr(config.option, "numprocesses", None) and can_wait_for_forks():
        os.environ[WARM_PYTHON] = str(start_warm_python())


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate((*SEVERAL_PROCESSES, *SLOWEST_FIRST))}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with SEVERAL_PROCESSES as if they were one file."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "several processes" if Path(file).stem in SEVERAL_PROCESSES else file

    return ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """End the whole run: xdist would wait for ever for the tests that were left to the process (3.8, --dist loadfile)."""
    pytest.exit(f"{crashitem} ended its process, or hung; see above", returncode=1)


def _make(folder: Path, num_images: int, channels: int, **options: Any) -> Path:
    """Shards of noise, so that no two images are alike, in two classes, the first with twice the images of the second."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (16, 16, 3) if channels == 3 else (16, 16), dtype=np.uint8)
        file = folder / "originals" / ("cat" if number % 3 else "dog") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    out = folder / "shards"
    make_shards(ShardingConfig(str(folder / "originals"), out, size=16, images_per_shard=12, workers=1, **options))
    return out


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16×16 colour JPEGs in the classes cat and dog: 100 for training in 9 shards, 23 for validation in 2. Do not write."""
    return _make(tmp_path_factory.mktemp("tiny"), 123, channels=3, val_count=23)


@pytest.fixture(scope="session")
def tiny_gray_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grayscale PNGs of 16×16 in 4 shards, for training only. Do not write."""
    return _make(tmp_path_factory.mktemp("tiny_gray"), 40, channels=1, gray=True, format="png")


@pytest.fixture
def damaged_shards(tiny_shards, tmp_path):
    """Copy tiny_shards with one training image overwritten with zeros, which no comparison of sizes finds.

    Takes the image's position in the split; returns the copy's folder and the name of the damaged shard.
    """

    def damage(position: int) -> tuple[Path, str]:
        folder = shutil.copytree(tiny_shards, tmp_path / "damaged")
        shard_set = ShardSet.open(folder)
        index = shard_set.index("train")
        shard = shard_set.manifest.splits["train"].shards[int(index.shard[position])]
        with shard_set.path(shard).open("r+b") as file:
            file.seek(int(index.offset[position]))
            file.write(bytes(int(index.num_bytes[position])))
        return folder, shard.name

    return damage


@pytest.fixture(scope="session")
def accelerator():
    """This process alone, in fp32."""
    import torch._dynamo  # which the first optimizer would import  # noqa: F401

    from vaetrain.distributed import processes

    return processes.start()


@pytest.fixture(scope="session")
def tiny_run(tiny_shards, accelerator, tmp_path_factory):
    """The run directory of the tiny model after one epoch. Do not write; copy."""
    from vaetrain.command_line import parse
    from vaetrain.config import Config
    from vaetrain.train import train

    run_dir = tmp_path_factory.mktemp("tiny_run") / "run"
    own = ["--data.train", tiny_shards, "--train.epochs", 1, "--run-dir", run_dir]
    train(parse(Config, None, [str(argument) for argument in (*TINY, *own)]), accelerator)
    accelerator.free_memory()
    return run_dir


@pytest.fixture
def copy_of_tiny_run(tiny_run, tmp_path):
    """Make a run of one's own that is as train_tiny(run_dir=…, epochs=1) would leave it, without the training."""
    return lambda run_dir="run": shutil.copytree(tiny_run, tmp_path / run_dir)


@pytest.fixture
def train_tiny(tiny_shards, accelerator, tmp_path):
    """Train the tiny model in this process; arguments are further command-line arguments.

    The figures of a run are drawn where a test asks for them: they take longer than the training.
    """
    from vaetrain.command_line import parse
    from vaetrain.config import Config
    from vaetrain.train import train
    from vaetrain.training.figures import RunFigures

    def run_training(*arguments: object, run_dir: str = "run", epochs: int = 2, figures: bool = False) -> Path:
        own = ["--data.train", tiny_shards, "--train.epochs", epochs, "--run-dir", tmp_path / run_dir]
        config = parse(Config, None, [str(argument) for argument in (*TINY, *own, *arguments)])
        with contextlib.nullcontext() if figures else patch.object(RunFigures, "draw"):
            train(config, accelerator)
        accelerator.free_memory()
        return config.run_dir

    return run_training


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local HTTP server that misbehaves as told, reached without a proxy."""
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()
