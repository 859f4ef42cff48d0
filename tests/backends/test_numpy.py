"""The reference backend: dtypes, weights, what lives how long, and what a pass runs in."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends import numpy as module
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.ops import OPS
from cuplama.ops.node import Node
from cuplama.ops.weights import weight_rows
from cuplama.quant.catalog import CATALOG, random_stored
from cuplama.quant.stored import Stored
from cuplama.quant.weight import Weight

_CHAIN = [
    Node("add", ("x1",), ("x0", "x0")),
    Node("add", ("x2",), ("x1", "x0")),
    Node("add", ("x3",), ("x2", "x0")),
]


def _ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


# ---- weights and arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_weights_are_converted_once_and_stacked(dtype: str) -> None:
    rng = np.random.default_rng(0)
    parts = tuple(rng.standard_normal((n, 7)).astype(DTYPES["bf16"]) for n in (5, 3))
    got = NumPyBackend(dtype).load_weight(Weight("w", ("a", "b"), parts))
    assert got.dtype == DTYPES[dtype]
    assert np.array_equal(got, np.concatenate(parts).astype(DTYPES[dtype]))


def test_weights_are_converted_unless_the_caller_has_no_memory_for_it() -> None:
    part = np.ones((4, 3), DTYPES["bf16"])
    assert NumPyBackend().load_weight(Weight("w", ("w",), (part,))).dtype == np.float32
    assert NumPyBackend(convert=False).load_weight(Weight("w", ("w",), (part,))) is part


@pytest.mark.parametrize("convert", [False, True])
def test_quantised_weights_are_decoded_once_or_at_every_use(convert: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DECODED", 64 * 7)  # some rows at a time
    rng = np.random.default_rng(0)
    parts = (
        random_stored(CATALOG["int4 g32"], 20, 64, rng, ordered=True),
        rng.standard_normal((9, 64)).astype(DTYPES["bf16"]),
        random_stored(CATALOG["Q6_K"], 15, 64, rng),
    )
    want = np.concatenate([p.numbers() if isinstance(p, Stored) else p.astype(np.float32) for p in parts])
    weight = NumPyBackend(convert=convert).load_weight(Weight("w", ("a", "b", "c"), parts))
    assert isinstance(weight, np.ndarray) == convert
    if convert:
        assert weight.dtype == np.float32
        assert np.array_equal(weight, want)
    assert np.array_equal(weight_rows(weight, np.array([3, 25, 40, 3])), want[[3, 25, 40, 3]])
    x = rng.standard_normal((2, 64)).astype(np.float32)
    (y,) = NumPyBackend().call(OPS["linear"], [x, weight], {"U": "f32"})
    np.testing.assert_allclose(y, x @ want.T, rtol=1e-4, atol=1e-4)


def test_arrays_are_those_of_the_host() -> None:
    backend, host = NumPyBackend(), np.arange(6, dtype=np.float32).reshape(2, 3)
    array = backend.upload(host)
    assert np.array_equal(backend.download(array), host)
    zeros: Any = backend.zeros((2, 3), DTYPES["i32"])
    assert (zeros.shape, zeros.dtype) == ((2, 3), np.int32)
    assert not zeros.any()
    backend.write(zeros, np.full((2, 3), 5, np.int32))
    assert (backend.download(zeros) == 5).all()


def test_what_a_device_writes_to_a_ring_the_host_sees() -> None:
    host, device = NumPyBackend().host_ring((2, 3))
    assert (host.shape, host.dtype) == ((2, 3), np.int32)
    assert not host.any()
    device[1] = 7
    assert host[1].tolist() == [7, 7, 7]


def test_a_captured_body_runs_at_every_replay_until_it_is_closed() -> None:
    runs: list[int] = []
    captured = NumPyBackend().capture(lambda: runs.append(1))
    assert runs == []
    for count in (1, 2):
        captured.replay().synchronize()
        assert len(runs) == count
    captured.close()
    with pytest.raises(AttributeError):
        captured.replay()


def test_a_new_backend_has_compiled_nothing_and_captures_nothing() -> None:
    backend = NumPyBackend()
    assert (backend.compile_seconds, backend.captures) == (0, False)
    assert backend.describe().startswith(f"NumPy {np.__version__} on ")
    assert backend.describe().endswith(" CPU cores, float32")


# ---- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "U", "dtype"), [("f32", "T", "f32"), ("f16", "T", "f16"), ("f16", "f32", "f32")])
def test_a_result_has_the_dtype_of_the_signature(model: str, U: str, dtype: str) -> None:
    backend = NumPyBackend(model)
    x, w = (np.ones(s, DTYPES[model]) for s in ((2, 3), (4, 3)))
    (called,) = backend.call(OPS["linear"], (x, w), {"U": U})
    run = backend.run([Node("linear", ("y",), ("x", "w"), {"U": U})], {"x": x, "w": w}, ("y",))["y"]
    for y in (called, run):
        assert y.dtype == DTYPES[dtype]
        assert np.array_equal(backend.download(y), np.full((2, 4), 3))


def test_what_is_kept_is_returned_and_the_callers_values_stay_as_they_are() -> None:
    values: dict[str, Any] = {"x0": _ones(2, 4)}
    out: Any = NumPyBackend().run(_CHAIN, values, ("x3", "x1"))
    assert {name: float(array[0, 0]) for name, array in out.items()} == {"x3": 4, "x1": 2}
    assert values.keys() == {"x0"}


def _watch(monkeypatch: pytest.MonkeyPatch, watch: Callable[..., None]) -> None:
    """Calls ``watch`` with the inputs and the result of every add."""

    def reference(a: Any, b: Any) -> Any:
        out = a + b
        watch(a, b, out)
        return out

    monkeypatch.setattr(module, "OPS", {"add": replace(OPS["add"], reference=reference)})


def test_a_value_dies_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watch(a: Any, b: Any, out: Any) -> None:
        alive.append(sum(r() is not None for r in made))
        made.append(weakref.ref(out))

    _watch(monkeypatch, watch)
    NumPyBackend().run([*_CHAIN, Node("add", ("x4",), ("x3", "x0"))], {"x0": _ones(2, 4)}, ("x4",))
    assert alive == [0, 1, 1, 1]  # never more than the input of the node at hand, until the result replaces it


def test_a_list_is_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, values = NumPyBackend(), {"x0": _ones(2, 4)}
    backend.run(_CHAIN, values, ("x3",))
    with monkeypatch.context() as patched:
        patched.setattr(module, "dying", lambda *_: pytest.fail("made ready again"))
        backend.run(_CHAIN, values, ("x3",))
    assert backend.run(_CHAIN, values, ("x2",)).keys() == {"x2"}
    backend.close()
    assert not backend._prepared


def test_a_list_that_takes_the_place_of_another_is_made_ready_anew() -> None:
    """Two lists may have the same id, one after the other."""
    backend, values = NumPyBackend(), {"x0": _ones(2, 4)}
    backend.run(_CHAIN, values, ("x3",))
    other = [Node("add", ("x3",), ("x0", "x0"))]
    backend._prepared[id(other), ("x3",)] = backend._prepared[id(_CHAIN), ("x3",)]
    out: Any = backend.run(other, values, ("x3",))["x3"]
    assert (out == 2).all()


def test_an_overflow_in_float16_makes_no_noise() -> None:
    x, w = np.full((1, 4), 60000, np.float16), np.full((2, 4), 60000, np.float16)
    node = Node("linear", ("y",), ("x", "w"), {"U": "T"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y: Any = NumPyBackend("f16").run([node], {"x": x, "w": w}, ("y",))["y"]
    assert np.isinf(y).all()


# ---- threads of BLAS -------------------------------------------------------------------------------------------------


def test_a_pass_has_one_blas_thread_and_a_team_of_as_many_as_blas_had(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    @contextmanager
    def seen(name: str, gives: Any) -> Iterator[Any]:
        inside.append(name)
        yield gives
        inside.remove(name)

    monkeypatch.setattr(module, "one_blas_thread", lambda: seen("blas", 3))
    monkeypatch.setattr(module, "team_of", lambda threads: seen(f"team of {threads}", None))
    found: list[list[str]] = []
    _watch(monkeypatch, lambda *_: found.append(inside.copy()))
    NumPyBackend().run(_CHAIN, {"x0": _ones(2, 4)}, ("x3",))
    assert found == [["blas", "team of 3"]] * 3
    assert inside == []
