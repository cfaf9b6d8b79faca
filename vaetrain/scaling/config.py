"""What `scale.py` measures, and how long, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vaetrain.config import Config
from vaetrain.scaling.rules import RuleName

PhaseName = Literal["probe", "lr", "noise"]


@dataclass(frozen=True)
class ProbeConfig:
    """Speed and memory of micro-batch sizes, on dummy images, without communication."""

    largest: int = 1024
    """No micro-batch above this is tried."""

    num_steps: int = 5
    """Steps timed at each size, after two that are not; their median counts."""

    cpu_memory_gib: float = 4.0
    """On a CPU, which has no limit that one survives: memory of the process above which no larger size is tried."""

    safe_fraction: float = 0.9
    """Of a GPU's memory (or of `cpu_memory_gib`): a size is safe up to here, since fragments and other users need some."""

    precisions: tuple[Literal["fp32", "bf16"], ...] = ()
    """Arithmetics to compare. None given: the config's own."""

    compile: tuple[bool, ...] = ()
    """True False to compare compiled with uncompiled. None given: the config's own."""

    def __post_init__(self) -> None:
        """Refuse to measure nothing."""
        if self.largest < 1 or self.num_steps < 1:
            raise ValueError("--probe.largest and --probe.num-steps must be at least 1")
        if not 0 < self.safe_fraction <= 1:
            raise ValueError(f"--probe.safe-fraction is {self.safe_fraction}; give a number in (0, 1]")
        if self.cpu_memory_gib <= 0:
            raise ValueError(f"--probe.cpu-memory-gib is {self.cpu_memory_gib}; give a number above 0")


@dataclass(frozen=True)
class LrRangeConfig:
    """The learning-rate range test (Smith 2017): a rising rate, the real objective, optimizer and data."""

    lowest: float = 1e-5
    """Learning rate of the first step."""

    highest: float = 1.0
    """Of the last step, which few trainings live to see."""

    num_steps: int = 150
    """Steps, each with a rate a constant factor above the one before: this is also the warm-up."""

    num_seeds: int = 3
    """Repetitions with other initial weights, data order and noise."""

    trial_steps: int = 400
    """Steps of the short trainings that decide between the rates which the test leaves open; 0: none, the test alone suggests."""

    def __post_init__(self) -> None:
        """Refuse ranges that are none."""
        if not 0 < self.lowest < self.highest:
            raise ValueError(f"--lr-range.lowest {self.lowest} and --lr-range.highest {self.highest} are no range")
        if self.num_steps < 20 or self.num_seeds < 1:
            raise ValueError("--lr-range.num-steps must be at least 20 and --lr-range.num-seeds at least 1")
        if self.trial_steps != 0 and self.trial_steps < 20:
            raise ValueError(f"--lr-range.trial-steps is {self.trial_steps}; give at least 20, or 0 for no trials")


@dataclass(frozen=True)
class NoiseConfig:
    """The gradient noise scale, measured while training with the suggested learning rate."""

    num_steps: int = 600
    """Steps of training. The scale grows as training goes on; `train.py --log.noise-scale True` follows it to the end."""

    skip_steps: int = 300
    """First steps left out of the estimate: at random weights all images pull the same way and the scale is small."""

    parts: int = 4
    """On one process: micro-batches that a step is cut into, the first of which is the small batch."""

    def __post_init__(self) -> None:
        """Refuse to average over nothing."""
        if not 0 <= self.skip_steps < self.num_steps - 1:
            raise ValueError(
                f"--noise.skip-steps {self.skip_steps} leaves fewer than two steps of --noise.num-steps {self.num_steps}"
            )
        if self.parts < 2:
            raise ValueError(f"--noise.parts is {self.parts}; it takes at least 2")


@dataclass(frozen=True)
class AdviceConfig:
    """What joins the processes, and how the optimizer follows the batch."""

    rule: RuleName = "sqrt"
    """How the optimizer follows the batch: sqrt for AdamW, which vaetrain trains with; linear for SGD; none."""

    gb_per_s: float | None = None
    """Bandwidth of each process, GB/s. None: measured when scale.py runs on several processes, else 10, said to be assumed."""

    latency_us: float | None = None
    """Latency of one message between processes, µs. None: as for the bandwidth; 50 assumed."""

    def __post_init__(self) -> None:
        """Refuse networks that are none."""
        if self.gb_per_s is not None and self.gb_per_s <= 0:
            raise ValueError(f"--advice.gb-per-s is {self.gb_per_s}; give a number above 0")
        if self.latency_us is not None and self.latency_us < 0:
            raise ValueError(f"--advice.latency-us is {self.latency_us}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(Config):
    """A training configuration, and what to find out about it."""

    out: Path
    """Folder for scaling.json, scaling.png and recommended.yaml."""

    phases: tuple[PhaseName, ...] = ("probe", "lr", "noise")
    """probe: micro-batches. lr: learning-rate range test. noise: gradient noise scale. Advice uses what was measured: without
    lr it takes the config's own learning rate, without noise it knows no bound on the batch. It always needs the probe."""

    for_num_processes: tuple[int, ...] = (1, 2, 4, 8, 64)
    """Numbers of processes to advise on."""

    probe: ProbeConfig = field(default_factory=ProbeConfig)
    lr_range: LrRangeConfig = field(default_factory=LrRangeConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    advice: AdviceConfig = field(default_factory=AdviceConfig)

    def __post_init__(self) -> None:
        """Advice stands on the probe; refuse numbers of processes that are none."""
        super().__post_init__()
        if not self.for_num_processes or min(self.for_num_processes) < 1:
            raise ValueError("--for-num-processes needs numbers of at least 1")
        if "probe" not in self.phases:
            raise ValueError("--phases must name probe: all advice stands on it")

    def check_out(self) -> None:
        """Refuse, with FileExistsError, a folder that holds a result, and a file in its place."""
        if (self.out / "scaling.json").exists():
            raise FileExistsError(f"{self.out} already holds a scaling.json; name another folder with --out")
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"{self.out} is a file; name a folder with --out")

    def counts_within(self, num_images: int) -> list[int]:
        """The numbers of processes for which a training split of so many images has one each; ValueError if there is none."""
        counts = [count for count in self.for_num_processes if count <= num_images]
        if not counts:
            raise ValueError(
                f"--for-num-processes {' '.join(map(str, self.for_num_processes))}: the training split has {num_images} "
                "images, fewer than one for each process; give smaller numbers"
            )
        return counts

    def check_noise_parts(self, num_processes: int) -> None:
        """Refuse, with ValueError, a global batch that one process cannot cut into `--noise.parts`; several need not cut it."""
        batch, parts = self.train.global_batch_size, self.noise.parts
        if num_processes == 1 and batch % parts:
            raise ValueError(
                f"--noise.parts {parts} does not divide --train.global-batch-size {batch}; give a number that does"
            )
