import itertools
import multiprocessing
import shutil
import tarfile
import tempfile
import threading
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaetrain.data.config import DataConfig
from vaetrain.data.format.shard_set import ShardSet
from vaetrain.data.readers import stream
from vaetrain.data.readers.batch import batch_buffer
from vaetrain.data.readers.order import BatchLayout, train_indices
from vaetrain.data.readers.reader import open_reader

CPU = torch.device("cpu")
KINDS = ("indexed", "resident", "stream", "decoded")
# A worker is slow to start, so tests with workers are few; stream and indexed differ in what a worker does.
KINDS_WITH_WORKERS = [
    ("resident", 0),
    ("decoded", 0),
    ("decoded", 2),
    ("indexed", 0),
    ("indexed", 2),
    ("stream", 0),
    ("stream", 2),
]


@pytest.fixture(autouse=True)
def folder_of_decoded(tmp_path, monkeypatch):
    """Where the decoded reader keeps its files, unless told."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def opened(shards, kind, split="train", **options):
    return closing(open_reader(DataConfig(train=str(shards), reader=kind, **options), split, device=CPU))


def originals(shards, split):
    """What Pillow makes of every sample: (c, h, w) uint8 arrays and labels by position in the split."""
    shard_set = ShardSet.open(shards)
    index = shard_set.index(split)
    images = []
    for shard in shard_set.manifest.splits[split].shards:
        with tarfile.open(shard_set.path(shard)) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    pixels = np.asarray(Image.open(tar.extractfile(member)))
                    images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return np.stack(images), index.label


def indices_of(batches):
    return [batch.indices.tolist() for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["tiny_shards", "tiny_gray_shards"])
def test_batches_hold_the_pixels_and_labels_of_the_samples(shards, kind, request):
    shards = request.getfixturevalue(shards)
    images, labels = originals(shards, "train")
    with opened(shards, kind) as reader:
        assert reader.num_images == len(images)
        trained = itertools.islice(reader.train_batches(0, 0, BatchLayout(16, 8, 0, 1)), 20)
        for batch in itertools.chain(trained, reader.eval_batches(7, 0, 1), [reader.first(5)]):
            assert np.array_equal(batch.images, images[batch.indices.numpy()])
            assert np.array_equal(batch.labels, labels[batch.indices.numpy()])
        assert reader.first(5).indices.tolist() == [0, 1, 2, 3, 4]
        assert len(reader.first(1000).indices) == reader.num_images


def test_the_memory_of_a_batch_is_used_again_once_nobody_holds_it():
    shape = (3, 5, 7, 1)
    first = torch.from_numpy(batch_buffer(shape)).permute(0, 3, 1, 2)
    held = torch.from_numpy(batch_buffer(shape))
    assert held.data_ptr() != first.data_ptr()
    address, view = first.data_ptr(), first[1:]
    del first
    assert torch.from_numpy(batch_buffer(shape)).data_ptr() not in (address, held.data_ptr()), "a view holds it still"
    del view
    assert torch.from_numpy(batch_buffer(shape)).data_ptr() == address


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("resident", 0), ("indexed", 0), ("indexed", 2), ("decoded", 0), ("decoded", 2)]
)
def test_training_follows_the_order_for_any_number_of_workers(tiny_shards, kind, num_workers):
    layout = BatchLayout(32, 8, 1, 2)
    with opened(tiny_shards, kind, num_workers=num_workers) as reader:
        read = itertools.islice(reader.train_batches(3, 64, layout), 20)
        expected = itertools.islice(train_indices(reader.num_images, 3, 64, layout), 20)
        assert indices_of(read) == [indices.tolist() for indices in expected]


@pytest.mark.parametrize(
    ("kind", "num_workers", "batch_size"),
    [(kind, 0, batch_size) for kind in KINDS for batch_size in (5, 8, 23, 100)] + [("indexed", 2, 5), ("stream", 2, 8)],
)
def test_evaluation_reads_every_image_once(tiny_shards, kind, num_workers, batch_size):
    with opened(tiny_shards, kind, "val", num_workers=num_workers) as reader:
        for num_processes in (1, 2):
            ranks = [indices_of(reader.eval_batches(batch_size, rank, num_processes)) for rank in range(num_processes)]
            blocks = [block for rank in ranks for block in rank]
            assert sorted(itertools.chain(*blocks)) == list(range(23))
            assert all(block == list(range(block[0], block[0] + len(block))) for block in blocks)
            # A second pass, by the same workers, is the same.
            assert indices_of(reader.eval_batches(batch_size, 0, num_processes)) == ranks[0]


def streamed(reader, monkeypatch, seed, images_seen, layout, num_workers):
    """A process's batches as DataLoader collects them from `num_workers` workers in turn, without starting any."""
    workers = []
    for worker in range(num_workers):
        monkeypatch.setattr(stream, "_worker", lambda worker=worker: (worker, num_workers))
        workers.append(iter(stream._TrainBatches(reader._stream, seed, images_seen, layout)))
        workers[-1] = itertools.chain([next(workers[-1])], workers[-1])
    return (next(worker) for worker in itertools.cycle(workers))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    micro=st.integers(1, 5),
    accum=st.integers(1, 2),
    num_processes=st.integers(1, 3),
    num_workers=st.integers(1, 4),
    seed=st.integers(0, 9),
    step=st.integers(0, 9),
)
def test_streaming_reads_an_epoch_once_and_resumes(
    tiny_shards, monkeypatch, micro, accum, num_processes, num_workers, seed, step
):
    size = micro * accum * num_processes
    with opened(tiny_shards, "stream") as reader:
        layouts = [BatchLayout(size, micro, rank, num_processes) for rank in range(num_processes)]
        per_epoch = layouts[0].images_per_epoch(reader.num_images)
        per_rank = per_epoch // num_processes // micro
        ranks = [
            list(itertools.islice(streamed(reader, monkeypatch, seed, 0, layout, num_workers), 2 * per_rank))
            for layout in layouts
        ]
        for epoch in range(2):
            part = slice(epoch * per_rank, (epoch + 1) * per_rank)
            read = np.concatenate([batch.indices for rank in ranks for batch in rank[part]])
            assert len(read) == len(set(read.tolist())) == per_epoch
        done = step * accum
        resumed = streamed(reader, monkeypatch, seed, step * size, layouts[-1], num_workers)
        count = min(4, 2 * per_rank - done)
        assert indices_of(itertools.islice(resumed, max(0, count))) == indices_of(ranks[-1][done:][:4])


def test_streaming_with_worker_processes_is_what_the_workers_read(tiny_shards, monkeypatch):
    layout = BatchLayout(16, 8, 1, 2)
    with opened(tiny_shards, "stream", num_workers=2) as reader:
        read = indices_of(itertools.islice(reader.train_batches(0, 16, layout), 20))
        assert read == indices_of(itertools.islice(streamed(reader, monkeypatch, 0, 16, layout, 2), 20))


def test_streaming_shuffles_shards_and_images_anew_each_epoch(tiny_shards):
    layout = BatchLayout(25, 25, 0, 1)
    with opened(tiny_shards, "stream") as reader:
        epochs = np.reshape(indices_of(itertools.islice(reader.train_batches(0, 0, layout), 12)), (3, -1))
        assert not np.array_equal(epochs[0], epochs[1])
        for order in epochs:
            # In sequence, nine of ten neighbours would be neighbours in the shards.
            assert np.mean(np.diff(order) == 1) < 0.2


def test_streaming_drops_images_from_either_end_of_an_epoch(tiny_shards):
    # 23 images in two shards. Dropping at one end would spare the first five of each for ever.
    with opened(tiny_shards, "stream", "val") as reader:
        batches = itertools.islice(reader.train_batches(0, 0, BatchLayout(16, 16, 0, 1)), 20)
        dropped = [set(range(23)) - set(indices) for indices in indices_of(batches)]
        assert all(len(images) == 7 for images in dropped)
        assert set.union(*dropped) == set(range(23))


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_filter_keeps_one_class_under_its_own_label(tiny_shards, kind):
    manifest = ShardSet.open(tiny_shards).manifest
    images, labels = originals(tiny_shards, "train")
    wanted = np.flatnonzero(labels == 1)
    with opened(tiny_shards, kind, classes=(manifest.classes[1],)) as reader:
        assert reader.num_images == len(wanted) == manifest.splits["train"].class_counts[manifest.classes[1]]
        for batch in reader.eval_batches(10, 0, 1):
            assert set(batch.labels.tolist()) == {1}
            assert np.array_equal(batch.images, images[wanted[batch.indices.numpy()]])


def test_an_unknown_class_and_a_missing_split_are_refused(tiny_shards, tiny_gray_shards):
    with (
        pytest.raises(ValueError, match=r"--data.classes unicorn: .* has "),
        opened(tiny_shards, "indexed", classes=("unicorn",)),
    ):
        pass
    with pytest.raises(ValueError, match=r"no (val split|split val)"), opened(tiny_gray_shards, "indexed", "val"):
        pass


@pytest.mark.parametrize(("kind", "num_workers"), KINDS_WITH_WORKERS)
def test_a_damaged_sample_stops_the_main_process_naming_it(damaged_shards, kind, num_workers):
    folder, name = damaged_shards(0)
    with (
        pytest.raises(ValueError, match=rf"^{name} in .*damaged, sample 0 .*verify_shards"),
        opened(folder, kind, num_workers=num_workers) as reader,
    ):
        list(reader.eval_batches(8, 0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_full_verification_finds_damage_before_training(damaged_shards, kind):
    folder, name = damaged_shards(0)
    with pytest.raises(ValueError, match=rf"{name} has another SHA-256"), opened(folder, kind, verify="full"):
        pass
    # The other split is another reader's to verify.
    with opened(folder, kind, "val", verify="full") as reader:
        assert reader.num_images == 23


def test_processes_share_a_full_verification(damaged_shards):
    folder, name = damaged_shards(50)
    shards = [shard.name for shard in ShardSet.open(folder).manifest.splits["train"].shards]
    config, responsible = DataConfig(train=str(folder), reader="indexed", verify="full"), shards.index(name) % 4
    for rank in range(4):
        expected = pytest.raises(ValueError, match=name) if rank == responsible else nullcontext()
        with expected:
            open_reader(config, "train", device=CPU, rank=rank, num_processes=4).close()


def test_full_verification_of_a_url_is_refused():
    with (
        pytest.raises(ValueError, match=r"give --data\.cache-dir, .* use --data\.verify sizes"),
        opened("http://127.0.0.1/x", "auto", verify="full"),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_cut_short_is_refused_before_training(tiny_shards, tmp_path, kind):
    folder = shutil.copytree(tiny_shards, tmp_path / "short")
    shard = ShardSet.open(folder).manifest.splits["train"].shards[0]
    (folder / shard.name).write_bytes((folder / shard.name).read_bytes()[:-10240])
    with pytest.raises(ValueError, match=shard.name), opened(folder, kind):
        pass


@contextmanager
def served(folder):
    """The URL of a web server that serves `folder` from this process."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", ["", "/", "/manifest.json"])
def test_a_url_streams_what_the_folder_does(tiny_shards, name):
    layout = BatchLayout(32, 16, 0, 1)
    with served(tiny_shards) as url, opened(url + name, "auto") as remote, opened(tiny_shards, "stream") as local:
        assert url in remote.description
        assert remote.manifest == local.manifest
        for there, here in itertools.islice(
            zip(remote.train_batches(0, 32, layout), local.train_batches(0, 32, layout), strict=True), 12
        ):
            assert torch.equal(there.images, here.images)
            assert torch.equal(there.indices, here.indices)


@pytest.mark.parametrize("past_header", [0, 600])
def test_a_shard_that_is_shorter_on_the_server_raises_naming_it(tiny_shards, tmp_path, past_header):
    folder = shutil.copytree(tiny_shards, tmp_path / "short")
    shard_set = ShardSet.open(folder)
    shard = shard_set.manifest.splits["train"].shards[0]
    # A tar cut just before the header of its second image looks like a whole one with a single image.
    second_header = int(shard_set.index("train").offset[1]) - 512
    shard_set.path(shard).write_bytes(shard_set.path(shard).read_bytes()[: second_header + past_header])
    with (
        served(folder) as url,
        opened(url, "stream") as reader,
        pytest.raises(
            ValueError, match=rf"{shard.name} in {url}.*sample 0 .*has {second_header + past_header:,} bytes"
        ),
    ):
        list(reader.eval_batches(8, 0, 1))


def test_a_url_without_a_shard_set_is_reported(tmp_path):
    with (
        served(tmp_path) as url,
        pytest.raises(FileNotFoundError, match=r"no shard set at http.*manifest\.json"),
        opened(url, "auto"),
    ):
        pass


@pytest.mark.parametrize("location", ["pipe:cat {}", "PIPE:ls"])
@pytest.mark.parametrize("kind", ["auto", "stream", "indexed"])
def test_schemes_that_would_run_a_command_are_refused(location, kind):
    with pytest.raises(ValueError, match="would run a shell command, which vaetrain does not"), opened(location, kind):
        pass


@pytest.mark.parametrize("kind", ["indexed", "resident"])
def test_random_access_to_a_url_is_refused(kind):
    with (
        pytest.raises(ValueError, match=rf"--data.reader {kind} needs local shards"),
        opened("http://127.0.0.1/x", kind),
    ):
        pass


def test_auto_keeps_what_fits_and_says_why(tiny_shards):
    with opened(tiny_shards, "auto") as reader:
        assert reader.description.startswith("resident on cpu (--data.reader auto")
        assert "100 images" in reader.description
    with opened(tiny_shards, "auto", resident_gib=1e-6) as reader:
        assert reader.description.startswith("indexed (--data.reader auto")
        assert "over --data.resident-gib" in reader.description


def test_val_may_lie_in_another_shard_set(tiny_shards, tiny_gray_shards):
    config = DataConfig(train=str(tiny_gray_shards), val=str(tiny_shards), reader="indexed")
    assert open_reader(config, "val", device=CPU).num_images == 23
    assert open_reader(config, "train", device=CPU).manifest.channels == 1


@pytest.mark.parametrize("kind", KINDS)
def test_reading_leaves_the_global_random_state_alone(tiny_shards, kind):
    before = torch.get_rng_state()
    with opened(tiny_shards, kind) as reader:
        next(reader.train_batches(0, 0, BatchLayout(16, 8, 0, 1)))
        list(reader.eval_batches(8, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_positions_and_small_splits_are_refused_when_asked(tiny_shards, kind):
    with opened(tiny_shards, kind) as reader:
        with pytest.raises(ValueError, match="48 images"):
            reader.train_batches(0, 48, BatchLayout(32, 32, 0, 1))
        with pytest.raises(ValueError, match="at most 100"):
            reader.train_batches(0, 0, BatchLayout(128, 32, 0, 1))


def test_closing_ends_the_workers_and_the_running_pass(tiny_shards):
    with opened(tiny_shards, "indexed", num_workers=2) as reader:
        batches = reader.train_batches(0, 0, BatchLayout(16, 8, 0, 1))
        list(reader.eval_batches(8, 0, 1))
        next(batches)
        assert len(multiprocessing.active_children()) == 4
        reader.close()
        assert multiprocessing.active_children() == []
        with pytest.raises(StopIteration):
            next(batches)
