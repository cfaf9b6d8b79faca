"""Reproduce the lecture: its experiments, or its takeaways as designed experiments, and one HTML page of what came out.

python tools/reproduce.py lecture|takeaways [--only NAME ...] [--scale small|full] [--mnist PATH] [--afhq PATH]
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vaetrain.command_line import parse, user_errors

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class ReproduceArguments:
    """What to reproduce, how large, from which originals."""

    what: tyro.conf.Positional[Literal["lecture", "takeaways"]]
    """lecture: the experiments behind Figs. 1-18. takeaways: its claims, each tested."""

    only: tuple[str, ...] = ()
    """Names of experiments (vae_cats …) or takeaways (kl_weight …); none given: all."""

    scale: Literal["small", "full"] = "small"
    """small: MNIST and 64×64 images, for two CPU cores. full: the lecture's sizes and epochs, for a GPU node."""

    out: Path | None = None
    """Folder for runs and page; None: runs/reproduce-SCALE."""

    mnist: Path | None = None
    """Folder with MNIST's four files, if datasets/mnist does not exist yet."""

    afhq: Path | None = None
    """Animal Faces (folder, zip or tar with a folder per class), if its shard sets below datasets/ do not exist yet."""

    afhq_val_count: int | None = None
    """Images of it to hold out, where it has no val split of its own."""

    processes: int | None = None
    """Jobs at a time; None: one a core, at most 2, at the small scale, and 1 at the full one."""

    launch: Path | None = None
    """Process layout of the lecture's trainings (launch/node8.yaml for eight GPUs); None: one process each."""

    fid_weights: Path | None = None
    """Inception weights for FID; without them distances are in the features of small networks trained on the data."""

    page_only: bool = False
    """Run nothing; write the page from what there is."""


if __name__ == "__main__":
    ARGUMENTS = parse(ReproduceArguments, __doc__, flags=True)

from reproduce.datasets import Sources
from reproduce.lecture import EXPERIMENTS
from reproduce.pages import ReproductionResult, findings, write_lecture, write_takeaways
from reproduce.plan import ReproductionPlan
from reproduce.takeaways import TAKEAWAYS
from vaetrain.machine import num_cores
from vaetrain.sweeps.jobs import run_jobs


def main(arguments: ReproduceArguments) -> int:
    """Plan, run, write the page; 1 when something failed or could not be run, 75 when stopped."""
    names = [each.name for each in (EXPERIMENTS if arguments.what == "lecture" else TAKEAWAYS)]
    if unknown := set(arguments.only) - set(names):
        raise ValueError(f"--only {' '.join(sorted(unknown))}: {arguments.what} has {', '.join(names)}")
    out = (ROOT / (arguments.out or Path("runs") / f"reproduce-{arguments.scale}")).absolute()
    plan = ReproductionPlan(
        out, ROOT, arguments.scale, Sources(arguments.mnist, arguments.afhq, arguments.afhq_val_count), arguments.launch,
        arguments.fid_weights,
    )  # fmt: skip
    wanted = set(arguments.only) or set(names)
    experiments = takeaways = []
    if arguments.what == "lecture":
        experiments = [(each, plan.add_experiment(each)) for each in EXPERIMENTS if each.name in wanted]
    else:
        takeaways = [(each, plan.add_takeaway(each)) for each in TAKEAWAYS if each.name in wanted]
    for name, reason in plan.missing.items():
        print(f"note: {name} cannot be run: {reason}")
    processes = arguments.processes or (min(2, num_cores()) if arguments.scale == "small" else 1)
    if arguments.page_only:
        for job in plan.jobs:
            job.read_record()
    else:
        print(f"{len(plan.jobs)} jobs, {processes} at a time, below {out}", flush=True)
        try:
            run_jobs(plan.jobs, processes=processes, root=ROOT)
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on, below {out}")
            return 75
    out.mkdir(parents=True, exist_ok=True)
    failed = {job.name: job.reason for job in plan.jobs if job.state == "failed"}
    command = shlex.join(["python", "tools/reproduce.py", *sys.argv[1:]])
    outcome = ReproductionResult(out, arguments.scale, command, plan.missing, failed, arguments.fid_weights is not None)
    if arguments.what == "lecture":
        write_lecture(experiments, outcome)
    else:
        judged = []
        for takeaway, trials in takeaways:
            try:
                judgement = plan.missing[takeaway.name] if trials is None else takeaway.judge(findings(trials))
            except ValueError as error:
                judgement = str(error)
            judged.append((takeaway, trials, judgement))
        write_takeaways(judged, outcome)
    seconds = sum(job.seconds or 0.0 for job in plan.jobs)
    print(f"{len(plan.jobs)} jobs took {seconds / 60:.1f} minutes of {processes} at a time; {len(failed)} failed")
    print(f"page written to {out / f'{arguments.what}.html'}")
    return 1 if failed or plan.missing else 0


if __name__ == "__main__":
    with user_errors():
        raise SystemExit(main(ARGUMENTS))
