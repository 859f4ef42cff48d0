"""The binding of cuBLASLt without a GPU: a stand-in written from cublasLt.h, and the library's own descriptors."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.cublas import Cublas, Heuristic, load_cublas
from cuplama.dtypes import DTYPES
from cuplama.errors import DeviceError

_STREAM, _WORKSPACE, _SIZE = 0x51, 0x7000, 32 << 20
_ALGORITHM = bytes(range(64))
_NAMES = {0: "f32", 2: "f16", 14: "bf16"}  # cudaDataType

# Attribute number -> (name, C type), from cublasLt.h.
_DESC: dict[int, tuple[str, Any]] = {
    3: ("TRANSA", ctypes.c_int32),
    4: ("TRANSB", ctypes.c_int32),
    7: ("EPILOGUE", ctypes.c_uint32),
    8: ("BIAS_POINTER", ctypes.c_uint64),
}
_PREFERENCE: dict[int, tuple[str, Any]] = {
    1: ("MAX_WORKSPACE_BYTES", ctypes.c_uint64),
    3: ("REDUCTION_SCHEME_MASK", ctypes.c_uint32),
    5: ("MIN_ALIGNMENT_A_BYTES", ctypes.c_uint32),
    6: ("MIN_ALIGNMENT_B_BYTES", ctypes.c_uint32),
    7: ("MIN_ALIGNMENT_C_BYTES", ctypes.c_uint32),
    8: ("MIN_ALIGNMENT_D_BYTES", ctypes.c_uint32),
}


def _array(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(memoryview((ctypes.c_byte * size).from_address(address)), dtype).reshape(shape)


class Library:
    """cuBLASLt on host memory. Its functions are C functions of the header's types, called through ctypes.

    alive: every object that was created and not destroyed; status: what a named function returns instead of 0;
    heuristic: (status, count, state) for an operation's attributes.
    """

    def __init__(self) -> None:
        self.alive: dict[int, dict[str, Any]] = {}
        self.status: dict[str, int] = {}
        self.heuristic: Callable[[dict[str, Any]], tuple[int, int, int]] = lambda desc: (0, 1, 0)
        self.failures: list[BaseException] = []  # of the functions themselves
        self._next = 0x1000
        p, i, z = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._define("cublasLtCreate", self._create("handle"), p)
        self._define("cublasLtMatmulDescCreate", self._create("desc", "compute", "scale"), p, i, i)
        layout = self._create("layout", "type", "rows", "columns", "ld")
        self._define("cublasLtMatrixLayoutCreate", layout, p, i, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64)
        self._define("cublasLtMatmulPreferenceCreate", self._create("preference"), p)
        for kind, what in (
            ("", "handle"),
            ("MatmulDesc", "desc"),
            ("MatrixLayout", "layout"),
            ("MatmulPreference", "preference"),
        ):
            self._define(f"cublasLt{kind}Destroy", self._destroy(what), p)
        self._define("cublasLtMatmulDescSetAttribute", self._set(_DESC), p, i, p, z)
        self._define("cublasLtMatmulPreferenceSetAttribute", self._set(_PREFERENCE), p, i, p, z)
        self._define("cublasLtMatmulAlgoGetHeuristic", self._choose, p, p, p, p, p, p, p, i, p, p)
        self._define("cublasLtMatmul", self._matmul, p, p, p, p, p, p, p, p, p, p, p, p, p, p, z, p)

    def _define(self, name: str, function: Callable[..., int], *types: Any) -> None:
        def run(*arguments: Any) -> int:
            try:
                return self.status.get(name) or function(*arguments)
            except BaseException as e:  # ctypes would swallow it
                self.failures.append(e)
                return 99

        setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(run))

    def _create(self, what: str, *fields: str) -> Callable[..., int]:
        def create(out: int, *values: Any) -> int:
            self._next += 8
            self.alive[self._next] = {"what": what, **dict(zip(fields, values, strict=True))}
            ctypes.c_uint64.from_address(out).value = self._next
            return 0

        return create

    def _destroy(self, what: str) -> Callable[..., int]:
        def destroy(made: int) -> int:
            assert self.alive.pop(made)["what"] == what
            return 0

        return destroy

    def _set(self, known: dict[int, tuple[str, Any]]) -> Callable[..., int]:
        def put(made: int, attribute: int, value: int, size: int) -> int:
            name, kind = known[attribute]
            assert size == ctypes.sizeof(kind)
            self.alive[made][name] = kind.from_address(value).value
            return 0

        return put

    def _choose(
        self, handle: int, desc: int, a: int, b: int, c: int, d: int, preference: int, asked: int, out: int, count: int
    ) -> int:
        assert [self.alive[o]["what"] for o in (handle, desc, a, b, c, d)] == ["handle", "desc", *["layout"] * 4]
        alignment = self.alive[preference]["MIN_ALIGNMENT_A_BYTES"]
        assert self.alive[preference] == {
            "what": "preference",
            "MAX_WORKSPACE_BYTES": _SIZE,
            "REDUCTION_SCHEME_MASK": 2,
            **{f"MIN_ALIGNMENT_{o}_BYTES": alignment for o in "ABCD"},
        }
        assert asked == 1
        status, found, state = self.heuristic({**self.alive[desc], "alignment": alignment})
        # cublasLtMatmulHeuristicResult_t: the algorithm, 64 bytes; size_t workspaceSize; cublasStatus_t state; ...
        assert ctypes.sizeof(Heuristic) == 96
        ctypes.memmove(out, _ALGORITHM, 64)
        ctypes.c_int.from_address(out + 72).value = state
        ctypes.c_int.from_address(count).value = found
        return status

    def _matmul(
        self, handle: int, desc: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int, c: int,
        c_layout: int, d: int, d_layout: int, algorithm: int, workspace: int, size: int, stream: int,
    ) -> int:  # fmt: skip
        """D = alpha op(A) op(B) + beta C + bias, column-major, from the definition."""
        assert self.alive[handle]["what"] == "handle"
        assert ctypes.string_at(algorithm, 64) == _ALGORITHM
        assert (workspace, size, stream) == (_WORKSPACE, _SIZE, _STREAM)
        op = self.alive[desc]
        assert (op["compute"], op["scale"]) == (68, 0)

        def matrix(address: int, layout: int) -> np.ndarray[Any, Any]:
            about = self.alive[layout]
            return _array(address, (about["columns"], about["ld"]), DTYPES[_NAMES[about["type"]]]).T[: about["rows"]]

        left, right, out = matrix(a, a_layout), matrix(b, b_layout), matrix(d, d_layout)
        left, right = (x.astype(np.float32) for x in (left, right))
        factors = [ctypes.c_float.from_address(f).value for f in (alpha, beta)]
        product = (left.T if op.get("TRANSA") else left) @ (right.T if op.get("TRANSB") else right)
        result = factors[0] * product
        if factors[1]:
            result = result + factors[1] * matrix(c, c_layout).astype(np.float32)
        if op.get("EPILOGUE", 1) == 4:
            result = result + _array(op["BIAS_POINTER"], (len(out), 1), out.dtype).astype(np.float32)
        out[...] = result
        return 0


@pytest.fixture
def library() -> Iterator[Library]:
    made = Library()
    yield made
    assert not made.failures


def _cublas(library: Any) -> Cublas:
    return Cublas(library, _STREAM, _WORKSPACE, _SIZE)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 16, np.uint8)
    start = -raw.ctypes.data % 16
    out = raw[start : start + size].view(dtype).reshape(shape)
    out[...] = rng.standard_normal(shape)
    return out


@pytest.mark.parametrize(("T", "U"), [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("bf16", "f32")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_a_product_is_what_it_says(library: Library, T: str, U: str, bias: bool, add: bool) -> None:
    rng, n, m, k = np.random.default_rng(1), 11, 7, 5
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"x": ((n, k), T), "w": ((m, k), T), "y": ((n, m), U)}
    shapes |= {"b": ((m,), U)} if bias else {}
    shapes |= {"c": ((n, m), U)} if add else {}
    product = _cublas(library).product(n, m, k, T, U, bias, add)
    assert product is not None
    for _ in range(2):  # a plan serves layer after layer, each with its own arrays
        arrays = {name: _aligned(shape, DTYPES[dtype], rng) for name, (shape, dtype) in shapes.items()}
        x, w, b, c = (arrays[name].astype(np.float32) if name in arrays else 0 for name in "xwbc")
        want = x @ w.T + b + c  # type: ignore[union-attr]
        product(**{name: array.ctypes.data for name, array in arrays.items()})
        np.testing.assert_allclose(arrays["y"].astype(np.float32), want, atol=1e-5 if U == "f32" else 0.1, rtol=0)


def test_a_product_may_be_added_to_what_is_there(library: Library) -> None:
    rng = np.random.default_rng(2)
    x, w, y = (_aligned(shape, DTYPES["f32"], rng) for shape in ((9, 4), (8, 4), (9, 8)))
    want = x @ w.T + y
    product = _cublas(library).product(9, 8, 4, "f32", "f32", add=True)
    assert product is not None
    product(x.ctypes.data, w.ctypes.data, y.ctypes.data, c=y.ctypes.data)
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize(("T", "U"), [("f32", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("bf16", "f32")])
@pytest.mark.parametrize(("form", "x_shape", "w_shape", "formula"), [
    ("nn", (11, 5), (5, 7), "x[11,5]:{0} w[5,7]"),
    ("tn", (5, 11), (5, 7), "x[5,11]^T:{0} w[5,7]"),
])  # fmt: skip
@pytest.mark.parametrize("add", ["", "another", "itself"])
def test_the_forms_of_a_backward_pass(
    library: Library, T: str, U: str, form: str, x_shape: tuple[int, int], w_shape: tuple[int, int], formula: str,
    add: str,
) -> None:  # fmt: skip
    rng = np.random.default_rng(3)
    x, w = (_aligned(shape, DTYPES[T], rng) for shape in (x_shape, w_shape))
    y, c = (_aligned((11, 7), DTYPES[U], rng) for _ in range(2))
    product = _cublas(library).product(11, 7, 5, T, U, add=bool(add), form=form)
    assert product is not None
    assert product.text == f"cuBLAS: y[11,7]:{U} = {formula.format(T)}{' + c' * bool(add)}"
    left, right = x.astype(np.float64), w.astype(np.float64)
    added = {"": np.zeros(()), "another": c, "itself": y}[add]
    want = (left.T if form == "tn" else left) @ right + added.astype(np.float64)
    product(x.ctypes.data, w.ctypes.data, y.ctypes.data, c={"another": c, "itself": y}[add].ctypes.data if add else 0)
    np.testing.assert_allclose(y.astype(np.float64), want, atol=1e-5 if U == "f32" else 0.1, rtol=0)


@pytest.mark.parametrize("form", ["nn", "tn"])
def test_x_may_be_columns_of_a_wider_matrix(library: Library, form: str) -> None:
    rng = np.random.default_rng(4)
    wide, w, y = (_aligned(shape, DTYPES["f32"], rng) for shape in ((9, 12), (4 if form == "nn" else 9, 8), (9, 8)))
    n, k = (9, 4) if form == "nn" else (4, 9)
    product = _cublas(library).product(n, 8, k, "f32", "f32", form=form, line=12)
    assert product is not None
    product(wide.ctypes.data + 16, w.ctypes.data, y.ctypes.data)
    x = wide[:, 4:8]
    np.testing.assert_allclose(y[:n], (x if form == "nn" else x.T) @ w, atol=1e-5)


def test_where_there_is_no_algorithm_less_alignment_is_told(library: Library) -> None:
    seen: list[int] = []

    def heuristic(desc: dict[str, Any]) -> tuple[int, int, int]:
        seen.append(desc["alignment"])
        return (0, 1, 0) if desc["alignment"] == 2 else (15, 0, 0)

    library.heuristic = heuristic
    assert _cublas(library).product(9, 7, 5, "bf16", "f32") is not None
    assert seen == [16, 4, 2]


def test_what_was_made_is_given_back(library: Library) -> None:
    cublas = _cublas(library)
    before = dict(library.alive)
    products = [cublas.product(9, 8, 4, "f32", "f32", bias) for bias in (False, True)]
    assert len(library.alive) == len(before) + 2 * 4  # an operation and three layouts each
    del products
    gc.collect()
    assert library.alive == before
    cublas.close()
    assert library.alive == {}


@pytest.mark.parametrize("answer", [(0, 0, 0), (0, 1, 15), (15, 0, 0), (7, 0, 0)])
def test_no_algorithm_means_no_product_and_leaves_nothing_behind(
    library: Library, answer: tuple[int, int, int]
) -> None:
    library.heuristic = lambda desc: answer if desc.get("EPILOGUE") == 4 else (0, 1, 0)
    cublas = _cublas(library)
    before = len(library.alive)
    assert cublas.product(9, 8, 4, "f32", "f32", bias=True) is None
    gc.collect()
    assert len(library.alive) == before
    assert cublas.product(9, 8, 4, "f32", "f32") is not None


def test_the_heuristic_knows_how_biases_are_aligned(library: Library) -> None:
    seen: list[int] = []

    def heuristic(desc: dict[str, Any]) -> tuple[int, int, int]:
        seen.append(desc["BIAS_POINTER"])
        return 0, 1, 0

    library.heuristic = heuristic
    _cublas(library).product(9, 8, 4, "f32", "f32", bias=True)
    assert seen == [16]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cublasLtCreate", "cublasLtCreate fails with status 3"),
        ("cublasLtMatmulDescCreate", r"y\[9,8\]:f32 = x\[9,4\]:f16 w\[8,4\]\^T \+ b: cublasLtMatmulDescCreate fails"),
        ("cublasLtMatmulAlgoGetHeuristic", r"w\[8,4\].*cublasLtMatmulAlgoGetHeuristic fails with status 3"),
        ("cublasLtMatmul", r"cuBLAS: y\[9,8\]:f32 = x\[9,4\]:f16 w\[8,4\]\^T \+ b: cublasLtMatmul fails with status 3"),
    ],
)
def test_a_failure_names_the_call_and_the_shapes(library: Library, name: str, message: str) -> None:
    def plan_and_run() -> None:
        product = _cublas(library).product(9, 8, 4, "f16", "f32", bias=True)
        assert product is not None
        product(16, 32, 48, b=64)

    library.status[name] = 3
    with pytest.raises(DeviceError, match=message):
        plan_and_run()


@pytest.mark.parametrize("argument", ["x", "w", "y", "b"])
def test_an_array_that_is_not_aligned_is_refused(library: Library, argument: str) -> None:
    product = _cublas(library).product(9, 8, 4, "f16", "f32", bias=True)
    assert product is not None
    with pytest.raises(DeviceError, match="multiple of 16 bytes"):
        product(**{"x": 16, "w": 32, "y": 48, "b": 64, argument: 72})


def test_the_result_of_a_heuristic_is_laid_out_as_in_the_header() -> None:
    assert ctypes.sizeof(Heuristic) == 96
    offsets = [getattr(Heuristic, name).offset for name in ("algorithm", "workspace", "state", "waves", "reserved")]
    assert offsets == [0, 64, 72, 76, 80]


def test_the_library_takes_our_descriptors(library: Library) -> None:
    """NVIDIA's own makes and reads back operations, layouts and preferences without a GPU."""
    pathfinder = pytest.importorskip("cuda.pathfinder")
    try:
        lt: Any = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)
    except Exception as e:
        pytest.skip(f"no cuBLASLt here: {e}")
    needs_gpu = ("cublasLtCreate", "cublasLtDestroy", "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul")
    seen: list[dict[str, Any]] = []

    def read(kind: str, made: int, attribute: int, size: int) -> int:
        value, written = ctypes.c_uint64(), ctypes.c_size_t()
        get = getattr(lt, f"cublasLt{kind}GetAttribute")
        get.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert get(made, attribute, ctypes.byref(value), size, ctypes.byref(written)) == 0
        assert written.value == size
        return value.value

    def heuristic(*given: Any) -> int:
        desc, a, b, c, d, preference = (p.value for p in given[1:7])
        desc_sizes, layout_sizes = {0: 4, 1: 4, 3: 4, 4: 4, 7: 4, 8: 8}, {0: 4, 1: 4, 2: 8, 3: 8, 4: 8}
        preference_sizes = {i: ctypes.sizeof(kind) for i, (_, kind) in _PREFERENCE.items()}
        seen.append({
            "desc": [read("MatmulDesc", desc, i, size) for i, size in desc_sizes.items()],
            "layouts": [[read("MatrixLayout", o, i, s) for i, s in layout_sizes.items()] for o in (a, b, c, d)],
            "preference": [read("MatmulPreference", preference, i, s) for i, s in preference_sizes.items()],
        })  # fmt: skip
        return 15

    functions = {name: getattr(library, name) for name in needs_gpu}
    functions |= {
        name: getattr(lt, name) for name in vars(library) if name.startswith("cublasLt") and name not in needs_gpu
    }
    functions["cublasLtMatmulAlgoGetHeuristic"] = heuristic
    cublas = _cublas(SimpleNamespace(**functions))
    assert cublas.product(9, 24, 40, "bf16", "f32", bias=True) is None
    column_major = 0
    assert seen == [{
        "desc": [68, 0, 1, 0, 4, 16],
        "layouts": [[14, column_major, 40, 24, 40], [14, column_major, 40, 9, 40], *[[0, column_major, 24, 9, 24]] * 2],
        "preference": [_SIZE, 2, *[alignment] * 4],
    } for alignment in (16, 4, 2)]  # fmt: skip
    seen.clear()
    assert cublas.product(9, 24, 40, "bf16", "f32", form="tn") is None
    assert seen[0]["desc"][2:] == [0, 1, 1, 0]  # w as it is, x transposed, no epilogue
    assert seen[0]["layouts"][:2] == [[14, column_major, 24, 40, 24], [14, column_major, 9, 40, 9]]
    cublas.close()


# ---- finding the library ---------------------------------------------------------------------------------------------


@pytest.fixture
def cupy_of_cuda_12(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 12090)
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", SimpleNamespace(cublas=None))


@pytest.mark.usefixtures("cupy_of_cuda_12")
@pytest.mark.parametrize(("platform", "name"), [("linux", "libcublasLt.so.12"), ("win32", "cublasLt64_12.dll")])
def test_the_library_of_cupys_cuda_version_is_loaded(platform: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda asked: f"loaded {asked}")
    assert str(load_cublas()) == f"loaded {name}"


def _only_by_path(asked: str) -> str:
    if not asked.startswith("/"):
        raise OSError(f"{asked}: cannot open shared object file")
    return f"loaded {asked}"


@pytest.mark.usefixtures("cupy_of_cuda_12")
def test_a_library_that_the_system_does_not_know_is_looked_for_among_the_wheels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _only_by_path)
    finder = SimpleNamespace(load_nvidia_dynamic_lib=lambda name: SimpleNamespace(abs_path=f"/wheels/{name}.so"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", finder)
    assert str(load_cublas()) == "loaded /wheels/cublasLt.so"


@pytest.mark.usefixtures("cupy_of_cuda_12")
def test_a_missing_library_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _only_by_path)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with caplog.at_level(logging.WARNING, "cuplama"):
        assert load_cublas() is None
    assert "cuBLAS is not available" in caplog.text
