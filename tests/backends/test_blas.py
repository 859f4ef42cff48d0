"""BLAS has one thread while passes run, and as many as before when none runs: whoever calls, and however they end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

from cuplama.backends.blas import one_blas_thread


def _threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """BLAS has two threads, whatever the machine."""
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        if _threads() != {2}:
            pytest.skip(f"this BLAS does not say how many threads it has: {_threads()}")
        yield


def test_the_threads_come_back_when_the_last_one_leaves() -> None:
    for _ in range(2):
        with one_blas_thread() as outer:
            with pytest.raises(KeyError), one_blas_thread() as inner:
                raise KeyError
            assert (_threads(), outer, inner) == ({1}, 2, 2)
        assert _threads() == {2}


def test_a_worker_thread_can_set_them_though_another_thread_did_before() -> None:
    """threadpoolctl 3.8 lets one thread set the number of OpenBLAS, as here the one of ``_two_threads``."""

    def inside() -> set[int]:
        with one_blas_thread():
            return _threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == {1}
    assert _threads() == {2}


def test_two_threads_that_overlap() -> None:
    """The first to enter leaves first; the number is the second's to restore."""
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with one_blas_thread():
            entered.set()
            assert second_in.wait(10)
        left.set()

    second_in = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(10)
    with one_blas_thread() as threads:
        second_in.set()
        assert left.wait(10)
        assert (_threads(), threads) == ({1}, 2)
    thread.join()
    assert _threads() == {2}


def test_what_a_user_sets_is_kept() -> None:
    with threadpool_limits(1, user_api="blas"):
        with one_blas_thread() as threads:
            assert (_threads(), threads) == ({1}, 1)
        assert _threads() == {1}
    assert _threads() == {2}
    with one_blas_thread():  # set in the middle: the user's number stays
        ThreadpoolController().limit(limits=2, user_api="blas")
    assert _threads() == {2}


def test_a_user_can_set_them_afterwards_from_any_thread() -> None:
    with one_blas_thread():
        pass

    def limited() -> set[int]:
        with threadpool_limits(1, user_api="blas"):
            return _threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(limited).result() == {1}
    assert limited() == {1}
    assert _threads() == {2}


def test_a_process_that_is_told_to_use_one_thread_has_no_helpers() -> None:
    code = (
        "import threading, cuplama; from tests.tiny import CHARS, load; m = load(CHARS); m.generate('First');"
        "from cuplama.backends.blas import one_blas_thread as o;"
        "t = o(); print(t.__enter__(), threading.active_count())"
    )
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert out.stdout.split() == ["1", "1"], out.stderr
