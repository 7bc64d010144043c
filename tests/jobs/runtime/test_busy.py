"""Work and waiting of an actor add up to its life, also when calls overlap."""

import threading
import time

import pytest

from jobs.runtime.busy import BusyTime, CallTimes


def test_calls_one_after_another_count_what_is_between_them():
    busy = BusyTime()
    started = time.perf_counter()
    times = []
    for _ in range(2):
        time.sleep(0.02)
        with busy.call() as one:
            time.sleep(0.03)
        times.append(one)
    life = time.perf_counter() - started
    assert sum(one.waiting + one.seconds for one in times) == pytest.approx(life, abs=0.005)
    assert all(one.waiting >= 0.02 and one.seconds >= 0.03 for one in times)


def test_overlapping_calls_count_no_second_twice():
    busy = BusyTime()
    both_at_work = threading.Barrier(2)
    times: list[CallTimes] = []

    def call() -> None:
        with busy.call() as one:
            both_at_work.wait()
            time.sleep(0.05)
        times.append(one)

    started = time.perf_counter()
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    life = time.perf_counter() - started
    assert 0.05 <= sum(one.waiting + one.seconds for one in times) <= life + 0.005
