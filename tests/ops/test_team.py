"""Pieces that several threads compute: each counts once, whoever is late, and results do not depend on the threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cuplama.ops import OPS, team
from cuplama.ops.team import LEAST_WORK, fill, multiplying, team_of

_BIG = float(LEAST_WORK)


@pytest.fixture(autouse=True)
def _new_team(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(team, "_pool", None)
    monkeypatch.setattr("cuplama.ops.team.os.cpu_count", lambda: 3)
    yield
    if team._pool is not None:
        team._pool.shutdown()
    assert multiplying.inside == set()


def _numbers(count: int) -> tuple[np.ndarray[Any, Any], list[Any], list[Callable[[], Any]]]:
    out = np.full((count, 3), np.nan)
    return out, list(out), [lambda i=i: np.full(3, i) for i in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_every_piece_is_written(threads: int, count: int) -> None:
    out, outs, pieces = _numbers(count)
    with team_of(threads):
        for _ in range(3):
            out[...] = np.nan
            fill(outs, pieces, _BIG)
            assert out.tolist() == [[i] * 3 for i in range(count)]


def test_who_computes() -> None:
    seen: list[int] = []

    def piece() -> int:
        seen.append(threading.get_ident())
        time.sleep(0.01)
        return 1

    own, out = threading.get_ident(), np.zeros(8)
    outs = [out[i : i + 1] for i in range(8)]
    for threads, work, helped in ((1, _BIG, False), (2, _BIG / 2, False), (3, _BIG, True)):
        seen.clear()
        with team_of(threads):
            fill(outs, [piece] * 8, work)
        assert (len(set(seen)) > 1, own in seen) == (helped, True)
    assert getattr(team._local, "threads", 1) == 1
    seen.clear()
    fill(outs, [piece] * 8, _BIG)  # outside it is one thread again
    assert set(seen) == {own}


def test_pieces_of_an_interrupted_helper_are_taken_by_the_others() -> None:
    own, out, late = threading.get_ident(), np.zeros(9), list[int]()

    def piece(i: int) -> int:
        if threading.get_ident() != own:
            time.sleep(0.2)
            late.append(i)
        else:
            time.sleep(0.005)
        return i

    with team_of(2):
        fill([out[i : i + 1] for i in range(9)], [lambda i=i: piece(i) for i in range(9)], _BIG)  # type: ignore[misc]
    assert out.tolist() == list(range(9))
    assert len(late) <= 1


def test_helpers_that_are_busy_are_not_waited_for() -> None:
    release, out = threading.Event(), np.zeros(8)

    def block() -> None:
        release.wait(10)

    busy = team._ask(block, 2)
    with team_of(3):
        fill([out[i : i + 1] for i in range(8)], [lambda: 1] * 8, _BIG)
    assert not any(helper.done() for helper in busy)
    release.set()
    assert out.all()


def test_an_error_ends_the_work_of_all() -> None:
    begun: list[int] = []

    def piece(i: int) -> int:
        begun.append(i)
        time.sleep(0.02)
        raise MemoryError("no room")

    with team_of(3), pytest.raises(MemoryError):
        fill([np.zeros(1)] * 40, [lambda i=i: piece(i) for i in range(40)], _BIG)  # type: ignore[misc]
    assert len(begun) <= 3


def test_without_helpers_one_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python ends: an exit handler may still generate."""
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(team, "_pool", ended)
    out, outs, pieces = _numbers(5)
    with team_of(3):
        fill(outs, pieces, _BIG)
    assert out[:, 0].tolist() == list(range(5))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_reaches_the_caller_and_helpers_live_on(threads: int) -> None:
    def fails() -> int:
        raise MemoryError("no room")

    for _ in range(4):
        with team_of(threads), pytest.raises(MemoryError, match="no room"):
            fill([np.zeros(1)] * 6, [fails] * 6, _BIG)
    out, outs, pieces = _numbers(12)
    with team_of(threads):
        fill(outs, pieces, _BIG)
    assert out[:, 0].tolist() == list(range(12))


def test_several_threads_ask_at_once() -> None:
    def ask(_: int) -> list[float]:
        out, outs, pieces = _numbers(30)
        with team_of(3):
            fill(outs, pieces, _BIG)
        return out[:, 1].tolist()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(40))) == [list(range(30))] * 40


@pytest.mark.parametrize(("n", "m", "k"), [(1, 3000, 4096), (8, 4096, 1024), (300, 700, 256), (8, 384, 384), (0, 5, 4)])
def test_a_product_does_not_depend_on_the_threads(n: int, m: int, k: int) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, k), (m, k)))
    linear: Any = OPS["linear"].reference
    alone = linear(x, w)
    with team_of(2):
        together = linear(x, w)
    assert np.array_equal(alone, together)
    np.testing.assert_allclose(alone, x @ w.T, atol=1e-5 * k**0.5 * 10, rtol=0)


def test_a_closed_gate_waits_for_those_inside_and_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave, again = threading.Event(), threading.Event(), threading.Event()

    def multiply() -> None:
        with multiplying, multiplying:
            inside.set()
            leave.wait(10)
        with multiplying:
            again.set()

    thread = threading.Thread(target=multiply)
    thread.start()
    assert inside.wait(10)
    with multiplying:  # one's own thread does not count
        threading.Timer(0.05, leave.set).start()
        multiplying.close()
        assert leave.is_set()
        assert not again.wait(0.05)
        multiplying.open()
    thread.join(10)
    assert again.is_set()
    monkeypatch.setattr(team, "_LONGEST_WAIT", 0.02)
    multiplying.inside.add(-1)
    multiplying.close()  # gives up
    multiplying.open()
    multiplying.inside.discard(-1)


def test_idle_helpers_are_dismissed_before_a_fork_and_made_again() -> None:
    def helpers() -> int:
        return sum(thread.name.startswith("cuplama helper") for thread in threading.enumerate())

    before = helpers()  # of other tests' teams
    out, outs, pieces = _numbers(40)
    for _ in range(2):
        out[...] = np.nan
        with team_of(3):
            fill(outs, pieces, _BIG)
        assert out[:, 0].tolist() == list(range(40))
        assert before < helpers() <= before + 2
        team._prepare()
        multiplying.open()
        assert helpers() == before


def test_a_thread_that_is_interrupted_at_the_gate_is_not_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    multiplying.closed = True
    with monkeypatch.context() as patch:
        patch.setattr("cuplama.ops.team.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt), multiplying:
            pass
    multiplying.open()
    assert multiplying.inside == set()
    with multiplying:
        assert multiplying.inside == {threading.get_ident()}
