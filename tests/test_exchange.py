"""Processes wait for each other with the user's time and a message, and in no collective."""

import ast
import threading
import time
from unittest.mock import patch

import pytest
from torch.distributed import HashStore

import vaetrain.train
from launching import ROOT, TINY
from together import run_together, succeed_together
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.distributed import exchange, processes
from vaetrain.distributed.exchange import MeetingPlace, Patience, WaitedTooLong
from vaetrain.distributed.watchdog import FIRST_STEP_S, longest_wait_s
from vaetrain.evaluate import main as evaluate
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.sample import SampleConfig, sample
from vaetrain.sample import main as sample_main
from vaetrain.train import train
from vaetrain.training.checkpoint import Checkpoints
from vaetrain.training.figures import RunFigures


def test_nobody_goes_on_before_all_have_come():
    store, places, log, lock = HashStore(), [], [], threading.Lock()
    for rank in range(3):
        places.append(MeetingPlace(store, rank, 3))

    def come(place):
        for number in range(20):
            with lock:
                log.append(("comes", number))
            place.meet("the others", Patience(60.0))
            with lock:
                log.append(("goes on", number))

    threads = [threading.Thread(target=come, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(20):
        last_comes = max(place for place, entry in enumerate(log) if entry == ("comes", number))
        assert last_comes < log.index(("goes on", number))
    assert len(log) == 2 * 20 * 3


def test_who_waits_too_long_says_for_what_and_for_whom():
    store = HashStore()
    first, second = MeetingPlace(store, 0, 40), MeetingPlace(store, 33, 40)
    with pytest.raises(WaitedTooLong) as error:
        first.meet("the main process to fit prior flow", Patience(0.05, "--timeout-s"))
    assert str(error.value) == (
        "waited 0.05 s (--timeout-s) for the main process to fit prior flow; missing: rank 1, 2, 3, 4, 5, 6, 7, 8 and 31 more"
    )
    with pytest.raises(WaitedTooLong, match=r"^waited 0 s for it; missing: rank 1, .* and 30 more"):
        second.meet("it", Patience(0.0))
    assert isinstance(error.value, OSError), "commands print such an error without a traceback"


def main_is_slow():
    """Rank 0 takes its time to decide; rank 1 enters no collective before it has."""
    accelerator = processes.start(timeout_s=60.0)
    store = exchange.shared_store()
    broadcast = exchange.broadcast_object_list

    def broadcast_in_time(objects):
        assert store.check(["decided"]), "a collective was entered while the main process worked"
        return broadcast(objects)

    def decide():
        time.sleep(0.5)
        store.set("decided", "")
        return [1, 2]

    with processes.finishing(accelerator), patch.object(exchange, "broadcast_object_list", broadcast_in_time):
        print(exchange.decided_by_main(accelerator, decide, "decide"))
        with pytest.raises(ZeroDivisionError):
            exchange.decided_by_main(accelerator, lambda: 1 / 0, "divide")


def test_work_of_the_main_process_is_awaited_outside_of_collectives():
    assert succeed_together(main_is_slow) == "[1, 2]\n[1, 2]\n"


def main_is_too_slow():
    accelerator = processes.start(timeout_s=1.0, timeout_option="--timeout-s")
    store = exchange.shared_store()
    if not accelerator.is_main_process:
        with pytest.raises(WaitedTooLong) as error:
            exchange.decided_by_main(accelerator, lambda: None, "read the news")
        print(error.value, flush=True)
        store.set("gave up", "")
    else:
        for _ in range(1200):
            if store.check(["gave up"]):
                break
            time.sleep(0.05)


def test_the_users_time_is_the_time():
    outcome = run_together(main_is_too_slow)
    assert outcome.printed[1].splitlines()[0] == (
        "waited 1 s (--timeout-s) for the main process to read the news; missing: rank 0"
    )


def time_given(main, config):
    """The seconds that a command starts with, and the option it names."""

    class Started(Exception):
        pass

    given = []

    def join(timeout_s, timeout_option=""):
        given.append((timeout_s, timeout_option))
        raise Started

    with patch.object(processes, "join", join), pytest.raises(Started):
        main(config)
    return given[0]


@pytest.mark.parametrize(("options", "seconds"), [((), 2460.0), (("--train.start-timeout-s", "7200"), 7260.0)])
def test_collectives_of_a_training_outlast_the_watchdogs_patience(options, seconds, tiny_shards, tmp_path):
    own = ("--data.train", tiny_shards, "--run-dir", tmp_path, *options)
    config = parse(Config, None, [str(argument) for argument in (*TINY, *own)])
    assert time_given(vaetrain.train.main, config) == (seconds, "--train.timeout-s, --train.start-timeout-s")


def test_the_longest_wait_is_longer_than_any_patience():
    for timeout_s, start_timeout_s in ((600.0, 1800.0), (600.0, 7200.0), (9000.0, 1.0)):
        assert longest_wait_s(timeout_s, start_timeout_s) > max(timeout_s, start_timeout_s, FIRST_STEP_S)


def test_evaluation_and_sampling_take_their_time_from_an_option(tmp_path):
    assert time_given(evaluate, EvaluateConfig(tmp_path, timeout_s=7.0)) == (7.0, "--timeout-s")
    assert time_given(sample_main, SampleConfig(tmp_path, tmp_path, timeout_s=7.0)) == (7.0, "--timeout-s")
    for make in (
        lambda: EvaluateConfig(tmp_path, timeout_s=0.0),
        lambda: SampleConfig(tmp_path, tmp_path, timeout_s=0.0),
    ):
        with pytest.raises(ValueError, match=r"--timeout-s is 0\.0; it must be positive"):
            make()


@pytest.fixture
def events(monkeypatch):
    """What this process waits for, as if it were one of several, among what else is noted."""
    noted = []

    class Recorded:
        def meet(self, what):
            noted.append(what)

    monkeypatch.setattr(exchange, "alone", lambda: False)
    monkeypatch.setattr(exchange, "meeting_place", Recorded)
    return noted


def test_a_training_waits_after_each_work_of_the_main_process(events, tiny_shards, accelerator, tmp_path, monkeypatch):
    def noting(kind, name):
        original = getattr(kind, name)

        def method(self, *arguments, **options):
            result = original(self, *arguments, **options)
            events.append(name)
            return result

        monkeypatch.setattr(kind, name, method)

    monkeypatch.setattr(RunFigures, "draw", lambda *_, **__: events.append("draw"))
    noting(Checkpoints, "finish")
    own = ("--data.train", tiny_shards, "--train.epochs", 2, "--run-dir", tmp_path / "run")
    train(parse(Config, None, [str(argument) for argument in (*TINY, *own)]), accelerator)
    accelerator.free_memory()
    saved = ["finish", "the main process to write the checkpoint before this one"]
    drawn = ["draw", "the main process to draw figures"]
    kept = [event for event in events if event in (*saved, *drawn) or "start" in event]
    assert kept == ["the main process to write down the start", *2 * (saved + drawn), "finish"]


def test_sampling_waits_for_the_prior_and_the_folder(events, tiny_run, accelerator, tmp_path):
    sample(SampleConfig(tiny_run, tmp_path / "set", num_images=3), accelerator)
    assert [event.partition(" to ")[2].partition(str(tmp_path))[0].strip() for event in events] == [
        "look into", "write into", "draw their samples",
    ]  # fmt: skip


def test_nothing_else_waits_in_a_collective():
    """The barrier of all_reduce.py is measured, and what others call is sums of work that all do."""
    waits = {"wait_for_everyone", "broadcast_object_list", "gather_object", "barrier", "monitored_barrier"}
    found = set()
    for path in (ROOT / "vaetrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
            if name in waits:
                found.add((path.name, name))
    assert found == {
        ("exchange.py", "broadcast_object_list"), ("exchange.py", "gather_object"), ("all_reduce.py", "wait_for_everyone"),
    }  # fmt: skip


def test_a_gather_of_the_readers_waits_first(events, accelerator):
    assert processes.gather_integers(accelerator, [3]) == [[3]]
    assert events == ["all processes to read their part of the data"]
