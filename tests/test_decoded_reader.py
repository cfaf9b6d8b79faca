"""The decoded reader's file: built once by whoever needs an image, kept, bounded, and never trusted half-written."""

import itertools
import json
import mmap
import os
import shutil
import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from together import succeed_together
from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers import decoded, decoded_file, decoding_rate
from vaetrain.data.readers.choose import choose_reader
from vaetrain.data.readers.decoded_file import DecodedFile, file_bytes
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader, open_split
from vaetrain.data.readers.selection import Selection
from vaetrain.distributed import processes

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "decoded"


def opened(shards, folder, split="train", reader="decoded", **options):
    config = DataConfig(train=str(shards), reader=reader, decoded_dir=folder, num_workers=0, **options)
    return closing(open_reader(config, split, device=CPU))


@pytest.fixture
def decodings(monkeypatch):
    """The positions that were decoded, in order."""
    done = []
    real = decoded.decode_image

    def noting(selection, encoded, position, out):
        done.append(position)
        real(selection, encoded, position, out=out)

    monkeypatch.setattr(decoded, "decode_image", noting)
    return done


def pixels_of(reader):
    return torch.cat([batch.images for batch in reader.eval_batches(8, 0, 1)])


def test_each_image_is_decoded_once_and_for_later_runs(tiny_shards, folder, decodings):
    with opened(tiny_shards, folder) as reader, opened(tiny_shards, folder, reader="indexed") as indexed:
        assert "0 there, the others decoded as they are read" in reader.description
        batches = list(itertools.islice(reader.train_batches(0, 0, BatchLayout(20, 10, 0, 1)), 20))
        assert sorted(decodings) == list(range(100)), "two epochs of 100"
        expected = itertools.islice(indexed.train_batches(0, 0, BatchLayout(20, 10, 0, 1)), 20)
        for batch, same in zip(batches, expected, strict=True):
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.indices, same.indices)
            assert batch.images.data_ptr() % mmap.PAGESIZE == 0, "copies to elsewhere in a page may be slow"
        pixels = pixels_of(indexed)
    assert [path.suffix for path in folder.iterdir() if path.name != ".lock"] == [".pixels"]
    decodings.clear()
    with opened(tiny_shards, folder) as reader:
        assert "all there" in reader.description
        assert torch.equal(pixels_of(reader), pixels)
        assert torch.equal(pixels_of(reader.subset(np.array([3, 50]))), pixels[[3, 50]])
    assert not decodings


def test_what_is_built_is_gone_on_with_in_this_boot_and_begun_anew_in_the_next(
    tiny_shards, folder, decodings, monkeypatch
):
    with opened(tiny_shards, folder) as reader:
        reader.first(30)
    decodings.clear()
    with opened(tiny_shards, folder) as first, opened(tiny_shards, folder) as second:
        assert "30 there" in first.description
        first.first(50)
        second.first(60)
        assert decodings == list(range(30, 60)), "what one has decoded the other finds"
    decodings.clear()
    monkeypatch.setattr(decoded_file, "process_space", lambda: "another boot")
    with opened(tiny_shards, folder) as reader:
        assert "(0 there" not in reader.description
        assert "0 there" in reader.description
        pixels_of(reader)
    assert decodings == list(range(100))
    assert len(list(folder.glob("*.part"))) == 0, "what the other boot left is deleted"


def test_threads_decode_ahead_what_this_process_trains_on_next(tiny_shards, folder, decodings):
    selection = Selection.of(ShardSet.open(tiny_shards), "train")
    reader = decoded.DecodedReader(
        selection, folder=folder, max_bytes=10**9, num_threads=2, device=CPU, reason="test", timeout_s=60.0
    )
    batches = reader.train_batches(0, 40, BatchLayout(20, 10, 0, 1))
    for thread in reader._builder._threads:
        thread.join(60)
    assert set(decodings) == set(range(100))
    count = len(decodings)
    assert count <= 104, "two threads may meet at an image"
    assert reader._file.is_whole
    ahead = np.concatenate([next(batches).indices for _ in range(6)]).tolist()  # what is left of this epoch
    assert sorted(decodings[:50]) != list(range(50)), "not in the order of the shards"
    assert len(set(decodings[:50]) & set(ahead)) >= 40, "two threads, each at most a batch beyond the order"
    assert len(decodings) == count
    reader.close()


def test_two_processes_that_want_the_same_decode_the_same(tiny_shards, folder):
    with opened(tiny_shards, folder) as first, opened(tiny_shards, folder) as second:
        found = {}
        threads = [
            threading.Thread(target=lambda name=name, reader=reader: found.update({name: pixels_of(reader)}))
            for name, reader in (("first", first), ("second", second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        with opened(tiny_shards, folder, reader="indexed") as indexed:
            assert torch.equal(found["first"], pixels_of(indexed))
        assert torch.equal(found["first"], found["second"])


def read_an_epoch_together(shards, folder, out):
    """What this process reads of an epoch and of a pass, what it decoded for that, and its reader's line. A collective."""
    accelerator = processes.start()
    with processes.finishing(accelerator):
        rank, done = accelerator.process_index, []
        real = decoded.decode_image
        decoded.decode_image = lambda selection, encoded, at, out: (
            done.append(at),
            real(selection, encoded, at, out=out),
        )
        config = DataConfig(train=str(shards), reader="decoded", decoded_dir=folder, num_workers=0)
        with closing(open_split(config, accelerator, "train")) as reader:
            accelerator.wait_for_everyone()
            batches = list(itertools.islice(reader.train_batches(3, 0, BatchLayout(20, 10, rank, 2)), 5))
            accelerator.wait_for_everyone()
            batches += reader.eval_batches(8, rank, 2)
            tensors = {
                name: torch.cat([getattr(batch, name) for batch in batches]).contiguous()
                for name in ("images", "indices")
            }
            save_file(tensors, out / f"{rank}.safetensors")
            (out / f"{rank}.json").write_text(json.dumps([done, reader.description]))


def test_two_processes_build_one_file_and_a_second_start_finds_it(tiny_shards, folder, tmp_path):
    succeed_together(read_an_epoch_together, tiny_shards, folder, tmp_path)
    shares = [json.loads((tmp_path / f"{rank}.json").read_text())[0] for rank in range(2)]
    assert [len(share) for share in shares] == [50, 50], "each decodes what it trains on"
    assert sorted(itertools.chain(*shares)) == list(range(100)), "and finds what the other has decoded"
    (whole,) = folder.glob("*.p*")
    written = whole.stat()
    assert (whole.suffix, written.st_size) == (".pixels", 100 * (16 * 16 * 3 + 1))

    succeed_together(read_an_epoch_together, tiny_shards, folder, tmp_path)
    assert whole.stat().st_ino == written.st_ino
    seen = []
    with opened(tiny_shards, folder, reader="resident") as resident:
        for rank in range(2):
            done, description = json.loads((tmp_path / f"{rank}.json").read_text())
            assert not done
            assert "all there" in description
            expected = list(itertools.islice(resident.train_batches(3, 0, BatchLayout(20, 10, rank, 2)), 5))
            expected += resident.eval_batches(8, rank, 2)
            read = load_file(tmp_path / f"{rank}.safetensors")
            assert torch.equal(read["indices"], torch.cat([batch.indices for batch in expected]))
            assert torch.equal(read["images"], torch.cat([batch.images for batch in expected]))
            seen += read["indices"][50:].tolist()
    assert sorted(seen) == list(range(100)), "each image of the split counts once"


def test_the_folder_is_bounded_and_what_is_in_use_stays(tiny_shards, folder):
    config = DataConfig(train=str(tiny_shards))
    sets = {name: Selection.of(ShardSet.open(tiny_shards), name, config.classes) for name in ("train", "val")}
    train_bytes, val_bytes = (file_bytes(selection) for selection in sets.values())
    train = DecodedFile(sets["train"], folder, train_bytes)
    with pytest.raises(ValueError, match=r"no room for 0\.00 GiB within --data\.decoded-gib"):
        DecodedFile(sets["val"], folder, train_bytes)
    val = DecodedFile(sets["val"], folder, train_bytes + val_bytes)
    train.close()
    val.close()
    val._part.unlink()
    DecodedFile(sets["val"], folder, val_bytes).close()
    assert [path.stat().st_size for path in folder.glob("*.part")] == [val_bytes]
    with pytest.raises(ValueError, match=r"and --data\.decoded-gib is"):
        DecodedFile(sets["train"], folder, train_bytes - 1)
    (folder / ".lock").unlink()
    stranger = folder.with_name("link")
    stranger.symlink_to(folder)
    with pytest.raises(ValueError, match="another user's, or a link"):
        DecodedFile(sets["val"], stranger, val_bytes)


def test_other_images_other_files(tiny_shards, folder):
    manifest = ShardSet.open(tiny_shards).manifest
    with opened(tiny_shards, folder) as whole, opened(tiny_shards, folder, classes=(manifest.classes[1],)) as part:
        assert len(list(folder.glob("*.part"))) == 2
        assert torch.equal(pixels_of(part), pixels_of(whole)[[int(label) == 1 for label in whole._labels]])
    with opened(tiny_shards, folder, resize="shorter-side", image_size=8) as small:
        assert small.first(1).images.shape == (1, 3, 8, 8)


def test_auto_chooses_it_where_decoding_would_starve_a_gpu(tiny_shards, folder):
    selection = Selection.of(ShardSet.open(tiny_shards), "train")
    config = DataConfig(train=str(tiny_shards), resident_gib=0.0, decoded_dir=folder)

    def chosen(rate=5000.4, config=config, others=()):
        measured = None if rate is None else lambda: rate
        gather = (lambda mine: [*others, mine]) if others else None
        return choose_reader(config, selection, remote=False, decoding_rate=measured, gather=gather)

    name, reason = chosen()
    assert name == "decoded"
    assert reason == (
        "--data.reader auto, 0.00 GiB decoded, over --data.resident-gib 0, measured: the workers of a GPU decode 5,000 images/s, "
        "and it may ask for 1,280,000"
    )
    assert chosen(rate=None)[0] == "indexed"
    assert chosen(rate=2e6)[0] == "indexed"
    assert chosen(rate=2e6, others=[[7, 1]]) == ("decoded", reason.replace("5,000", "7")), "the slowest decides for all"
    name, reason = chosen(others=[[9000, 0]])
    assert name == "indexed"
    assert reason.endswith("and decoded on disk it is more than is free on the node of process 0")
    name, reason = chosen(config=replace(config, decoded_gib=0.0))
    assert name == "indexed"
    assert reason.endswith("and decoded on disk it is over --data.decoded-gib 0")
    on_gpu = open_reader(
        replace(config, num_workers=1), "train", device=torch.device("cuda"), gather=lambda mine: [mine]
    )
    with closing(on_gpu):
        assert on_gpu.description.startswith("decoded (--data.reader auto")
        assert "measured: the workers of a GPU decode" in on_gpu.description


def test_the_rate_of_decoding_is_measured_on_images_from_all_over_the_set(tiny_shards, monkeypatch):
    selection = Selection.of(ShardSet.open(tiny_shards), "train")
    seconds, positions = itertools.count(0.0, 0.03), []

    def decode(selection, encoded, position, out):
        positions.append(position)
        if position == 2:
            raise ValueError("damaged")

    monkeypatch.setattr(decoding_rate, "decode_image", decode)
    monkeypatch.setattr(decoding_rate, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(decoding_rate, "MOST_IMAGES", 5)
    assert decoding_rate.decoding_rate(selection, 3, 60.0) == pytest.approx(3 / 0.03)
    assert positions == [0, 0, 24, 49, 74, 99]
    monkeypatch.setattr(decoding_rate, "MOST_IMAGES", 1000)
    del positions[:]
    assert decoding_rate.decoding_rate(selection, 0, 60.0) == pytest.approx(1 / 0.03)
    assert positions == [0, *range(9)], "no longer than a quarter of a second, and a damaged image does not end it"


def test_a_folder_of_a_recorded_run_is_written_to_only_if_it_is_one_already(tmp_path):
    config = DataConfig(train="x", decoded_dir=tmp_path)
    assert config.as_recorded().decoded_dir is None
    (tmp_path / ".lock").touch()
    assert config.as_recorded().decoded_dir == tmp_path


def test_a_disk_without_room_is_a_message(tiny_shards, folder, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(decoded_file.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="No space left on device; free some space"), opened(tiny_shards, folder):
        pass
    assert not list(folder.glob("*.part"))
    shutil.rmtree(folder)
