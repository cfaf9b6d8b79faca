"""What is wrong with the data is found before a model is built, and said in a line that names the remedy."""

import contextlib
import shutil

import pytest
import torch
from launching import TINY

from vaetrain import train
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.data.config import DataConfig
from vaetrain.data.reader import open_reader
from vaetrain.data.shards import ShardSet
from vaetrain.data.stream_order import workers_for


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
        (no_manifest, [], "has no manifest.json; make one with tools/make_shards.py"),
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

    monkeypatch.setattr(train, "VAE", build)
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
