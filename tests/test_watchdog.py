"""A process that dies, raises or hangs: all end in time, one message names it."""

import contextlib
import json
import os
import re
import threading
import time
from dataclasses import asdict, replace

import pytest
from torch.distributed import DistNetworkError, HashStore

import vaetrain.distributed.stacks
import vaetrain.distributed.watchdog
from fault_scenarios import STEP, train_together
from launching import TINY
from vaetrain.distributed.watchdog import Heartbeat, Position, ProcessStatus, Watchdog


@pytest.fixture
def fail_together(tiny_shards, tmp_path):
    """Two processes train until the fault; both must end by themselves, unsuccessfully, and one of them speak."""

    def run(fault, *arguments):
        # No validation before the fault: it draws pictures, which on a busy machine takes longer than the shortest patience.
        own = (
            "--data.train",
            tiny_shards,
            "--train.epochs",
            3,
            "--train.val-every-epochs",
            3,
            "--run-dir",
            tmp_path / "run",
        )
        outcome = train_together(tmp_path / "out", fault, *TINY, *own, *arguments)
        assert 0 not in outcome.exit_codes
        said = [
            line for text in outcome.printed for line in text.splitlines() if re.search(r"^error:|^\w*Error:", line)
        ]
        assert len(said) == 1, "\n".join(outcome.printed)
        return outcome, said[0]

    return run


def test_a_killed_process_is_named_by_the_other(fail_together):
    outcome, said = fail_together("killed")
    assert re.match(
        rf"error: rank 1 \(\S+, pid {outcome.pids[1]}\) of 2 processes died without a word, last heard of (starting|at step)",
        said,
    )
    assert "killed, by a signal" in said
    assert outcome.exit_codes == [1, -9]
    assert "Traceback" not in outcome.printed[0]


def test_only_the_process_that_raises_speaks(fail_together):
    outcome, said = fail_together("raises")
    assert said == "AssertionError: the moon is in the wrong phase"
    assert "rank 1 (" in outcome.printed[1]
    assert f"pid {outcome.pids[1]}) of 2 processes" in outcome.printed[1]
    assert "Traceback" not in outcome.printed[0]


def test_a_process_that_waits_for_ever_is_named_with_the_place(fail_together, tmp_path):
    outcome, said = fail_together("blocks", "--train.timeout-s", 5)
    assert "no progress for 5 s" in said
    who = rf"Furthest behind: rank 1 \(\S+, pid {outcome.pids[1]}\) at step {STEP}, waiting for data \(fault_scenarios\.py:\d+\)\."
    assert re.search(who, said)
    assert "in blocking" in (tmp_path / "run" / "hang-rank-1.txt").read_text()
    assert "run_backward" in (tmp_path / "run" / "hang-rank-0.txt").read_text()


def test_a_stopped_process_is_named_by_the_other_and_ends_too(fail_together):
    outcome, said = fail_together("stopped", "--train.timeout-s", 6)
    assert re.search(
        rf"not even answering \(stopped, .*\): rank 1 \(\S+, pid {outcome.pids[1]}\) (starting|at step)", said
    )
    assert outcome.exit_codes == [1, 1]


class Left(Exception):
    pass


def alone(heartbeat, folder, **options):
    return Watchdog(heartbeat, rank=0, num_processes=1, store=None, folder=folder, timeout_s=0.6, **options)


@pytest.fixture
def ends(monkeypatch):
    """Set when a watchdog would have ended the process."""
    ended = threading.Event()

    def note(watchdog, *, after=None):
        ended.set()
        raise Left

    monkeypatch.setattr(Watchdog, "_leave", note)
    monkeypatch.setattr("vaetrain.distributed.watchdog.SECONDS_BETWEEN_LOOKS", 0.05)
    original = Watchdog._watch

    def watch(watchdog):
        with contextlib.suppress(Left):
            original(watchdog)

    monkeypatch.setattr(Watchdog, "_watch", watch)
    return ended


def test_one_process_alone_is_watched_too(ends, tmp_path, capsys):
    heartbeat = Heartbeat()
    with alone(heartbeat, tmp_path):
        heartbeat.begin(17)
        heartbeat.enter("waiting for data")
        assert ends.wait(120)
    assert re.search(
        r"no progress for 0\.6 s.*step 17, waiting for data \(threading\.py:\d+\)", capsys.readouterr().err
    )


@pytest.mark.parametrize("answers", ["with an error", "never"])
def test_a_hang_ends_though_its_stacks_cannot_be_written(ends, tmp_path, capsys, monkeypatch, answers):
    """A full disk raises, a dead file server blocks for ever."""
    monkeypatch.setattr(vaetrain.distributed.stacks.write_stacks, "__defaults__", (0.2,))
    answer = threading.Event()
    if answers == "never":
        monkeypatch.setattr(vaetrain.distributed.stacks, "replace_file", lambda *_: answer.wait(120))
    else:
        (tmp_path / "hang-rank-0.txt").mkdir()
    heartbeat = Heartbeat()
    with alone(heartbeat, tmp_path):
        heartbeat.begin(17)
        assert ends.wait(120)
    answer.set()
    said = capsys.readouterr().err
    assert "error: no progress for 0.6 s" in said
    assert re.search(r"warning: rank 0 could not write its stacks to .*hang-rank-0\.txt: (no answer|.*Is a dir)", said)


def test_a_start_that_hangs_is_ended_and_named(ends, tmp_path, capsys):
    heartbeat = Heartbeat()
    heartbeat.enter("starting: opening the data")
    with alone(heartbeat, tmp_path, start_timeout_s=1.2):
        assert ends.wait(120)
    said = capsys.readouterr().err
    # The time of a step, 0.6 s, does not count yet.
    assert re.search(r"no progress for 1\.2 s.*rank 0 \(.*starting: opening the data \(threading\.py:\d+\)", said)
    assert "--train.start-timeout-s sets the time" in said


class LostStore(HashStore):
    """A key-value store whose host goes away."""

    lost = False

    def set(self, key, value):
        if self.lost:
            raise DistNetworkError("Connection reset by peer")
        super().set(key, value)


def test_a_process_that_has_lost_the_store_still_watches_itself(ends, tmp_path, capsys):
    """The host of rank 0 is gone: nobody tells, and what waits for it would wait for ever."""
    store, heartbeat = LostStore(), Heartbeat()
    elsewhere = ProcessStatus(0, "another", "far-away", 1, 17, 3, "forward", "x.py:1", 1, 1, False)
    store.set("vaetrain/report/0", json.dumps(asdict(elsewhere)))
    with Watchdog(heartbeat, rank=1, num_processes=2, store=store, folder=tmp_path, timeout_s=0.6):
        store.lost = True  # before the first step, which alone has so short a time
        heartbeat.begin(17)
        assert ends.wait(120)
    warning, error, *_ = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: rank 1: the store on far-away, the host of rank 0")
    assert re.search(r"no progress for 0\.6 s.*rank 1 \(.*at step 17.*; the store on far-away", error)


def test_who_waits_for_another_is_not_to_blame(ends, tmp_path, capsys):
    """The main process draws, at the same place as the others, who wait for it."""
    store, heartbeat = HashStore(), Heartbeat()
    here = vaetrain.distributed.watchdog.machine()
    for rank, where in ((0, "figures.py:9"), (2, "exchange.py:108")):
        report = ProcessStatus(rank, here, "host", os.getpid(), 17, 1, "checkpoint and figures", where, 1, 1, False)
        store.set(f"vaetrain/report/{rank}", json.dumps(asdict(report)))
    watchdog = Watchdog(heartbeat, rank=1, num_processes=3, store=store, folder=tmp_path, timeout_s=600.0)
    heartbeat.begin(17)
    heartbeat.enter("checkpoint and figures")
    watchdog._exchange()
    watchdog._reports[1] = replace(watchdog._reports[1], where="exchange.py:108")
    said = watchdog._who_hangs(600.0)
    assert re.search(
        r"Furthest behind: rank 0 \(host, pid \d+\) at step 17, checkpoint and figures \(figures\.py:9\)\.", said
    )
    watchdog._reports[0] = replace(watchdog._reports[0], where="exchange.py:108")
    assert "rank 0 (" in (said := watchdog._who_hangs(600.0)), "somebody is named though all wait"
    assert "rank 2 (" in said


@pytest.mark.parametrize(
    "what", ["before the first step", "in a long validation", "in the first step of a compiled model"]
)
def test_what_takes_long_by_right_is_no_hang(ends, tmp_path, what):
    heartbeat = Heartbeat()
    with alone(heartbeat, tmp_path, first_step_s=100.0 if "compiled" in what else 0.0):
        if what != "before the first step":
            heartbeat.begin(0)
            heartbeat.enter("validation")
        for _ in heartbeat.each(range(12)) if "validation" in what else range(12):
            time.sleep(0.1)
    assert not ends.is_set()


def test_patience_with_a_compiled_model_is_for_its_first_step_alone(ends, tmp_path):
    heartbeat = Heartbeat()
    with alone(heartbeat, tmp_path, first_step_s=100.0):
        heartbeat.begin(5)
        time.sleep(0.3)
        heartbeat.begin(6)
        assert ends.wait(120)


def test_a_run_that_was_suspended_is_not_ended_when_it_goes_on(tmp_path, monkeypatch):
    """Slurm suspends jobs, and people press Ctrl-Z."""
    seconds = [0.0]
    monkeypatch.setattr("vaetrain.distributed.watchdog.time.monotonic", lambda: seconds[0])
    monkeypatch.setattr(Watchdog, "_leave", lambda *_, **__: (_ for _ in ()).throw(Left))
    heartbeat = Heartbeat()
    watchdog = Watchdog(heartbeat, rank=0, num_processes=1, store=None, folder=tmp_path, timeout_s=60.0)
    heartbeat.begin(0)
    for pause in (1, 100_000, 1):
        seconds[0] += pause
        watchdog._look()

    def look_for_a_while():
        for _ in range(70):
            seconds[0] += 1
            watchdog._look()

    with pytest.raises(Left):
        look_for_a_while()
    assert seconds[0] == pytest.approx(100_062, abs=3)


def test_places_are_in_the_order_of_the_loop():
    heartbeat = Heartbeat()
    places = [heartbeat.place]
    for step in range(2):
        heartbeat.begin(step)
        places.append(heartbeat.place)
        for phase in ("waiting for data", "forward", "backward"):
            heartbeat.enter(phase)
            places.append(heartbeat.place)
    assert places == sorted(places)
    assert places[-1] == Position(1, 3, "backward")
