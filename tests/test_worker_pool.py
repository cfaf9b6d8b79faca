import itertools
import os
import time

import pytest

from vaetrain.data.sharding.process_map import AHEAD_PER_WORKER, map_in_order


def square(number: int) -> int:
    time.sleep(0.05 * (number % 3 == 0))  # the first of each three comes last
    if number == 13:
        os._exit(9)
    if number == 17:
        raise ZeroDivisionError("seventeen")
    return number**2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order_and_arguments_are_taken_as_needed(num_workers: int) -> None:
    taken = []

    def arguments():
        for number in range(12):
            taken.append(number)
            yield number

    for position, result in enumerate(map_in_order(square, arguments(), num_workers)):
        assert result == position**2
        assert len(taken) <= position + AHEAD_PER_WORKER * num_workers
    assert len(taken) == 12


@pytest.mark.parametrize("num_workers", [1, 2])
def test_errors_come_through_and_nothing_goes_on_after_them(num_workers: int) -> None:
    taken = itertools.count(16)
    results = map_in_order(square, taken, num_workers)
    assert next(results) == 256
    with pytest.raises(ZeroDivisionError, match="seventeen"):
        next(results)
    assert next(taken) <= 17 + 1 + AHEAD_PER_WORKER * num_workers


def test_a_killed_worker_ends_it_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"a worker process was killed .*run the same command again.*fewer --workers"):
        list(map_in_order(square, range(12, 40), 2))
