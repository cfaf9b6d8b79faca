"""A sweep as W&B describes it in YAML: which command, which parameters, which metric. Without importing torch.

The same file goes to `wandb sweep` and to tools/sweep.py. It is code: its command is run as it stands. Of W&B's schema this reads
grid and random searches; what it does not know it refuses by name, so that no search is quietly another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vaetrain.documents import read_yaml
from vaetrain.sweeps.parameter import drawing, is_listed, listed

Trial = dict[str, Any]
"""A value for each parameter."""

NUM_REDRAWS = 30
"""For each distinct trial of a random search, before there are taken to be no more."""

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
    """Most trials; a random search otherwise has no end."""

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """Read a file; raises ValueError that names what is wrong in it."""
        if not path.is_file():
            raise FileNotFoundError(f"sweep file {path} does not exist; configs/sweeps holds some")
        content = read_yaml(path, remedy="see configs/sweeps for its form")
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds no mapping; see configs/sweeps for its form")
        if unknown := content.keys() - KNOWN_KEYS:
            raise ValueError(
                f"{path}: {', '.join(sorted(map(str, unknown)))} is not known here; run it with `wandb sweep {path}`"
            )
        if missing := {"program", "method", "metric", "parameters", "command"} - content.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
        method, metric = content["method"], content["metric"]
        if method not in ("grid", "random"):
            raise ValueError(f"{path}: method {method} needs a server; use grid or random, or `wandb sweep {path}`")
        if not isinstance(metric, Mapping) or metric.keys() != {"name", "goal"}:
            raise ValueError(f"{path}: metric is {metric!r}; write {{name: val/elbo_nats, goal: maximize}}")
        if metric["goal"] not in ("minimize", "maximize") or not isinstance(metric["name"], str):
            raise ValueError(f"{path}: metric needs a name, and a goal that is minimize or maximize, not {metric!r}")
        parameters, command, run_cap = content["parameters"], content["command"], content.get("run_cap")
        if not isinstance(parameters, Mapping) or not parameters:
            raise ValueError(
                f"{path}: parameters is {parameters!r}; write a mapping of names, such as optim.lr: {{values: […]}}"
            )
        for name, parameter in parameters.items():
            drawing(parameter, f"{path}, {name}")
            if method == "grid" and not is_listed(parameter):
                raise ValueError(f"{path}, {name}: a grid needs value or values")
        if not isinstance(content["program"], str) or not isinstance(command, list):
            raise ValueError(f"{path}: program is a path and command a list of words; see configs/sweeps")
        if "${args}" not in command:
            raise ValueError(f"{path}: the command has no ${{args}}, so no parameter would reach it")
        if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
            raise ValueError(f"{path}: run_cap is {run_cap!r}; give a whole number of trials, at least 1")
        return cls(
            path, method, metric["name"], metric["goal"], dict(parameters), tuple(map(str, command)), content["program"],
            run_cap,
        )  # fmt: skip

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
            if not is_listed(parameter) or len(listed(parameter)) > 1
        ]

    def trials(self, num_trials: int | None = None, seed: int = 0) -> list[Trial]:
        """The distinct trials: all of a grid, the last parameter changing first; of a random search those that `seed` draws.

        At most `num_trials`, or else the file's run_cap; fewer where the parameters have no more distinct values. A random search's
        first trials are the same however many are asked for. Raises ValueError for one without a number.
        """
        count = num_trials or self.run_cap
        if self.method == "random" and count is None:
            raise ValueError(
                f"{self.path} is a random search without an end; give --num-trials N, or run_cap in the file"
            )
        found: dict[tuple[str, ...], Trial] = {}
        repeats = 0
        for trial in self._grid() if self.method == "grid" else self._draws(seed):
            repeats = repeats + 1 if tuple(self.arguments(trial)) in found else 0
            found.setdefault(tuple(self.arguments(trial)), trial)
            # The last of n equally likely trials stays hidden for so many draws with a probability of exp(-NUM_REDRAWS).
            if len(found) == count or (self.method == "random" and repeats > NUM_REDRAWS * (len(found) + 1)):
                break
        return list(found.values())

    def _grid(self) -> Iterator[Trial]:
        for values in itertools.product(*map(listed, self.parameters.values())):
            yield dict(zip(self.parameters, values, strict=True))

    def _draws(self, seed: int) -> Iterator[Trial]:
        rng = np.random.default_rng(seed)
        draws = {name: drawing(parameter, f"{self.path}, {name}") for name, parameter in self.parameters.items()}
        while True:
            yield {name: draw(rng) for name, draw in draws.items()}

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
