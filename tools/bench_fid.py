"""Measure FID on this machine: features against torch-fidelity's own loop and on two processes, the cache of real images'
features, and the matrix square root. The network has random weights: times are the real one's, scores would mean nothing.

OMP_NUM_THREADS=1 python tools/bench_fid.py [--json FILE]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaetrain.command_line import parse


@dataclass(frozen=True)
class BenchConfig:
    """Images of noise; medians over rounds in which all variants take turns."""

    json: Path | None = None
    """Also write the medians and ratios to this file."""

    num_images: int = 128
    """Images that every variant extracts in each round."""

    image_size: int = 128
    """Height and width of the images, in pixels."""

    batch_size: int = 32
    """Images per forward pass, of every variant."""

    rounds: int = 3
    """Rounds; every variant runs once in each."""

    join: Path | None = None
    """The command's own: extract in this folder as one of several processes and print the seconds."""


if __name__ == "__main__":
    CONFIG = parse(BenchConfig, __doc__, flags=True)  # before the imports below, which take seconds

import contextlib
import copy
import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch_fidelity.datasets import ImagesPathDataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.utils import get_featuresdict_from_dataset

from vaetrain.data.config import DataConfig
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.distributed import processes
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.extractor import FeatureExtractor
from vaetrain.metrics.fidelity import FeatureGaussian, FeatureStatistics, frechet_distance
from vaetrain.metrics.reference import RealFeatures

ROOT = Path(__file__).resolve().parents[1]
NUM_FEATURES = 2048
NUM_DRAWN = 4096
"""Random features behind the matrices whose root is taken; more than features, as a FID to publish has it."""


def prepare(config: BenchConfig, folder: Path) -> None:
    """FOLDER/originals (PNG), FOLDER/shards of them and FOLDER/inception.pth."""
    rng = np.random.default_rng(0)
    originals = folder / "originals" / "noise"
    originals.mkdir(parents=True)
    for number in range(config.num_images + 1):
        pixels = rng.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(originals / f"{number:05d}.png")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_shards(
            ShardingConfig(
                str(folder / "originals"),
                folder / "shards",
                size=config.image_size,
                val_count=1,
                workers=1,
                format="png",
            )
        )
    helper = ROOT / "tests" / "inception_weights.py"
    subprocess.run([sys.executable, helper, folder / "inception.pth"], check=True, stdout=subprocess.DEVNULL)


class Extraction:
    """Features of the shards' images through the package, with and without a cache."""

    def __init__(self, config: BenchConfig, folder: Path, accelerator: Accelerator) -> None:
        self.cache = folder / "cache"
        fid = FidConfig(weights=folder / "inception.pth", batch_size=config.batch_size, cache_dir=self.cache)
        self.real = RealFeatures(DataConfig(str(folder / "shards")), "train", fid)
        self.extractor = FeatureExtractor(fid, accelerator.device)
        self.accelerator = accelerator
        self.extractor(torch.zeros(2, 3, config.image_size, config.image_size, dtype=torch.uint8))

    def seconds(self) -> float:
        """Of one pass over the split, or of reading its result from the cache."""
        self.accelerator.wait_for_everyone()
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.real.features(np.arange(self.real.num_images), self.extractor, self.accelerator)
        self.accelerator.wait_for_everyone()
        return time.perf_counter() - start

    def seconds_without_cache(self) -> float:
        """Of one pass over the split."""
        shutil.rmtree(self.cache, ignore_errors=True)
        return self.seconds()


def torch_fidelitys_loop(config: BenchConfig, folder: Path, extractor: FeatureExtractor) -> Callable[[], float]:
    """torch-fidelity's own loop over the same pixels and weights, laid out as it does."""
    network = copy.deepcopy(extractor.network).to(memory_format=torch.contiguous_format)
    files = sorted((folder / "originals" / "noise").iterdir())[: config.num_images]
    on_gpu = extractor.device.type == "cuda"

    def seconds() -> float:
        start = time.perf_counter()
        get_featuresdict_from_dataset(
            ImagesPathDataset([str(file) for file in files]), network, config.batch_size, on_gpu, False, False
        )
        return time.perf_counter() - start

    return seconds


def two_processes(config: BenchConfig, folder: Path) -> Callable[[], float]:
    """The package's extraction in two processes of this machine; starting them is not counted."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml"), __file__,
        "--join", str(folder), "--batch-size", str(config.batch_size), "--image-size", str(config.image_size),
    ]  # fmt: skip

    def seconds() -> float:
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(result.stdout.split()[-1])

    return seconds


def matrix_roots() -> dict[str, float]:
    """Seconds of one distance between Gaussians of 2,048 features, and how far the two ways to it differ."""
    scale = torch.arange(1, NUM_FEATURES + 1) ** -0.3
    both = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        side = FeatureStatistics.empty(NUM_FEATURES)
        side.update(torch.randn(NUM_DRAWN, NUM_FEATURES, generator=generator) * scale + 0.4)
        both.append(side)
    inputs = [{"mu": side.mean().numpy(), "sigma": side.covariance().numpy()} for side in both]
    start = time.perf_counter()
    theirs = fid_statistics_to_metric(*inputs, verbose=False)[KEY_METRIC_FID]
    middle = time.perf_counter()
    ours = frechet_distance(*map(FeatureGaussian.of_statistics, both))
    end = time.perf_counter()
    return {
        "torch_fidelity_s": middle - start,
        "symmetric_eigenvalues_s": end - middle,
        "relative_difference": abs(ours / theirs - 1),
    }


def main(config: BenchConfig) -> None:
    """Measure, print a table and write the JSON."""
    accelerator = processes.start()
    if config.join is not None:
        seconds = Extraction(config, config.join, accelerator).seconds_without_cache()
        if accelerator.is_main_process:
            print(seconds)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(config, folder)
        ours = Extraction(config, folder, accelerator)
        variants = {
            "vaetrain": ours.seconds_without_cache,
            "vaetrain_cached": ours.seconds,
            "torch_fidelity": torch_fidelitys_loop(config, folder, ours.extractor),
        }
        if accelerator.device.type == "cpu":
            variants["vaetrain_2_processes"] = two_processes(config, folder)
        seconds_of: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(config.rounds):
            for variant, measure in variants.items():
                seconds_of[variant].append(measure())
    medians = {variant: statistics.median(values) for variant, values in seconds_of.items()}
    ratios = {
        "vaetrain_vs_torch_fidelity": medians["torch_fidelity"] / medians["vaetrain"],
        "cached_pass_vs_pass": medians["vaetrain_cached"] / medians["vaetrain"],
    }
    if "vaetrain_2_processes" in medians:
        ratios["two_processes_vs_one"] = medians["vaetrain"] / medians["vaetrain_2_processes"]
    roots = matrix_roots()
    machine = f"{processes.device_name(accelerator.device)}, {platform.machine()}, torch {torch.__version__}"
    print(
        f"{machine}; {config.num_images} images of {config.image_size}×{config.image_size}, batch {config.batch_size}"
    )
    for variant, value in medians.items():
        print(f"{variant:28s} {config.num_images / value:10.1f} images/s {value:8.2f} s")
    for ratio, value in ratios.items():
        print(f"{ratio:28s} {value:10.3f}")
    for root, value in roots.items():
        print(f"{root:28s} {value:10.3g}")
    if config.json is not None:
        content = {"machine": machine, "seconds": medians, "ratios": ratios, "matrix_root": roots}
        config.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"written to {config.json}")


if __name__ == "__main__":
    main(CONFIG)
