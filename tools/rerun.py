"""Train a recorded run once more, from its config, data, code and packages, and compare every record with the original's.

python tools/rerun.py RUN [--out DIR]      exit code 0: same losses, bit for bit; 1: not
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from vaetrain.command_line import parse, printable, user_errors


@dataclass(frozen=True)
class RerunArguments:
    """Which run, and what may differ."""

    run: tyro.conf.Positional[Path]
    """Run directory to repeat."""

    out: Path | None = None
    """Run directory of the repetition; None: RUN-rerun."""

    allow_differences: bool = False
    """Train also when code, packages or machine are not those of the run. Other data are always refused."""


if __name__ == "__main__":
    ARGUMENTS = parse(RerunArguments, __doc__, flags=True)

from vaetrain.preflight import check_split
from vaetrain.runs import rerun
from vaetrain.runs.directory import RunDirectory


def main(arguments: RerunArguments) -> int:
    """Check, train, compare; returns the exit code."""
    run = RunDirectory.open(arguments.run)
    out = arguments.out or arguments.run.with_name(f"{arguments.run.name}-rerun")
    if (out / "config.yaml").exists():
        raise FileExistsError(f"{out} already holds a run; name another folder with --out")
    config = run.config()
    check_split(config.data, "train", config.model)  # before `check_data`, which imports torch
    check_split(config.data, "val", config.model)
    recorded = rerun.recorded_start(run)
    rerun.check_data(run)
    for caveat in rerun.caveats(run):
        print(f"note: {printable(caveat)}")
    if differences := list(rerun.differences(run)):
        listing = "".join(f"\n  {difference}" for difference in differences)
        if not arguments.allow_differences:
            raise ValueError(
                f"here and now is not what made {run.path}:{listing}\nMend that, or train all the same with "
                "--allow-differences"
            )
        print(printable(f"note: here and now is not what made {run.path}:{listing}"))
    code = rerun.start(rerun.config_of_rerun(run, out), recorded)
    if code != 0:
        raise ValueError(f"training ended with exit code {code}; its message is above")
    found = rerun.agreement(run, RunDirectory(out))
    print(f"{'same losses' if found.is_whole else 'NOT the same losses'}: {found.describe()}; rerun written to {out}")
    return 0 if found.is_whole else 1


if __name__ == "__main__":
    with user_errors():
        raise SystemExit(main(ARGUMENTS))
