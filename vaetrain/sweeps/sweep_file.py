"""A sweep as W&B describes it in YAML: which command, which parameters, which metric. Without importing torch.

The same file goes to `wandb sweep` and to tools/sweep.py. Of W&B's schema this reads grid and random searches; what it does
not know it refuses by name, so that no search is quietly another one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

Trial = dict[str, Any]
"""A value for each parameter."""

KNOWN_KEYS = {
    "program",
    "method",
    "metric",
    "parameters",
    "command",
    "name",
    "description",
    "project",
    "entity",
    "run_cap",
}


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    path: Path
    method: Literal["grid", "random"]
    metric: str
    goal: Literal["minimize", "maximize"]
    parameters: dict[str, dict[str, Any]]
    """By name, in the order of the file: `value`, `values`, or a distribution's numbers."""
    command: tuple[str, ...]
    """With W&B's macros ${env}, ${interpreter}, ${program} and ${args} in it."""
    program: str
    run_cap: int | None
    """Most trials of a random search, which otherwise has no end."""

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a file; raises ValueError that names what is wrong in it."""
        if not path.is_file():
            raise FileNotFoundError(f"sweep file {path} does not exist; configs/sweeps holds some")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds no mapping; see configs/sweeps for its form")
        if unknown := content.keys() - KNOWN_KEYS:
            raise ValueError(
                f"{path}: {', '.join(sorted(unknown))} is not known here; run it with `wandb sweep {path}`"
            )
        if missing := {"program", "method", "metric", "parameters", "command"} - content.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
        method, metric = content["method"], content["metric"]
        if method not in ("grid", "random"):
            raise ValueError(f"{path}: method {method} needs a server; use grid or random, or `wandb sweep {path}`")
        if metric.get("goal") not in ("minimize", "maximize") or not isinstance(metric.get("name"), str):
            raise ValueError(f"{path}: metric needs a name, and a goal that is minimize or maximize")
        for name, parameter in content["parameters"].items():
            draw = drawing(parameter, f"{path}, {name}")
            if method == "grid" and draw is not None:
                raise ValueError(f"{path}, {name}: a grid needs value or values")
        command = tuple(map(str, content["command"]))
        if "${args}" not in command:
            raise ValueError(f"{path}: the command has no ${{args}}, so no parameter would reach it")
        run_cap = content.get("run_cap")
        return cls(
            path,
            method,
            metric["name"],
            metric["goal"],
            dict(content["parameters"]),
            command,
            content["program"],
            run_cap,
        )

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def varied(self) -> list[str]:
        """Parameters that take several values."""
        return [
            name
            for name, parameter in self.parameters.items()
            if len(parameter.get("values", ())) > 1 or "min" in parameter
        ]

    def trials(self, num_trials: int | None = None, seed: int = 0) -> list[Trial]:
        """The trials: all of a grid, the last parameter changing first; of a random search those that `seed` draws.

        A random search's first trials are the same however many are asked for. Raises ValueError for one without a number.
        """
        if self.method == "grid":
            choices = [parameter.get("values", [parameter.get("value")]) for parameter in self.parameters.values()]
            grid = [dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*choices)]
            return grid[:num_trials]
        count = num_trials or self.run_cap
        if count is None:
            raise ValueError(
                f"{self.path} is a random search without an end; give --num-trials N, or run_cap in the file"
            )
        rng = np.random.default_rng(seed)
        return [self._draw(rng) for _ in range(count)]

    def _draw(self, rng: np.random.Generator) -> Trial:
        trial = {}
        for name, parameter in self.parameters.items():
            draw = drawing(parameter, f"{self.path}, {name}")
            if draw is not None:
                trial[name] = draw(rng)
            else:
                values = parameter.get("values", [parameter.get("value")])
                trial[name] = values[int(rng.integers(len(values)))]
        return trial

    def arguments(self, trial: Trial) -> list[str]:
        """A trial as W&B's ${args} has it."""
        return [f"--{name}={value}" for name, value in trial.items()]

    def command_of(self, trial: Trial, interpreter: str) -> list[str]:
        """The command with its macros filled in."""
        filled: list[str] = []
        for word in self.command:
            match word:
                case "${env}":
                    filled.append("/usr/bin/env")
                case "${interpreter}":
                    filled.append(interpreter)
                case "${program}":
                    filled.append(self.program)
                case "${args}":
                    filled += self.arguments(trial)
                case _ if "${" in word:
                    raise ValueError(f"{self.path}: {word} is not known here; run it with `wandb sweep {self.path}`")
                case _:
                    filled.append(word)
        return filled


def drawing(parameter: Mapping[str, Any], where: str) -> Callable[[np.random.Generator], float | int] | None:
    """What draws a number for a parameter; None for one with listed values. Raises ValueError for what is not known."""
    if "value" in parameter or "values" in parameter:
        if extra := parameter.keys() - {"value", "values", "distribution"}:
            raise ValueError(f"{where}: {', '.join(sorted(extra))} does not go with value or values")
        if "values" in parameter and not parameter["values"]:
            raise ValueError(f"{where}: values is empty")
        return None
    both_int = isinstance(parameter.get("min"), int) and isinstance(parameter.get("max"), int)
    distribution = parameter.get("distribution", "int_uniform" if both_int else "uniform")
    if distribution not in ("uniform", "int_uniform", "log_uniform_values", "q_uniform", "q_log_uniform_values"):
        raise ValueError(
            f"{where}: distribution {distribution} is not known here (value, values, uniform, int_uniform, q_uniform, "
            "log_uniform_values and q_log_uniform_values are)"
        )
    if not {"min", "max"} <= parameter.keys():
        raise ValueError(f"{where}: give value, values, or min and max")
    low, high = parameter["min"], parameter["max"]
    if not low < high or (distribution.endswith("log_uniform_values") and low <= 0):
        raise ValueError(f"{where}: min {low} and max {high} are no range for {distribution}")
    step = parameter.get("q", 1)

    def draw(rng: np.random.Generator) -> float | int:
        if distribution == "int_uniform":
            return int(rng.integers(low, high + 1))
        if distribution.endswith("log_uniform_values"):
            number = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            number = rng.uniform(low, high)
        return round(number / step) * step if distribution.startswith("q_") else float(number)

    return draw
