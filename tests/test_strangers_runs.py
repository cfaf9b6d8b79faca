"""Runs that somebody else made, or damaged: nothing of them is executed, no link is followed, and every fault is a sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vaetrain
from vaetrain.command_line import parse, read_config
from vaetrain.config import Config
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.files import inside, replace_file, sha256_of_file
from vaetrain.model.autoencoder import VAE
from vaetrain.model.config import ModelConfig
from vaetrain.report import gallery, origin
from vaetrain.report.document import report
from vaetrain.runs import comparison, rerun
from vaetrain.runs.comparison import Comparison, Result
from vaetrain.runs.directory import RunDirectory
from vaetrain.runs.lock import hold
from vaetrain.sampling.reader import SampleReader
from vaetrain.sampling.sample_set import RankShard
from vaetrain.training import checkpoint
from vaetrain.training.checkpoint import check, newest_good, read_progress, read_tensors


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A folder with shards, a run, an export of it and samples."""
    with tarfile.open(Path(__file__).parent / "fixtures" / "ec12a9c.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mine") / "victim"
    file.write_text("precious\n")
    return file


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(*argv: object) -> str:
    """What the parser says as it leaves with 2."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit, match="2"):
        parse(Config, None, list(map(str, argv)))
    return said.getvalue()


@pytest.mark.parametrize(
    ("text", "given", "told"),
    [
        (
            "run_dir: /elsewhere/run",
            ("--run-dir", "here"),
            "run_dir is '/elsewhere/run', outside the working directory",
        ),
        ("run_dir: runs/../../x", ("--run_dir=here",), "give --run-dir on the command line"),
        ("run_dir: $HOME/x", ("--run-dir", "here"), "outside the working directory"),
        ("data: {cache_dir: /elsewhere}", ("--data.cache-dir", "here"), "give --data.cache-dir on the command line"),
        ("data: {classes: [[a]]}", None, "a list of lists or of mappings"),
        ("train: {rfid: {extractor: ./evil.pt, every_epochs: 1}}", None, "a file of code"),
        ("log: {wandb_project: ../../x}", None, "it is a name"),
        ("optim: {lr: nan}", None, "--optim.lr is nan; give a finite number"),
        ("seed: 18446744073709551615", None, "--seed is 18446744073709551615"),
    ],
)
def test_a_config_file_neither_executes_nor_writes_elsewhere(tmp_path, monkeypatch, text, given, told):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert told in " ".join(refusal("--config", file, "--data.train", "x").replace("│", " ").split())
    if given is not None:  # the user's own command line may
        parse(Config, None, ["--config", str(file), "--data.train", "x", *given])


def test_what_looks_like_an_option_is_text(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {classes: [a, --run-dir=/x, -h], val: -h}\nseed: 7")
    config = parse(Config, None, ["--config", str(file), "--data.train", "x", "--run-dir", "here"])
    assert config.data.classes == ("a", "--run-dir=/x", "-h")
    assert (config.data.val, config.run_dir, config.seed) == ("-h", Path("here"), 7)


def test_a_file_of_code_is_named_by_the_user_alone(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("run: r\nfid: {extractor: ./evil.pt}")
    with pytest.raises(SystemExit):
        parse(EvaluateConfig, None, ["--config", str(file)])
    assert "a file of code" in capsys.readouterr().err
    assert parse(EvaluateConfig, None, ["--config", str(file), "--fid.extractor", "x.pt"]).fid.extractor == "x.pt"


def test_a_run_may_lie_anywhere_and_say_so_in_its_own_config(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"data: {{train: x}}\nrun_dir: {tmp_path / 'run'}\n")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert parse(Config, None, ["--config", "../run/config.yaml"]).run_dir == tmp_path / "run"


def test_a_recorded_cache_is_used_only_where_there_is_one(tmp_path):
    config = parse(Config, None, ["--data.train", "x", "--data.cache-dir", str(tmp_path)]).data
    assert config.as_recorded().cache_dir is None
    (tmp_path / ".lock").touch()
    assert config.as_recorded().cache_dir == tmp_path


def test_git_gets_revisions_alone(strange, victim, monkeypatch):
    shutil.copytree(strange / "run", strange / "other")
    edit(strange / "run" / "provenance.json", git_revision=f"--output={victim.parent}/")
    edit(strange / "other" / "provenance.json", git_revision=f"/{victim.name}")
    compared = Comparison((Result.read(strange / "run"), Result.read(strange / "other")))
    monkeypatch.setattr(comparison, "_git", lambda *_: pytest.fail("git was asked"))
    assert compared.code_between(Path(__file__).parent) == "one of the two revisions is none of git's"
    assert "none of git" in report([strange / "run", strange / "other"])
    assert victim.read_text() == "precious\n"
    assert not [line for line in rerun.differences(RunDirectory(strange / "run")) if "worktree" in line]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"omp_num_threads": "1; id"}, "no number of threads"), ({"num_processes": 10**6}, "at most are started"),
        ({"num_processes": -1}, "at most are started"),
    ],
)  # fmt: skip
def test_a_rerun_starts_nothing_that_cannot_be_meant(strange, changes, told, monkeypatch):
    monkeypatch.setattr(rerun, "visible_gpus", list)
    monkeypatch.setattr(rerun.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    run = RunDirectory(strange / "run")
    edit(run.provenance_file, **changes)
    with pytest.raises(ValueError, match=told):
        rerun.start(rerun.config_of_rerun(run, strange / "again"), run.provenance())


def test_a_rerun_writes_where_it_was_told(strange, monkeypatch):
    run = RunDirectory(strange / "run")
    text = run.config_file.read_text().replace("cache_dir: null", "cache_dir: /elsewhere")
    run.config_file.write_text(text.replace("wandb: disabled", "wandb: online"))
    config = rerun.config_of_rerun(run, strange / "again")
    assert (config.run_dir, config.data.cache_dir, config.log.wandb) == (strange / "again", None, "disabled")


def test_a_command_to_copy_is_quoted(strange):
    edit(strange / "run" / "provenance.json", num_processes="2; id")
    assert "2; id" not in report([strange / "run"]).replace("num_processes is &#x27;2; id&#x27;", "")


def test_a_command_to_copy_is_train_with_its_arguments(strange):
    """Not `accelerate launch -m pip`, nor a script in the run's own folder, nor what a terminal obeys within quotes."""
    record, launch = strange / "run" / "provenance.json", "accelerate launch --config_file launch/gpu1.yaml "
    edit(record, command=["-m", "pip", "install", "$(id)", "a b"])
    assert f"{launch}vaetrain/train.py pip install &#x27;$(id)&#x27; &#x27;a b&#x27;" in report([strange / "run"])
    edit(record, command=["train.py", "--seed", "\x1b[201~\nid\n"])
    assert launch not in report([strange / "run"])


def test_a_report_of_endless_files_ends(strange, monkeypatch):
    monkeypatch.setattr(gallery, "MAX_PICTURES", 3)
    monkeypatch.setattr(origin, "MAX_PATCHES_SHOWN", 2)
    picture = next((strange / "run" / "figures").glob("*.png"), None)
    content = (
        picture.read_bytes() if picture else (Path(__file__).parents[1] / "docs" / "scaling_cats.png").read_bytes()
    )
    (strange / "run" / "figures").mkdir(exist_ok=True)
    for number in range(10):
        (strange / "run" / "figures" / f"x{number}.png").write_bytes(content)
        (strange / "run" / f"uncommitted-{number}.patch").write_text("x")
    text = report([strange / "run"])
    assert text.count('<figure class="picture">') == 3
    assert "more pictures are left out." in text
    assert text.count("Changes that were not committed") == 2


RUN_FILES = (
    "config.yaml", "provenance.json", "dataset.json", "metrics.jsonl", "evaluation.json", "uncommitted.patch", "figures",
    "checkpoints",
)  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_link_in_a_run_is_refused_by_name(strange, victim, name):
    place = strange / "run" / name
    if place.exists():
        place.rename(strange / "aside")
    else:
        (strange / "aside").write_text("what a report would show")
    place.symlink_to(strange / "aside")

    def use() -> None:
        run = RunDirectory.open(strange / "run")
        report([run.path])
        newest_good(run.checkpoints)

    with pytest.raises(ValueError, match=rf"{name} is a link, which is not followed"):
        use()


def test_links_are_not_written_through(strange, victim):
    run = RunDirectory(strange / "run")
    for name in ("evaluation.json", "evaluation.json.partial", "report.html.partial"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(victim)
    replace_file(run.path / "evaluation.json", b"{}")  # takes the place of the link itself
    assert (run.path / "evaluation.json").read_bytes() == b"{}"
    assert not (run.path / "evaluation.json").is_symlink()
    (run.path / ".lock").unlink()
    (run.path / ".lock").symlink_to(victim)
    with pytest.raises(ValueError, match=r"\.lock is a link"), hold(run.path / ".lock"):
        pass
    run.metrics_file.unlink()
    os.symlink(victim, run.path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a link"):
        run.append_metrics({})
    linked = run.checkpoints / "step-00000009"
    linked.symlink_to(victim.parent)
    with pytest.raises(ValueError, match="step-00000009 is a link"):
        newest_good(run.checkpoints)
    linked.unlink()
    inner = run.checkpoints / "step-00000004" / "ema.safetensors"
    inner.rename(strange / "ema")
    inner.symlink_to(strange / "ema")
    with pytest.raises(ValueError, match=r"ema\.safetensors is a link"):
        check(inner.parent)
    assert victim.read_text() == "precious\n"


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a/b", "", "."])
def test_names_stay_in_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a file"):
        inside(tmp_path, name)


def test_a_sample_set_stays_in_its_folder(strange):
    manifest = strange / "samples" / "manifest.json"
    content = json.loads(manifest.read_text())
    shard = content["shards"][0]
    edit(manifest, shards=[{**shard, "name": "../other.tar"}])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: shards\[0\]: name '\.\./other\.tar'"):
        SampleReader.open(strange / "samples")
    edit(manifest, shards=[shard], count=5)
    with pytest.raises(ValueError, match="do not hold the 5 images"):
        SampleReader.open(strange / "samples")
    file = strange / "samples" / shard["name"]
    file.rename(strange / "aside.tar")
    file.symlink_to(strange / "aside.tar")
    with pytest.raises(ValueError, match="is a link"):
        RankShard(0, 1, 4, 64, 1000).whole_shards(strange / "samples")


def seal(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    (folder / "checksums.json").write_text(json.dumps({file.name: sha256_of_file(file) for file in folder.iterdir()}))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "NUL": lambda content: bytes(len(content)),
    "null": lambda _: b"null",
    "list": lambda _: b"[1, 2]",
    "nothing in it": lambda _: b"{}",
    "deep": lambda _: b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "digits": lambda content: content.replace(b"4", b"4" * 400),
    "types": lambda content: content.replace(b'"', b"").replace(b": {", b": 3, x: {"),
    "no UTF-8": lambda content: b"\xff\xfe" + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-00000004", "export", "samples"])
def test_a_damaged_file_is_a_sentence(strange, place, damage):
    """Whoever reads it: a ValueError or OSError that names it, or a report that says so."""
    folder, run = strange / place, RunDirectory(strange / "run")
    newest = run.checkpoints / "step-00000004"
    uses: list[Callable[[], object]] = [lambda: Result.read(folder)]
    if place == "samples":
        uses.append(lambda: SampleReader.open(folder))
    elif place == "export":
        uses.append(lambda: vaetrain.load(folder))
    elif place == "run":  # tools/fuzz.py compares and loads them, too, which takes longer
        uses = [lambda: report([run.path]), run.metrics, run.provenance, run.dataset]
    else:
        weights = [newest / f"{name}.safetensors" for name in ("model", "ema", "optimizer", "meters", "judge")]
        uses = [
            lambda: check(newest), lambda: read_progress(newest), RunDirectory(newest).dataset,
            *(partial(read_tensors, file) for file in weights),
        ]  # fmt: skip
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != ".lock"):
        content = file.read_bytes()
        file.write_bytes(DAMAGES[damage](content))
        if place.startswith("run/") and file.name != "checksums.json":
            seal(folder)
        for use in uses:
            with contextlib.suppress(ValueError, OSError):
                use()
        file.write_bytes(content)
        if place.startswith("run/") and file.name != "checksums.json":
            seal(folder)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("provenance.json", "{}", r"provenance\.json is damaged: the file lacks git_revision"),
        ("metrics.jsonl", "\0\0\0\n", r"metrics\.jsonl is damaged: line 1 is no record .*delete that line"),
        ("config.yaml", "data: {train: 5, classes: {a: 1}}", r"config\.yaml: unknown key data\.classes\.a"),
        ("config.yaml", "data: {train: x}\nseed: abc", r"config\.yaml does not fit this vaetrain: .*--seed"),
    ],
)
def test_file_and_remedy_are_named(strange, name, text, told):
    run = RunDirectory(strange / "run")
    (run.path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        run.provenance(), run.metrics(), run.config()


def test_a_config_that_does_not_fit_is_no_exit(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    for text in ("{}", "data: {train: x}\nmodel: {kind: zzz}", "data: {train: x}\noptim: {lr: -1}"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml does not fit this vaetrain: \w"):
            read_config(Config, file)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(strange, value):
    file = strange / "export" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .* not finite"):
        vaetrain.load(strange / "export")


def test_weights_of_another_kind_are_refused(strange):
    file = strange / "export" / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    for other in (tensors[name].double(), tensors[name][:-1].clone(), None):
        save_file({k: v for k, v in (tensors | {name: other}).items() if v is not None}, file)
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit this --model"):
            vaetrain.load(strange / "export")
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        vaetrain.load(strange / "export")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_features": [10**6, 10**6]}, {"kind": "conv", "base_channels": 60_000}, {"num_res_blocks": 10**9},
        {"kind": "conv", "latent": "vector", "latent_channels": 10**6, "base_channels": 4096}, {"image_size": 10**6},
        {"hidden_features": [8] * 1000}, {"sigma": 1e-300}, {"hidden_features": [0]}, {"num_mixtures": 10**12},
        {"likelihood": "logistic-mixture", "num_mixtures": 1000, "hidden_features": [10**6]}, {"channel_mult": [1] * 100},
    ],
)  # fmt: skip
def test_a_model_that_would_take_all_memory_is_not_built(strange, monkeypatch, changes):
    file = strange / "export" / "config.json"
    content = json.loads(file.read_text())
    edit(file, model=content["model"] | changes)
    monkeypatch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"config\.json is damaged: model: .*--model\."):
        vaetrain.load(strange / "export")


def test_a_model_that_its_weights_are_not_of_is_not_built(strange, monkeypatch):
    """Within all bounds, 4 GB."""
    file = strange / "export" / "config.json"
    edit(file, model=json.loads(file.read_text())["model"] | {"hidden_features": [30_000, 30_000]})

    def build(config: ModelConfig) -> VAE:
        assert torch.get_default_device().type == "meta", "built"
        return VAE(config)

    monkeypatch.setattr(checkpoint, "VAE", build)
    with pytest.raises(ValueError, match="does not fit this --model"):
        vaetrain.load(strange / "export")


def test_the_models_there_are_stay_within_the_bounds():
    ModelConfig(image_size=512, base_channels=256, channel_mult=(1, 1, 2, 2, 4, 8), num_res_blocks=3)
    ModelConfig(kind="dense", image_size=256, hidden_features=(4096, 2048), latent_channels=512)


def test_no_run_is_trained_over(strange):
    run = RunDirectory(strange / "run")
    newest = run.checkpoints / "step-00000004"
    (newest / "checksums.json").rename(strange / "checksums.json")
    with pytest.raises(FileExistsError):
        run.check_resume("never")
    with pytest.raises(ValueError, match=r"step-00000004 is damaged: it has no checksums\.json"):
        newest_good(run.checkpoints)
    shutil.rmtree(newest)
    for resume in ("auto", "never", "elsewhere"):
        with pytest.raises(ValueError, match=r"holds records of a training .* its checkpoints are gone"):
            run.check_resume(resume)
    run.no_checkpoint_file.touch()  # as a run has it that was killed before its first
    run.check_resume("auto")
    shutil.rmtree(run.checkpoints)
    for file in (run.provenance_file, run.dataset_file, run.evaluation_file, run.metrics_file):
        with pytest.raises(ValueError, match=file.name):
            run.check_resume("auto")  # whatever is missing
        file.unlink()
    run.check_resume("auto")
