"""The lecture from one command: what is planned, run, shown, and said when something is missing."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from html_document import Document
from launching import ROOT, run, warm_python
from reproduce.datasets import Sources
from reproduce.lecture import EXPERIMENTS
from reproduce.pages import ReproductionResult, findings, write_lecture, write_takeaways
from reproduce.plan import ReproductionPlan
from reproduce.takeaways import TAKEAWAYS
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards
from vaetrain.sweeps.jobs import Job, run_jobs
from vaetrain.sweeps.runner import TrialRun

NOTHING = Sources(None, None, None)
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


@pytest.fixture
def root(tmp_path):
    """A checkout whose datasets are the test's."""
    for name in ("vaetrain", "tools", "configs", "launch"):
        (tmp_path / "root").mkdir(exist_ok=True)
        (tmp_path / "root" / name).symlink_to(ROOT / name)
    return tmp_path / "root"


def make_mnist(root):
    """Two kinds of 28×28 strokes under the name of MNIST."""
    rng = np.random.default_rng(0)
    for number in range(260):
        pixels = np.zeros((28, 28), dtype=np.uint8)
        at = int(rng.integers(4, 22))
        pixels[(slice(None), slice(at, at + 3)) if number % 2 else (slice(at, at + 3), slice(None))] = 255
        file = root / "originals" / str(number % 2) / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    options = {"size": 28, "gray": True, "val_count": 60, "workers": 1}
    make_shards(ShardingConfig(str(root / "originals"), root / "datasets" / "mnist", **options))


def plan_of(root, tmp_path, **changes):
    return ReproductionPlan(
        **{
            "out": tmp_path / "out",
            "root": root,
            "scale": "small",
            "sources": NOTHING,
            "launch": None,
            "fid_weights": None,
            **changes,
        }
    )


def outcome_of(plan, **changes):
    failed = {job.name: job.reason for job in plan.jobs if job.state == "failed"}
    facts = {
        "out": plan.out,
        "scale": "small",
        "command": "python <it>",
        "missing": plan.missing,
        "failed": failed,
        "has_inception": False,
    }
    return ReproductionResult(**{**facts, **changes})


def test_an_experiment_is_trained_scored_and_shown_and_only_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python())
    make_mnist(root)
    experiment = replace(BY_NAME["ae_dense_mnist"], num_images=(60, 60))
    cats = BY_NAME["vae_cats"]
    plan = plan_of(root, tmp_path)
    experiments = [(each, plan.add_experiment(each)) for each in (experiment, cats)]
    assert [job.name for job in plan.jobs] == ["ae_dense_mnist training", "extractor mnist", "ae_dense_mnist scores"]
    extractor = plan.jobs[1]
    extractor.command = (*extractor.command, "--num-images", "256")
    run_jobs(plan.jobs, processes=2, root=root)
    assert [job.state for job in plan.jobs] == ["finished"] * 3, [job.reason for job in plan.jobs]
    write_lecture(experiments, outcome_of(plan))
    html = (plan.out / "lecture.html").read_text()
    document = Document(html)
    assert html.count("<img") == 3
    assert "Fig. 1: Autoencoder without convolutions, MNIST" in document.text
    assert "Not run: datasets/cats64 is missing; name the originals with --afhq PATH" in document.text
    assert "python <it>" in document.text
    assert (
        "Trained on 200 images of 0, 1, 28×28, for 5 epochs (640 images seen); validated on 60 others." in document.text
    )
    report = plan.out / "runs" / "ae_dense_mnist" / "report.html"
    assert report.is_file()
    assert "runs/ae_dense_mnist/report.html" in [link.attributes["href"] for link in document.all("a")]
    scores = json.loads((plan.out / "lecture.json").read_text())["ae_dense_mnist"]
    evaluation = json.loads((plan.out / "runs" / "ae_dense_mnist" / "evaluation.json").read_text())
    assert scores["eval/fid"] == evaluation["eval/fid"]
    assert f"{scores['val/psnr_db']:,.4g}" in document.text
    again = plan_of(root, tmp_path)
    again.add_experiment(experiment)
    again.jobs[1].command = extractor.command
    written = (plan.out / "lecture.json").stat().st_mtime_ns, (plan.out / "extractors" / "mnist.pt").stat().st_mtime_ns
    run_jobs(again.jobs, processes=2, root=root)
    assert {job.state for job in again.jobs} == {"finished"}
    assert written[1] == (plan.out / "extractors" / "mnist.pt").stat().st_mtime_ns


def test_every_experiment_and_takeaway_can_be_planned_where_its_data_are(root, tmp_path):
    for name, classes in (
        ("mnist", ["0"]), ("cats64", ["cat"]), ("cats64gray", ["cat"]), ("faces64", ["cat", "dog", "wild"]),
        ("afhq128", ["cat", "dog", "wild"]), ("afhq128gray", ["cat", "dog", "wild"]),
    ):  # fmt: skip
        (root / "datasets" / name).mkdir(parents=True)
        (root / "datasets" / name / "manifest.json").write_text(json.dumps({"classes": classes}))
    for scale in ("small", "full"):
        plan = plan_of(root, tmp_path, scale=scale)
        runs = [plan.add_experiment(experiment) for experiment in EXPERIMENTS]
        trials = [plan.add_takeaway(takeaway) for takeaway in TAKEAWAYS]
        assert plan.missing == {}
        assert None not in runs
        assert None not in trials
        assert len({job.record_file for job in plan.jobs}) == len(plan.jobs)
        for index, job in enumerate(plan.jobs):
            assert all(other in plan.jobs[:index] for other in job.after), job.name
            assert [
                word
                for word in job.command
                if word.endswith(".yaml") and not (ROOT / word.removeprefix("--config=")).is_file()
            ] == []
    (root / "datasets" / "afhq128" / "manifest.json").write_text(json.dumps({"classes": ["cat"]}))
    plan = plan_of(root, tmp_path, scale="full")
    assert plan.add_experiment(BY_NAME["vae_all"]) is None
    assert "has no images of dog, wild" in plan.missing["vae_all"]
    assert plan.add_experiment(BY_NAME["vae_cats"]) is not None


def test_verdicts_are_shown_and_what_failed_is_named(root, tmp_path):
    takeaway = next(each for each in TAKEAWAYS if each.name == "learning_rate")
    out = tmp_path / "out"
    trials = []
    for lr, elbo in ((1e-4, -150.0), (1e-3, -100.0)):
        for seed in (0, 1):
            folder = out / "runs" / f"{lr}-{seed}"
            folder.mkdir(parents=True)
            record = {"split": "val", "step": 1, "images_seen": 4, "epoch": 1.0}
            record |= {"val/elbo_nats": elbo + 0.1 * seed, "val/psnr_db": None}
            (folder / "config.yaml").write_text("{}")
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
            job = Job(f"{lr} {seed}", ("train",), out / "r", out / "l", state="finished")
            trials.append(TrialRun({"optim.lr": lr, "seed": seed}, folder, job))
    by_sweep = {"learning_rate": trials}
    plan = plan_of(root, tmp_path)
    write_takeaways([(takeaway, by_sweep, takeaway.judge(findings(by_sweep)))], outcome_of(plan))
    document = Document((out / "takeaways.html").read_text())
    assert "holds" in document.text
    assert "-150.0 nats" not in document.text
    assert "-99.950 ± 0.050" in (out / "takeaways.md").read_text()
    assert json.loads((out / "takeaways.json").read_text())["learning_rate"]["kind"] == "holds"
    trials[0].job.state, trials[0].job.reason = "failed", "out of luck"
    with pytest.raises(ValueError, match=r"0\.0001 0 failed: out of luck"):
        findings(by_sweep)


def test_jobs_run_after_what_they_need_and_fail_with_it(tmp_path):
    def job(name, code, *after):
        return Job(
            name, ("/usr/bin/env", "python3", "-c", code), tmp_path / f"{name}.json", tmp_path / f"{name}.log", after
        )

    first = job("first", "open('first', 'w')")
    second = job("second", "open('first'); open('second', 'w')", first)
    bad = job("bad", "raise SystemExit('error: no')")
    late = job("late", "open('late', 'w')", second, bad)
    run_jobs([late, second, bad, first], processes=2, root=tmp_path)
    assert [each.state for each in (first, second, bad, late)] == ["finished", "finished", "failed", "failed"]
    assert bad.reason.startswith("error: no")
    assert late.reason == "bad did not finish"
    assert (tmp_path / "second").exists()
    assert not (tmp_path / "late").exists()
    (tmp_path / "first").unlink()
    again = job("first", "open('first', 'w')")
    run_jobs([again], processes=1, root=tmp_path)
    assert (again.state, (tmp_path / "first").exists()) == ("finished", False)  # its record says so
    other = job("first", "open('first', 'w'); 1")
    run_jobs([other], processes=1, root=tmp_path)
    assert (tmp_path / "first").exists()  # another command has not run


def test_the_command_names_what_it_does_not_know():
    result = run("tools/reproduce.py", "lecture", "--only", "vae_dogs")
    assert result.returncode == 1
    assert "--only vae_dogs: lecture has ae_dense_mnist" in result.stderr


def test_pages_stay_themselves_whatever_the_names_in_runs_are(tmp_path):
    """Classes, packages, tags, reasons and folders that try to be HTML, on the lecture's page as on the takeaways'."""
    hostile = "</script><script>window.hacked=1</script><img src=x onerror=hacked()>\"'"
    with tarfile.open(ROOT / "tests" / "fixtures" / "ec12a9c.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    run = tmp_path / "runs" / hostile.replace("/", "|")
    shutil.copytree(tmp_path / "run", run)
    dataset = json.loads((run / "dataset.json").read_text())
    for split in ("train", "val"):
        dataset[split]["classes"] = [hostile]
        dataset[split]["splits"][split]["class_counts"] = {hostile: 16}
    (run / "dataset.json").write_text(json.dumps(dataset))
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(provenance | {"device": hostile, "packages": {hostile: hostile}}))
    outcome = ReproductionResult(tmp_path, "small", hostile, {}, {hostile: hostile}, has_inception=False)
    write_lecture([(EXPERIMENTS[0], run)], outcome)
    write_takeaways([(TAKEAWAYS[0], None, hostile)], outcome)
    for name in ("lecture.html", "takeaways.html", f"runs/{run.name}/report.html"):
        document = Document((tmp_path / name).read_text())
        assert hostile in document.text or run.name in document.text, name
        assert all("onerror" not in image.attributes for image in document.all("img")), name
        assert not [
            script for script in document.all("script") if "hacked" in script.text and "type" not in script.attributes
        ]
        assert all(not link.attributes["href"].lower().startswith("javascript") for link in document.all("a")), name
