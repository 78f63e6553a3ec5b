"""The gate of a device: who wants to be alone comes in turn, however many cells come and go."""

import itertools
import threading
import time

from effbench.machine.gate import Gate


def make_gate(folder):
    return Gate(folder / "gate.lock", lambda **news: None)


def test_cells_that_come_and_go_keep_nobody_waiting(tmp_path):
    """At any moment one of two cells works: without turns the third would never be alone."""
    done, inside = threading.Event(), threading.Barrier(2)

    def work(number):
        for turn in itertools.count():
            with make_gate(tmp_path).shared():
                if turn == 0:
                    inside.wait(5)  # neither leaves before both are inside; then they leave at different times
                    time.sleep(0.03 * number)
                time.sleep(0.06)
            if done.is_set():
                return

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    for worker in workers:
        worker.start()

    def time_something():
        gate = make_gate(tmp_path)
        with gate.shared(), gate.alone():
            pass

    timing = threading.Thread(target=time_something, daemon=True)
    timing.start()
    timing.join(2)
    waits = timing.is_alive()
    done.set()
    for worker in workers:
        worker.join(5)
    assert not waits


def test_two_that_want_to_be_alone_take_turns(tmp_path):
    """Both work beside each other when they ask: neither keeps what the other waits for."""
    alone, together = [], threading.Barrier(2)

    def time_something():
        gate = make_gate(tmp_path)
        with gate.shared():
            together.wait(5)
            with gate.alone():
                begin = time.monotonic()
                time.sleep(0.05)
                alone.append((begin, time.monotonic()))

    threads = [threading.Thread(target=time_something, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(alone) == 2
    (_, ended), (begin, _) = sorted(alone)
    assert ended <= begin


def test_a_cell_at_work_gives_way_between_two_pieces_of_work(tmp_path):
    """A cell of an hour does not keep another waiting for an hour; nobody works while that one is alone."""
    begun, told, done, worked = threading.Event(), threading.Event(), threading.Event(), list[float]()

    def work():
        gate = make_gate(tmp_path)
        with gate.shared():
            begun.set()
            while not done.is_set():
                worked.append(time.monotonic())
                time.sleep(0.01)
                if gate.wanted:
                    told.set()
                    gate.give_way()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    begun.wait(5)
    gate = make_gate(tmp_path)
    with gate.shared():
        time.sleep(0.05)
        assert not told.is_set(), "it gave way to a cell that works beside it"
        with gate.alone():
            assert told.is_set() and not gate.wanted
            begin = time.monotonic()
            time.sleep(0.1)
            end = time.monotonic()
    time.sleep(0.1)
    done.set()
    worker.join(5)
    assert not [at for at in worked if begin < at < end] and worked[-1] > end
