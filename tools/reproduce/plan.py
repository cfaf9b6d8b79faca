"""The lecture as jobs: data, extractors, trainings and evaluations, each after what it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reproduce.datasets import DATASETS, Scale, Sources
from reproduce.lecture import Experiment
from reproduce.takeaways import Takeaway
from vaetrain.sweeps.jobs import Job
from vaetrain.sweeps.runner import TrialRun, trial_runs
from vaetrain.sweeps.sweep_file import Sweep

LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
DATA_OF_SWEEP = {"cats": ("cats64", "afhq128")}
"""Shard sets at small and at full scale of sweeps whose name ends so; all others read MNIST."""


@dataclass
class ReproductionPlan:
    """What is to be run, in order, and what cannot be and why."""

    out: Path
    """Absolute; runs, records and pages lie below it."""
    root: Path
    scale: Scale
    sources: Sources
    launch: Path | None
    """Accelerate's process layout for the lecture's experiments; None: one process each. Sweeps say their own."""
    fid_weights: Path | None
    """Inception's; None: distances are in the features of networks trained on the data at hand."""
    jobs: list[Job] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why an experiment or takeaway cannot be run, by name."""
    _made: dict[str, Job | None] = field(default_factory=dict)

    def add_experiment(self, experiment: Experiment) -> Path | None:
        """Its run directory; None, with the reason in `missing`, when its data cannot be had."""
        try:
            needs = self._data(experiment.data(self.scale))
            self._check_classes(experiment)
        except (FileNotFoundError, ValueError) as error:
            self.missing[experiment.name] = str(error)
            return None
        run = self.out / "runs" / experiment.name
        configs = [argument for file in experiment.configs(self.scale) for argument in ("--config", file)]
        train = self._job(
            f"{experiment.name} training", "vaetrain/train.py", [*configs, "--run-dir", str(run)], needs, launched=True
        )
        num_images = experiment.num_images[0 if self.scale == "full" else 1]
        self._evaluation(
            f"{experiment.name} scores", run, experiment.data(self.scale), train, num_images, experiment.priors,
            ("elbo", "fid", "nearest", "latents"), launched=True,
        )  # fmt: skip
        return run

    def add_takeaway(self, takeaway: Takeaway) -> dict[str, list[TrialRun]] | None:
        """The trials of its sweeps; None, with the reason in `missing`, when its data cannot be had."""
        found: dict[str, list[TrialRun]] = {}
        try:
            needs = {sweep: self._data(self._data_of(sweep)) for sweep in takeaway.sweeps}
        except FileNotFoundError as error:
            self.missing[takeaway.name] = str(error)
            return None
        for sweep_name in takeaway.sweeps:
            sweep = Sweep.read(self.root / takeaway.sweep_file(sweep_name, self.scale))
            trials = trial_runs(sweep, sweep.trials(), self.out / "runs" / sweep_name, root=self.root)
            found[sweep_name] = trials
            for trial in trials:
                trial.job.after = needs[sweep_name]
                trial.job.name = f"{sweep_name} {trial.folder.name}"
                self.jobs.append(trial.job)
                if takeaway.priors:
                    self._evaluation(
                        f"{sweep_name} {trial.folder.name} scores", trial.folder, self._data_of(sweep_name), trial.job, 2000,
                        takeaway.priors, ("fid",),
                    )  # fmt: skip
        return found

    def _data_of(self, sweep: str) -> str:
        for ending, names in DATA_OF_SWEEP.items():
            if sweep.endswith(ending):
                return names[0 if self.scale == "small" else 1]
        return "mnist"

    def _check_classes(self, experiment: Experiment) -> None:
        """Raise ValueError when the shard set, if it is there already, lacks a class of a full-scale experiment."""
        dataset = DATASETS[experiment.data(self.scale)]
        wanted = {"vae_wild": {"wild"}, "vae_all": {"cat", "dog", "wild"}}.get(experiment.name, set())
        is_there = (self.root / dataset.folder / "manifest.json").is_file()
        if is_there and (lacking := wanted - set(dataset.classes(self.root))):
            raise ValueError(
                f"{dataset.folder} has no images of {', '.join(sorted(lacking))}; python tools/fetch_afhq.py afhq fetches all"
            )

    def _data(self, name: str) -> tuple[Job, ...]:
        def make() -> Job | None:
            return DATASETS[name].job(self.sources, self.out / "jobs", self.root)

        job = self._once(f"data {name}", make)
        return () if job is None else (job,)

    def _extractor(self, data: str) -> tuple[Path, tuple[Job, ...]]:
        """The network whose features are compared, and the job that trains it."""
        file = self.out / "extractors" / f"{data}.pt"

        def make() -> Job:
            arguments = [str(DATASETS[data].folder), str(file)]
            return self._job(f"extractor {data}", "tools/train_extractor.py", arguments, self._data(data), add=False)

        job = self._once(f"extractor {data}", make)
        assert job is not None
        return file, (job,)

    def _once(self, name: str, make: Callable[[], Job | None]) -> Job | None:
        if name not in self._made:
            job = self._made[name] = make()
            if job is not None:
                self.jobs.append(job)
        return self._made[name]

    def _evaluation(
        self, name: str, run: Path, data: str, train: Job, num_images: int, priors: Sequence[str], scores: Sequence[str],
        *, launched: bool = False,
    ) -> None:  # fmt: skip
        needs: tuple[Job, ...] = (train,)
        if self.fid_weights is not None:
            network = ["--fid.weights", str(self.fid_weights.absolute())]
        else:
            file, extractor_jobs = self._extractor(data)
            network, needs = ["--fid.extractor", str(file)], (train, *extractor_jobs)
        arguments = [
            "--run", str(run), "--scores", *scores, "--priors", *priors, "--fid.num-images", str(num_images), *network,
            "--fid.cache-dir", str(self.out / "features"),
        ]  # fmt: skip
        if self.scale == "small":
            arguments += ["--fit.num-codes", "10000", "--fit.gmm-components", "10"]
        self._job(name, "vaetrain/evaluate.py", arguments, needs, launched=launched)

    def _job(
        self, name: str, script: str, arguments: Sequence[str], after: tuple[Job, ...], *, launched: bool = False,
        add: bool = True,
    ) -> Job:  # fmt: skip
        start = (*LAUNCH, str(self.launch)) if launched and self.launch is not None else ()
        file = name.replace(" ", "-")
        folder = self.out / "jobs"
        command = (sys.executable, *start, script, *arguments)
        job = Job(name, command, folder / f"{file}.json", folder / f"{file}.log", after)
        if add:
            self.jobs.append(job)
        return job
