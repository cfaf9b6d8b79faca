"""Where training starts, and that one which was killed and started again equals one that was not."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vaetrain
import vaetrain.export
import vaetrain.train
import vaetrain.training.logger
import vaetrain.training.step
import vaetrain.training.vae_stage
from launching import finish, start
from vaetrain.config import Config, LogConfig
from vaetrain.data.config import DataConfig
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.provenance import provenance
from vaetrain.training.checkpoint import FORMAT_VERSION
from vaetrain.training.figures import RunFigures
from vaetrain.training.logger import RunLogger
from vaetrain.training.meters import Meters
from vaetrain.training.progress import Progress


def timeless(run_dir: Path) -> list[str]:
    """The lines of metrics.jsonl without what a clock measured."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in record.items() if not k.startswith("perf/")}) for record in records]


def tensors(run_dir: Path) -> dict[str, bytes]:
    """The files of tensors of the newest checkpoint."""
    return {
        file.name: file.read_bytes() for file in list_checkpoints(run_dir / "checkpoints")[-1].glob("*.safetensors")
    }


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in timeless(run_dir) if '"train/loss"' in line]


def seal(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint that a test has changed."""
    (checkpoint / "checksums.json").unlink(missing_ok=True)
    checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.iterdir()}
    (checkpoint / "checksums.json").write_text(json.dumps(checksums))


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes them out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take two seconds each time."""
    monkeypatch.setattr(RunFigures, "draw", lambda *_, **__: None)


@pytest.fixture(scope="module")
def runs(tiny_shards, tmp_path_factory) -> Path:
    """Runs that were killed, and those that were not, on one and two processes; see killed_training.py."""
    folder = tmp_path_factory.mktemp("killed")
    driver = finish(start("tests/killed_training.py", folder, tiny_shards))
    assert driver.returncode == 0, driver.stderr
    assert int(driver.stdout.splitlines()[-1]) > 0, "no kill hit a save"
    return folder


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_killed_often_equals_one_that_was_not(runs, num_processes):
    """Bit for bit, with SIGKILL at random moments and during saves, and global generators in disorder."""
    whole, killed = runs / f"whole{num_processes}", runs / f"killed{num_processes}"
    assert len(json.loads((killed / "provenance.json").read_text())["resumes"]) >= 2
    assert len(timeless(whole)) == 13 + 3
    assert timeless(whole) == timeless(killed)
    assert tensors(whole) == tensors(killed)
    assert tensors(whole).keys() == {f"{name}.safetensors" for name in ("model", "ema", "optimizer", "meters", "judge")}
    states = [
        json.loads((list_checkpoints(run / "checkpoints")[-1] / "state.json").read_text()) for run in (whole, killed)
    ]
    assert states[0] == states[1]
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.mark.parametrize("change", ["1to2", "2to1"])
def test_a_run_goes_on_with_another_number_of_processes(runs, change):
    assert losses(runs / f"from{change}") == pytest.approx(losses(runs / "whole1"), rel=1e-5)
    assert json.loads((runs / f"from{change}" / "provenance.json").read_text())["resumes"]


def test_a_run_that_somebody_trains_is_refused_on_all_processes(runs):
    """And ends them: killed_training.py, which held the lock, has waited for both."""
    said = "".join((runs / f"locked.{rank}.log").read_text() for rank in range(2))
    assert said.count("error: ") == 1, said
    assert "killed_training.py" in said
    assert "locked is in use by process" in said
    assert {path.name for path in (runs / "locked").iterdir()} == {".lock"}


def test_running_sums_go_on_with_another_number_of_processes():
    """Totals are kept whole; counts that are the same on all processes stay the same."""
    alone = Accelerator(cpu=True)
    saved = {
        "loss": torch.tensor([3.0, 5.0]), "num_images": torch.tensor([2.0, 2.0]), "skipped_steps": torch.tensor([1.0, 1.0]),
        "exploded_steps": torch.tensor([0.0, 0.0]),
        "streak": torch.tensor([1.0, 1.0]), "longest_streak": torch.tensor([4.0, 4.0]),
    }  # fmt: skip
    meters = Meters(("loss",), alone)
    meters.load_state_dict(saved)
    assert {name: value.tolist() for name, value in meters.state_dict().items()} == {
        "loss": [8], "num_images": [4], "skipped_steps": [1], "exploded_steps": [0], "streak": [1], "longest_streak": [4],
    }  # fmt: skip
    interval = meters.fetch()
    assert (interval.means, interval.skipped_steps, interval.longest_streak) == ({"loss": 2.0}, 1, 4)
    assert meters.fetch().longest_streak == 1


def test_a_streak_of_skipped_steps_survives_a_resume(train_tiny, monkeypatch):
    """A run that diverges and is restarted every few steps must stop all the same."""
    train_tiny("--checkpoint.every-steps", 1, epochs=1)
    monkeypatch.setattr(vaetrain.training.step, "negative_elbo", lambda distortion, *_: distortion * torch.nan)
    train_tiny("--checkpoint.every-steps", 1, epochs=2)
    with pytest.raises(FloatingPointError, match="7 steps in a row"):
        train_tiny("--checkpoint.every-steps", 1, "--train.max-nonfinite-steps", 7, epochs=3)


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (("--data.reader", "stream"), ("--data.reader", "stream", "--data.num-workers", 1), False),  # nobody else reads
        (("--data.reader", "stream"), ("--data.reader", "stream", "--train.micro-batch-size", 10), True),
        (("--data.reader", "stream"), ("--data.reader", "resident"), True),
        ((), ("--data.reader", "indexed", "--train.micro-batch-size", 10), False),
    ],
)
def test_another_order_within_an_epoch_is_refused(train_tiny, first, second, refused):
    length = ("--train.num-images", 160, "--optim.schedule", "constant")
    run_dir = train_tiny(*first, *length)
    if refused:
        with pytest.raises(ValueError, match=r"60 images into an epoch.*repeat some images.*the saved values"):
            train_tiny(*second, "--train.num-images", 240)
        shutil.rmtree(list_checkpoints(run_dir / "checkpoints")[-1])  # of what is left the newest is at an epoch's end
    train_tiny(*second, "--train.num-images", 240)
    assert json.loads(timeless(run_dir)[-1])["images_seen"] == 240


def test_training_goes_on_from_no_earlier_format_and_its_weights_are_read(copy_of_tiny_run, train_tiny):
    """As vaetrain wrote it when checkpoints had format 1 and run directories none, and without this version's options."""
    run_dir = copy_of_tiny_run()
    edit(run_dir / "provenance.json", format_version=None)
    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        (checkpoint / "meters.safetensors").unlink()
        (checkpoint / "judge.safetensors").unlink()
        edit(checkpoint / "state.json", format_version=1, vaetrain=None)
        config = yaml.safe_load((checkpoint / "config.yaml").read_text())
        del config["init_from"], config["checkpoint"]["every_steps"], config["checkpoint"]["keep_every_images"]
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
        seal(checkpoint)
    shutil.copy(checkpoint / "config.yaml", run_dir)
    before = tensors(run_dir)
    with pytest.raises(ValueError, match=r"has format 1, .* revision in .*provenance\.json, .* --init-from"):
        train_tiny(epochs=3)
    assert tensors(run_dir) == before
    assert vaetrain.load(run_dir).sample(1).shape == (1, 3, 16, 16)
    train_tiny("--init-from", run_dir, run_dir="new", epochs=1)


def test_later_formats_are_refused_by_the_version_they_need(train_tiny):
    """And not passed over for an older checkpoint: that would throw the later one's training away."""
    run_dir = train_tiny()
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    edit(newest / "state.json", format_version=FORMAT_VERSION + 1, vaetrain="7.8.9")
    seal(newest)
    for use in (train_tiny, lambda: vaetrain.load(run_dir)):
        with pytest.raises(ValueError, match=rf"has format {FORMAT_VERSION + 1}.*use vaetrain 7\.8\.9"):
            use()
    packages = json.loads((run_dir / "provenance.json").read_text())["packages"] | {"vaetrain": "9.8.7"}
    edit(run_dir / "provenance.json", format_version=2, packages=packages)
    for use in (train_tiny, lambda: vaetrain.load(run_dir)):
        with pytest.raises(ValueError, match=r"has run format 2.*use vaetrain 9\.8\.7"):
            use()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(train_tiny):
    run_dir = train_tiny(epochs=1)
    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        (checkpoint / "ema.safetensors").write_bytes(b"")
    metrics = (run_dir / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="none of its checkpoints is good"):
        train_tiny(epochs=1)
    assert (run_dir / "metrics.jsonl").read_text() == metrics


def test_the_order_of_places_to_start_from(train_tiny, capsys, monkeypatch, tmp_path):
    """The run directory's own checkpoint, then --resume PATH, then --init-from."""
    other = train_tiny(run_dir="other", epochs=1)
    third = train_tiny("--seed", 1, run_dir="third", epochs=1)
    capsys.readouterr()
    patches = iter([b"first", b"second", b"third"])
    monkeypatch.setattr("vaetrain.runs.directory.uncommitted_changes", lambda _: next(patches))
    own = train_tiny("--resume", other, "--init-from", third, run_dir="own", epochs=2)
    assert f"resuming from {other / 'checkpoints' / 'step-00000005'}" in capsys.readouterr().out
    train_tiny("--resume", other, "--init-from", third, run_dir="own", epochs=3)
    assert f"resuming from {own / 'checkpoints' / 'step-00000010'}" in capsys.readouterr().out
    train_tiny("--init-from", third, run_dir="new", epochs=1)
    assert f"starting with the weights of {third}" in capsys.readouterr().out
    made, other_made, third_made = (RunDirectory(run).provenance() for run in (own, other, third))
    assert made["resumed_from"] == str(other / "checkpoints" / "step-00000005")
    assert made["parent"] == other_made
    (again,) = made["resumes"]
    assert (again["step"], again["resumed_from"]) == (10, str(own / "checkpoints" / "step-00000010"))
    assert "parent" not in again
    new = RunDirectory(tmp_path / "new").provenance()
    assert (new["init_from"], new["parent"]) == (str(third / "checkpoints" / "step-00000005"), third_made)
    assert (own / "uncommitted.patch").read_bytes() == b"first"
    assert (own / "uncommitted-step-00000010.patch").read_bytes() == b"second"


def test_starting_from_weights(train_tiny, tmp_path, monkeypatch):
    """Raw weights and average from a run or a checkpoint, the average for both from an export; progress is new."""
    run_dir = train_tiny(epochs=1)
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    exported = vaetrain.export.export(run_dir, tmp_path / "exported")
    raw, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema"))
    loaded = []
    original = vaetrain.training.vae_stage.load_weights

    def look(source, model, ema, **options):
        original(source, model, ema, **options)
        loaded.append([{name: t.clone() for name, t in module.state_dict().items()} for module in (model, ema)])

    monkeypatch.setattr(vaetrain.training.vae_stage, "load_weights", look)
    for source, expected in ((run_dir, (raw, average)), (checkpoint, (raw, average)), (exported, (average, average))):
        new = train_tiny("--init-from", source, run_dir=f"from_{source.name}", epochs=1)
        assert json.loads(timeless(new)[-1])["images_seen"] == 100
        for got, wanted in zip(loaded.pop(), expected, strict=True):
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"does not fit this --model"):
        train_tiny("--init-from", run_dir, "--model.latent-channels", 8, run_dir="misfit")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a run"):
        train_tiny("--init-from", tmp_path / "nothing", run_dir="nothing_to_start_from")


def test_a_resumed_run_goes_on_at_its_trackers(tiny_shards, tmp_path):
    """W&B hears the same id, and TensorBoard shows no step twice, though one was logged twice."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    config = Config(
        data=DataConfig(train=str(tiny_shards)), log=LogConfig(wandb="offline", tensorboard=True), run_dir=run.path
    )
    for first, last in ((1, 4), (3, 5)):  # killed after step 4 and resumed from step 2
        alone = Accelerator(cpu=True, log_with=config.log.trackers, project_dir=run.path)
        logger = RunLogger(
            alone,
            run,
            config,
            step=first - 1,
            images_seen=first - 1,
            total_images=5,
            images_per_epoch=1,
            dataset_fingerprint="f",
            flops_per_image=lambda: 1.0,
            unit="nats",
        )
        for step in range(first, last + 1):
            logger.write("train", Progress(step=step, images_seen=step), {"train/loss": float(step)})
        alone.end_training()
    wandb_id = json.loads(run.trackers_file.read_text())["wandb"]["id"]
    offline = sorted(run.path.glob("wandb/offline-run-*"))
    assert len(offline) == 2
    assert {path.name.rsplit("-", 1)[-1] for path in offline} == {wandb_id}
    events = EventAccumulator(str(next(run.path.rglob("events.out.tfevents*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_records_after_a_checkpoint_are_dropped(tmp_path, tiny_shards):
    """With the validation of its own step, unless it was saved after it."""
    run = RunDirectory(tmp_path)
    config = Config(data=DataConfig(train=str(tiny_shards)), run_dir=tmp_path)

    def kept(step: int, validated_at: int) -> list[tuple[int, str]]:
        run.metrics_file.unlink(missing_ok=True)
        for at, split in ((1, "train"), (2, "train"), (2, "val"), (3, "train"), (4, "train"), (4, "val"), (5, "train")):
            run.append_metrics({"step": at, "images_seen": 10 * at, "split": split})
        run.write_start(config, provenance(None, None), {}, step=step, validated_at=validated_at)
        return [(record["step"], record["split"]) for record in run.metrics()]

    before = [(1, "train"), (2, "train"), (2, "val"), (3, "train")]
    assert kept(3, 20) == before
    assert kept(4, 20) == [*before, (4, "train")]
    assert kept(4, 40) == [*before, (4, "train"), (4, "val")]
    assert kept(0, 0) == []
