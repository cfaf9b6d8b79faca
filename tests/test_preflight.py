"""What is wrong is found before a model is built, much of it before torch is imported, in a line that names the remedy."""

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from launching import ROOT, TINY
from vaetrain import preflight, train
from vaetrain.command_line import parse, to_yaml
from vaetrain.config import Config
from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers.reader import open_reader
from vaetrain.data.readers.stream_order import workers_for
from vaetrain.interchange.diffusers_config import WEIGHTS_FILE, config_of
from vaetrain.model.config import ModelConfig
from vaetrain.training import step


def nothing(folder):
    pass


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def manifest_of_another_size(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"image_size": 16', '"image_size": 32'))


def no_index(folder):
    (folder / "index.safetensors").unlink()


def shard_missing(folder):
    (folder / "train-000003.tar").unlink()


def shard_cut_short(folder):
    content = (folder / "train-000003.tar").read_bytes()
    (folder / "train-000003.tar").write_bytes(content[:-512])


def shard_changed(folder):
    shard_set = ShardSet.open(folder)
    with (folder / "train-000003.tar").open("r+b") as file:
        file.seek(int(shard_set.index("train").offset[36]))
        file.write(bytes(16))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (
            no_manifest,
            [],
            "it has no manifest.json); make one of what it holds in another folder, python tools/make_shards.py",
        ),
        (manifest_of_another_size, [], "fingerprint does not match the other fields"),
        (no_index, [], "index.safetensors does not exist"),
        (shard_missing, [], "train-000003.tar is missing"),
        (shard_cut_short, [], "train-000003.tar has "),
        (shard_changed, ["--data.verify", "full"], "train-000003.tar has another SHA-256"),
        (nothing, ["--model.image-size", "32"], "--model.image-size"),
        (nothing, ["--model.in-channels", "1"], "--model.in-channels"),
        (nothing, ["--data.classes", "unicorn"], "--data.classes unicorn: "),
        (nothing, ["--train.global-batch-size", "200"], "the split has 100 images"),
        (nothing, ["--data.val", "nowhere"], "nowhere does not exist"),
    ],
)
@pytest.mark.parametrize("kind", ["indexed", "resident", "stream"])
def test_unfit_data_is_refused_before_the_model_is_built(
    tiny_shards, tmp_path, monkeypatch, capsys, damage, arguments, message, kind
):
    def build(*_):
        raise AssertionError("a model was built")

    monkeypatch.setattr(step, "VAE", build)
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    damage(folder)
    own = f"--data.train {folder} --run-dir {tmp_path}/run --data.reader {kind} --data.num-workers 0".split()
    with pytest.raises(SystemExit) as stopped:
        train.main(parse(Config, None, [*TINY, *own, *arguments]))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert message in said.partition("error: ")[2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_workers", "num_processes", "split", "refused"),
    [
        (4, 2, "train", ""), (10, 2, "val", ""), (None, 2, "train", ""),
        (10, 2, "train", "9 shards are fewer than 2 × 10 stream workers.*lower --data.num-workers to 4 or less, or make more"),
        (0, 10, "train", "9 shards are fewer than 10 × 1 stream workers.*use at most 9 processes, or make more"),
        (None, 10, "train", "use at most 9 processes"),
    ],
)  # fmt: skip
def test_fewer_shards_than_stream_workers_are_refused(tiny_shards, num_workers, num_processes, split, refused):
    config = DataConfig(train=str(tiny_shards), reader="stream", num_workers=num_workers)
    expected = pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext()
    with expected:
        open_reader(config, split, device=torch.device("cpu"), num_processes=num_processes).close()


def test_workers_chosen_by_themselves_have_a_shard_each():
    assert [workers_for(9, 2, number) for number in (0, 1, 4, 16)] == [0, 1, 4, 4]
    assert workers_for(9, 10, 16) == 1


REFUSALS = {
    "config": ("vaetrain/train.py --config no/such.yaml", "config file no/such.yaml does not exist"),
    "shards": ("vaetrain/train.py --data.train nowhere", "shard set nowhere does not exist"),
    "val": ("vaetrain/train.py {tiny} --data.val nowhere", "shard set nowhere does not exist"),
    "val split": ("vaetrain/train.py {tiny} --data.val {train_alone}", "has no val split, only train"),
    "pipe": ("vaetrain/train.py {tiny} --data.val pipe:echo", "would run a shell command"),
    "image size": ("vaetrain/train.py {tiny} --model.image-size 32", "pass --model.image-size 16"),
    "channels": ("vaetrain/train.py {tiny} --model.in-channels 1", "pass --model.in-channels 3"),
    "class": ("vaetrain/train.py {tiny} --data.classes unicorn", "--data.classes unicorn: "),
    "split smaller than a batch": (
        "vaetrain/train.py {tiny} --train.global-batch-size 200", "the split has 100 images, fewer than one global batch",
    ),
    "class smaller than a batch": (
        "vaetrain/train.py {tiny} --data.classes cat --train.global-batch-size 80", "images, fewer than one global batch",
    ),
    "micro-batch": (
        "vaetrain/train.py {tiny} --train.micro-batch-size 3", "--train.micro-batch-size 3 does not divide the 20 images",
    ),
    "processes": (
        "WORLD_SIZE=3 vaetrain/train.py {tiny}", "--train.global-batch-size 20 does not divide among 3 processes",
    ),
    "never": ("vaetrain/train.py {tiny} --run-dir {run} --resume never", "already holds a run (step-00000005); choose"),
    "later format": ("vaetrain/train.py {tiny} --run-dir {later}", "has run format 9"),
    "resume": ("vaetrain/train.py {tiny} --resume nowhere", "nowhere is neither a checkpoint nor a run"),
    "init": ("vaetrain/train.py {tiny} --init-from nowhere", "nowhere is neither a checkpoint nor a run"),
    "perceptual files": (
        "vaetrain/train.py {tiny} --objective.perceptual.weight 1",
        "--objective.perceptual.backbone is not given. LPIPS through vgg needs two files, anywhere on this machine: https",
    ),
    "perceptual file": (
        (
            "vaetrain/train.py {tiny} --objective.perceptual.weight 1 --objective.perceptual.backbone README.md "
            "--objective.perceptual.heads nowhere.pth"
        ),
        "--objective.perceptual.heads nowhere.pth is no file. LPIPS through vgg needs two files",
    ),
    "perceptual size": (
        (
            "vaetrain/train.py {tiny} --objective.perceptual.weight 1 --objective.perceptual.net alex "
            "--objective.perceptual.backbone README.md --objective.perceptual.heads README.md"
        ),
        "takes images of at least 31 pixels a side and these have 16; pass --objective.perceptual.resize 64",
    ),
    "perceptual resize": (
        (
            "vaetrain/train.py {tiny} --objective.perceptual.weight 1 --objective.perceptual.resize 8 "
            "--objective.perceptual.backbone README.md --objective.perceptual.heads README.md"
        ),
        "--objective.perceptual.resize is 8, less than the images' 16 pixels",
    ),
    "scale perceptual": (
        "vaetrain/scale.py {tiny} --out {new} --objective.perceptual.weight 1", "--objective.perceptual.backbone is not given",
    ),
    "scale shards": ("vaetrain/scale.py --data.train nowhere --out {new}", "shard set nowhere does not exist"),
    "scale image size": ("vaetrain/scale.py {tiny} --model.image-size 32 --out {new}", "pass --model.image-size 16"),
    "scale batch": ("WORLD_SIZE=3 vaetrain/scale.py {tiny} --out {new}", "does not divide among 3 processes"),
    "scale out": ("vaetrain/scale.py {tiny} --out {scaled}", "already holds a scaling.json"),
    "scale counts": ("vaetrain/scale.py {tiny} --out {new} --for-num-processes 512", "give smaller numbers"),
    "scale parts": ("vaetrain/scale.py {tiny} --out {new} --noise.parts 3", "--noise.parts 3 does not divide"),
    "evaluate": ("vaetrain/evaluate.py --run nowhere", "nowhere is no run directory"),
    "evaluate shards": ("vaetrain/evaluate.py --run {run} --data nowhere", "shard set nowhere does not exist"),
    "evaluate image size": ("vaetrain/evaluate.py --run {run_of_32}", "pass --model.image-size 16"),
    "evaluate without checkpoint": ("vaetrain/evaluate.py --run {just_begun}", "nor a run that has a good one"),
    "sample": ("vaetrain/sample.py --run nowhere --out {new}", "nowhere is no run directory"),
    "sample without checkpoint": ("vaetrain/sample.py --run {just_begun} --out {new}", "nor a run that has a good one"),
    "encode": ("vaetrain/encode.py --run nowhere --out {new}", "nowhere is no run directory"),
    "encode shards": ("vaetrain/encode.py --run {run} --out {new} --data nowhere", "shard set nowhere does not exist"),
    "export": ("tools/export.py nowhere {new}", "nowhere is no run directory"),
    "export without checkpoint": ("tools/export.py {just_begun} {new}", "nor a run that has a good one"),
    "export to no repository": ("tools/export.py {run} {new} --push-to-hub me", "--push-to-hub is me; give OWNER/NAME"),
    "published vae": (
        "vaetrain/train.py {tiny} --init-from {published}",
        "does not fit this --model.*; pass --model.kind autoencoder-kl --model.in-channels 3 --model.base-channels 64",
    ),
    "report": ("tools/report.py nowhere", "run directory nowhere does not exist"),
    "compare": ("tools/compare_runs.py nowhere {run}", "nowhere is no run directory"),
    "verify": ("tools/verify_shards.py nowhere", "shard set nowhere does not exist"),
    "rerun": ("tools/rerun.py nowhere", "nowhere is no run directory"),
    "rerun shards": ("tools/rerun.py {run_of_nothing}", "shard set nowhere does not exist"),
    "extractor": ("tools/train_extractor.py nowhere {new}.pt", "shard set nowhere does not exist"),
}  # fmt: skip
"""By name: a command, with variables of a launcher before it, and what it says of itself."""

IN_ONE_PROCESS = """
import contextlib, io, json, os, runpy, sys
for words in json.load(sys.stdin):
    variables = dict(word.split("=") for word in words if word.startswith("WORLD_SIZE="))
    sys.argv = words[len(variables):]
    os.environ |= variables
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    for name in variables:
        del os.environ[name]
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]), flush=True)
    if "torch" in sys.modules:
        break  # so it would be for all that follow
"""


@pytest.fixture(scope="module")
def refused(tiny_shards, tmp_path_factory):
    """Of each of the REFUSALS, by name: exit code, what was printed, whether torch was imported."""
    folder = tmp_path_factory.mktemp("refused")

    def run_of(name, *arguments, checkpoint=True, **provenance):
        run_dir = folder / name
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(to_yaml(parse(Config, None, [*TINY, *map(str, arguments)])))
        (run_dir / "provenance.json").write_text(json.dumps(provenance))
        if checkpoint:
            (run_dir / "checkpoints" / "step-00000005").mkdir(parents=True)
            (run_dir / "checkpoints" / "step-00000005" / "checksums.json").write_text("{}")
        return run_dir

    own = ("--data.train", tiny_shards)
    whole = ShardSet.open(tiny_shards).manifest
    train_alone = replace(whole, splits={"train": whole.splits["train"]}, fingerprint="")
    (folder / "train_alone").mkdir()
    train_alone.write(folder / "train_alone")
    published = folder / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(config_of(ModelConfig(kind="autoencoder-kl"))))
    (published / WEIGHTS_FILE).touch()
    (folder / "scaled").mkdir()
    (folder / "scaled" / "scaling.json").touch()
    places = {
        "tiny": " ".join(("--data.train", str(tiny_shards), "--run-dir", str(folder / "new"), *TINY)),
        "run": run_of("run", *own),
        "run_of_32": run_of("run_of_32", *own, "--model.image-size", 32),
        "run_of_nothing": run_of("run_of_nothing", "--data.train", "nowhere", checkpoint=False, num_processes=1),
        "just_begun": run_of("just_begun", *own, checkpoint=False),
        "later": run_of("later", *own, checkpoint=False, format_version=9, packages={"vaetrain": "7.8.9"}),
        "train_alone": folder / "train_alone",
        "scaled": folder / "scaled",
        "published": published,
        "new": folder / "new",
    }
    commands = [command.format_map(places).split() for command, _ in REFUSALS.values()]
    child = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS], input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert not (folder / "new").exists()
    return dict(zip(REFUSALS, map(json.loads, child.stdout.splitlines()), strict=False))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_needs_no_torch_is_refused_before_torch_is_imported(refused, name):
    assert name in refused, f"torch was imported by {list(refused)[-1]}"
    code, said, torch_was_imported = refused[name]
    command, message = REFUSALS[name]
    assert message in said
    assert said.count("error: ") == 1
    assert code == (2 if "--config" in command else 1)
    assert not torch_was_imported


def test_shards_behind_a_url_are_left_to_the_command():
    config = parse(Config, None, [*TINY, "--data.train", "https://nowhere.invalid/shards"])
    assert preflight.check_split(config.data, "train", config.model) is None
    preflight.check_training(config)


@pytest.mark.parametrize(("local_rank", "waited"), [("0", []), ("1", [preflight.OTHERS_WAIT_S])])
def test_the_first_process_of_a_machine_speaks_first(monkeypatch, capsys, local_rank, waited):
    """The launcher ends the others once it has left; one that alone found something wrong speaks after all."""
    slept = []
    monkeypatch.setattr(preflight.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as end, preflight.refusing():
        preflight.check_run(ROOT / "nowhere")
    assert (end.value.code, slept) == (1, waited)
    assert capsys.readouterr().err.startswith("error: ")
