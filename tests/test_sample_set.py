import json
import shutil
from dataclasses import replace

import pytest
import torch

from launching import run_here
from test_use import read_samples
from vaetrain import sample as sample_module
from vaetrain.data.format.encode import png
from vaetrain.data.format.writer import ShardWriter
from vaetrain.sample import SampleConfig, sample
from vaetrain.sampling.encode import with_png
from vaetrain.sampling.sample_set import RankShard


class Killed(BaseException):
    pass


def sample_and_count(config, accelerator, monkeypatch, killed_after=10**9):
    """Draw samples; have the command end, as by a signal, when it has made so many. Returns how many were made."""
    made = []
    write = ShardWriter.write

    def write_or_die(*arguments):
        if len(made) == killed_after:
            raise Killed
        made.append(arguments)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_or_die)
        sample(config, accelerator)
    return len(made)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_a_killed_command_goes_on_where_it_stopped(tiny_run, accelerator, tmp_path, monkeypatch, batch_size):
    options = {"num_images": 23, "batch_size": batch_size, "images_per_shard": 6}
    whole, killed = (SampleConfig(tiny_run, tmp_path / name, **options) for name in ("whole", "killed"))
    sample(whole, accelerator)
    with pytest.raises(Killed):
        sample_and_count(killed, accelerator, monkeypatch, killed_after=15)
    (killed.out / ".rank-0000-000002.tar.4711").write_bytes(b"half a shard")  # what a signal would have left
    inodes = {path.name: path.stat().st_ino for path in killed.out.glob("*.tar")}
    assert inodes.keys() == {"rank-0000-000000.tar", "rank-0000-000001.tar"}
    assert not (killed.out / "manifest.json").exists()
    assert sample_and_count(killed, accelerator, monkeypatch) == 23 - 12
    assert contents(killed.out) == contents(whole.out)
    assert {name: (killed.out / name).stat().st_ino for name in inodes} == inodes, "whole shards are kept"
    assert {path.name for path in killed.out.iterdir()} == {*contents(whole.out), "manifest.json", "provenance.json"}
    manifests = [json.loads((config.out / "manifest.json").read_text()) for config in (whole, killed)]
    assert manifests[0]["shards"] == manifests[1]["shards"]
    assert [shard["num_images"] for shard in manifests[0]["shards"]] == [6, 6, 6, 5]


def test_a_shard_that_was_cut_short_is_made_again(tiny_run, accelerator, tmp_path, monkeypatch):
    config = SampleConfig(tiny_run, tmp_path / "out", num_images=9, images_per_shard=3)
    with pytest.raises(Killed):
        sample_and_count(config, accelerator, monkeypatch, killed_after=8)
    before = contents(config.out)
    for damaged in (b"", before["rank-0000-000001.tar"][:3000]):
        copy = shutil.copytree(config.out, tmp_path / f"cut at {len(damaged)}")
        (copy / "rank-0000-000001.tar").write_bytes(damaged)
        assert sample_and_count(replace(config, out=copy), accelerator, monkeypatch) == 6
        assert len(read_samples(copy)) == 9
        assert before.items() <= contents(copy).items()


def test_the_beginning_of_another_set_is_not_continued(tiny_run, accelerator, tmp_path, monkeypatch):
    config = SampleConfig(tiny_run, tmp_path / "out", num_images=9, images_per_shard=3)
    with pytest.raises(Killed):
        sample_and_count(config, accelerator, monkeypatch, killed_after=5)
    before = contents(config.out)
    for name, value in {"seed": 1, "temperature": 0.5, "num_images": 10, "batch_size": 8}.items():
        field = "count" if name == "num_images" else name
        with pytest.raises(FileExistsError, match=f"beginning of another sample set .{field} was .*, now {value}"):
            sample(replace(config, **{name: value}), accelerator)
    (config.out / "request.json").unlink()
    with pytest.raises(FileExistsError, match=r"no request.json says what they are"):
        sample(config, accelerator)
    assert contents(config.out) == before


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares_make_up_the_whole(num_processes):
    shares = [RankShard(rank, num_processes, 23, batch_size=4, images_per_shard=5) for rank in range(num_processes)]
    assert sorted(index for share in shares for index in share.indices()) == list(range(23))
    assert shares[-1].indices()[:4] == list(range(4 * (num_processes - 1), 4 * num_processes))


def test_the_manifest_says_what_the_samples_are(tiny_run, accelerator, tmp_path):
    tiny_run = shutil.copytree(tiny_run, tmp_path / "run")
    config = SampleConfig(tiny_run, tmp_path / "a", num_images=5, prior="gaussian", temperature=0.7, seed=4)
    sample(config, accelerator)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    expected = {"prior": "gaussian", "temperature": 0.7, "seed": 4, "count": 5, "batch_size": 64}
    assert expected.items() <= manifest.items()
    assert "nearest of 256 levels" in manifest["pixels"]
    assert len(manifest["prior_sha256"]) == len(manifest["checkpoint_sha256"]) == 64
    assert manifest["prior_facts"]["checkpoint_sha256"] == manifest["checkpoint_sha256"]
    assert (
        tiny_run / "priors" / manifest["prior_facts"]["checkpoint"].split("/")[1] / "gaussian.safetensors"
    ).is_file()
    sample(SampleConfig(tiny_run, tmp_path / "b", num_images=5, seed=4), accelerator)
    assert not set(read_samples(tmp_path / "a").values()) & set(read_samples(tmp_path / "b").values())


def test_a_command_that_is_run_again_when_all_is_done_succeeds(tiny_run, accelerator, tmp_path, monkeypatch, capsys):
    tiny_run = shutil.copytree(tiny_run, tmp_path / "run")
    config = SampleConfig(tiny_run, tmp_path / "out", num_images=9, prior="gaussian")
    assert sample_and_count(config, accelerator, monkeypatch) == 9
    manifest = (config.out / "manifest.json").read_bytes()
    assert sample_and_count(config, accelerator, monkeypatch) == 0
    assert "already holds these 9 samples" in capsys.readouterr().out
    assert (config.out / "manifest.json").read_bytes() == manifest
    monkeypatch.setattr(sample_module, "fitted_prior", None)  # no prior is fitted for nothing
    with pytest.raises(FileExistsError, match=r"prior was gaussian, now gmm.*choose another --out"):
        sample(replace(config, prior="gmm"), accelerator)


def test_what_makes_no_sense_is_said_before_anything_is_loaded(capsys):
    asked = ("--run", "nowhere", "--out", "x", "--prior", "mean-code", "--temperature", 0.5)
    assert run_here("vaetrain/sample.py", *asked) == 2
    said = capsys.readouterr()
    assert "leave it at 1" in said.out + said.err


def test_images_are_encoded_as_they_are_and_in_order_while_the_next_are_drawn():
    drawn = []

    def blocks():
        for start in (0, 20, 40):
            drawn.append(start)
            yield range(start, start + 20), torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)

    for number, (indices, images, files) in enumerate(with_png(blocks())):
        assert drawn == [0, 20, 40][: number + 2]
        assert indices == range(20 * number, 20 * number + 20)
        assert list(files) == [png(image) for image in images]
    assert number == 2
    assert list(with_png(iter(()))) == []
