"""Run a W&B sweep file (grid or random search) without a server: resumable, some trials at a time, with table and plot.

A sweep file is code: the command in it is run as it stands, by whoever wrote it. Read somebody else's before you run it.

python tools/sweep.py configs/sweeps/NAME.yaml [--out DIR] [--processes K] [--num-trials N] [-- ARGUMENTS FOR EVERY TRIAL]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from vaetrain.command_line import parse, user_errors

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class SweepArguments:
    """Which sweep, and how it is run."""

    file: tyro.conf.Positional[Path]
    """Sweep file, as `wandb sweep` takes it."""

    out: Path | None = None
    """Folder for the trials' runs and the results; None: runs/sweeps/NAME."""

    processes: int = 1
    """Trials at a time; each gets its share of the cores, unless OMP_NUM_THREADS says otherwise."""

    num_trials: int | None = None
    """Trials of a random search (None: the file's run_cap), or at most so many of a grid."""

    seed: int = 0
    """Draws the trials of a random search."""

    def __post_init__(self) -> None:
        """Refuse to run nothing."""
        for name in ("processes", "num_trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; give at least 1")


def main(arguments: SweepArguments, extra: list[str]) -> int:
    """Run, print the table, write the results; returns 1 when a trial failed, raises ValueError when none has the metric."""
    from vaetrain.sweeps import results
    from vaetrain.sweeps.runner import run_sweep
    from vaetrain.sweeps.sweep_file import Sweep

    sweep = Sweep.read(arguments.file)
    trials = sweep.trials(arguments.num_trials, arguments.seed)
    asked = arguments.num_trials or sweep.run_cap
    if asked and sweep.method == "random" and len(trials) < asked:
        print(
            f"{sweep.path}: {asked} trials are asked for, its parameters have {len(trials)}; each runs once", flush=True
        )
    out = arguments.out or Path("runs") / "sweeps" / sweep.name
    try:
        runs = run_sweep(sweep, trials, out, processes=arguments.processes, extra=extra, root=ROOT)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on, below {out}")
        return 75
    rows = results.rows_of(sweep, runs)
    results.write(sweep, runs, rows, out)
    print(f"\n{results.table(sweep, rows)}\n")
    failed = sum(run.job.state != "finished" for run in runs)
    end = f"; {failed} of {len(runs)} trials did not finish" if failed else ""
    print(f"results.json and results.png written to {out}{end}")
    results.check_metric(sweep, runs)
    return 1 if failed else 0


if __name__ == "__main__":
    # What stands after -- is for the trials.
    OWN, EXTRA = (sys.argv[1:], [])
    if "--" in OWN:
        OWN, EXTRA = OWN[: OWN.index("--")], OWN[OWN.index("--") + 1 :]
    with user_errors():
        raise SystemExit(main(parse(SweepArguments, __doc__, OWN, flags=True), EXTRA))
