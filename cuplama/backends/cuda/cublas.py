"""Matrix products: cuBLASLt through ctypes, since CuPy has no binding of it.

A product is y = x w^T, as of many rows with a weight; or y = x w or y = x^T w, as in a backward pass: ``FORMS``. It
adds a bias and another matrix on its way out, so neither costs a pass over the result. Its algorithm is chosen when it
is planned and used from then on, with one workspace of fixed size: results repeat bit for bit.

8-bit floats (e4m3) come with float32 scales, ``SCALES`` says which. The library multiplies them from sm_89 on.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...errors import DeviceError

__all__ = ["FORMS", "SCALES", "Cublas", "Heuristic", "Kind", "Product", "Scales", "load_cublas"]

_ALIGNMENT = 16  # bytes: the address of every array must be a multiple of it
# What the library is told of addresses, in turn until it has an algorithm. It knows how long rows are, too; one that
# takes them to be aligned as addresses are would find none for odd lengths at first.
_TOLD_ALIGNMENTS = (_ALIGNMENT, 4, 2)
_log = logging.getLogger("cuplama")
# ---- the interface, as in cublasLt.h (CUDA 12 and 13) ----------------------------------------------------------------
_TYPES: Mapping[str, int] = {"f32": 0, "f16": 2, "bf16": 14, "e4m3": 28}  # cudaDataType
_COMPUTE_32F = 68  # cublasComputeType_t: float32 throughout, never TF32
_UNSUPPORTED = (7, 15)  # cublasStatus_t: INVALID_VALUE, NOT_SUPPORTED
_OPERATIONS = (ctypes.c_int32(0), ctypes.c_int32(1))  # cublasOperation_t: as it is, transposed
_ADD_BIAS = ctypes.c_uint32(4)  # cublasLtEpilogue_t
# cublasLtReductionScheme_t: partial sums are kept in float32 (or there are none), never rounded to 16 bits on the way.
_REDUCTION = 2
# cublasLtMatmulDescAttributes_t. A is w and B is x. The modes are there from 12.8 on, and mean a scalar where not set.
_DESC_TRANSA, _DESC_TRANSB, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 4, 7, 8
_DESC_SCALE_POINTERS, _DESC_SCALE_MODES, _DESC_FAST_ACCUM = (17, 18), (31, 32), 25
# cublasLtMatmulMatrixScale_t
_SCALE_SCALAR, _SCALE_OUTER_VECTOR, _SCALE_VECTOR_128, _SCALE_BLOCK_128 = 0, 3, 4, 5
_PREF_WORKSPACE, _PREF_REDUCTION, _PREF_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t


FORMS: Mapping[str, tuple[bool, bool]] = {"nt": (False, True), "nn": (False, False), "tn": (True, False)}
"""Whether x and w are transposed in a product y[n,m] = x[n,k] w[k,m], by the letters of BLAS: n as it is, t transposed.
A matrix that is transposed lies in memory as x[k,n], w[m,k]."""


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Kind:
    """A product but for its sizes; see ``Cublas.product``."""

    T: str
    U: str
    bias: bool
    add: bool
    form: str


@dataclass(frozen=True)
class Scales:
    """What the scales of an 8-bit product are: y[i,j] = sum over l of x[i,l] x_scale w[j,l] w_scale. All are float32.

    modes: of w and of x (cublasLtMatmulMatrixScale_t); rows: what n and m must be multiples of, beside the 8 of m.
    """

    modes: tuple[int, int]
    rows: int = 1


SCALES: Mapping[str, Scales] = {
    # One number for all of x, one for all of w.
    "tensor": Scales((_SCALE_SCALAR, _SCALE_SCALAR)),
    # x_scale[n], w_scale[m]: one for each row. sm_90 alone, cuBLAS 12.9.
    "row": Scales((_SCALE_OUTER_VECTOR, _SCALE_OUTER_VECTOR)),
    # x_scale[K,n], w_scale[K,m]: one for 128 columns of a row, K = ceil(k / 128). sm_90 alone, cuBLAS 12.9.
    "group": Scales((_SCALE_VECTOR_128, _SCALE_VECTOR_128), 4),
    # x_scale[K,n] likewise; w_scale[ceil(m / 128), K rounded up to 4]: one for 128 x 128. sm_90 alone, cuBLAS 12.9.
    "block": Scales((_SCALE_BLOCK_128, _SCALE_VECTOR_128), 4),
}
"""How e4m3 matrices are scaled, by name: "Narrow Precision Data Types Usage" in NVIDIA's documentation of cuBLAS."""
_ALIGNED_K, _ALIGNED_M = 16, 8  # what k and m must be multiples of where x and w are 8-bit floats

_P, _I, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_P,),
    "cublasLtDestroy": (_P,),
    "cublasLtMatmulDescCreate": (_P, _I, _I),
    "cublasLtMatmulDescSetAttribute": (_P, _I, _P, _SIZE),
    "cublasLtMatmulDescDestroy": (_P,),
    "cublasLtMatrixLayoutCreate": (_P, _I, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatrixLayoutDestroy": (_P,),
    "cublasLtMatmulPreferenceCreate": (_P,),
    "cublasLtMatmulPreferenceSetAttribute": (_P, _I, _P, _SIZE),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulAlgoGetHeuristic": (*(_P,) * 7, _I, _P, _P),
    "cublasLtMatmul": (*(_P,) * 14, _SIZE, _P),
}


def load_cublas() -> ctypes.CDLL | None:
    """The cuBLASLt of CuPy's CUDA version, or None with a warning."""
    try:
        from cupy.cuda import runtime
        from cupy_backends.cuda.libs import cublas  # noqa: F401  loads the library it was built for

        major = runtime.runtimeGetVersion() // 1000
        try:
            return ctypes.CDLL(f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}")
        except OSError:
            from cuda.pathfinder import load_nvidia_dynamic_lib

            return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except Exception as e:  # several libraries may be missing, each in its own way; our kernels do the work then
        _log.warning("cuBLAS is not available (%s); long prompts will be slow. pip install nvidia-cublas-cu12", e)
        return None


# ---- products --------------------------------------------------------------------------------------------------------
class Cublas:
    """The library on one device and stream. workspace: address of ``size`` bytes that all products share.

    reduction: mask of the ways in which an algorithm may add up partial sums (cublasLtReductionScheme_t); 0 leaves
    those that add each sum in one sequence.
    """

    reduction = _REDUCTION

    def __init__(self, library: ctypes.CDLL, stream: int, workspace: int, size: int) -> None:
        self.library = library
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        self.stream, self.workspace, self.size = stream, workspace, size
        self._owned = ExitStack()
        self.handle = self.make("", self._owned)
        self._preferences = [self._preference(alignment) for alignment in _TOLD_ALIGNMENTS]

    def _preference(self, alignment: int) -> ctypes.c_void_p:
        made = self.make("MatmulPreference", self._owned)
        self.set("MatmulPreference", made, _PREF_WORKSPACE, ctypes.c_uint64(self.size))
        self.set("MatmulPreference", made, _PREF_REDUCTION, ctypes.c_uint32(self.reduction))
        for operand in _PREF_ALIGNMENTS:
            self.set("MatmulPreference", made, operand, ctypes.c_uint32(alignment))
        return made

    def product(
        self, n: int, m: int, k: int, T: str, U: str, bias: bool = False, add: bool = False, width: int = 0,
        form: str = "nt", line: int = 0,
    ) -> Product | None:  # fmt: skip
        """Plan y[n,m]:U = x[n,k]:T w[m,k]^T:T (+ b[m]:U) (+ c[n,m]:U). None if the library has no algorithm for it.

        width: elements from one row of y, and of c, to the next, where they are columns of wider matrices; line: the
        same of x. form: one of ``FORMS``; "nn" has w[k,m] instead, "tn" x[k,n] and w[k,m].
        """
        product = Product(self, n, m, k, T, U, bias, add, width or m, form=form, line=line)
        return product if product.algorithm is not None else None

    def scaled_product(
        self, n: int, m: int, k: int, scales: str, U: str, bias: bool = False, add: bool = False, fast: bool = False,
        width: int = 0,
    ) -> Product | None:  # fmt: skip
        """The same with x and w of 8-bit floats (e4m3) and scales of the kind ``SCALES[scales]``.

        fast: sums stay in the tensor cores, which keep about 14 bits of them, and are not moved to float32 on the way.
        None where library, GPU or sizes do not allow it.
        """
        rows = SCALES[scales].rows
        if k % _ALIGNED_K or m % _ALIGNED_M or n % rows or m % rows or (bias and U == "f32"):
            return None  # a bias of float32 is not known beside 8-bit floats
        product = Product(self, n, m, k, "e4m3", U, bias, add, width or m, SCALES[scales], fast)
        return product if product.algorithm is not None else None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library. Raises DeviceError, naming it, if it fails."""
        if status := getattr(self.library, name)(*arguments):
            raise DeviceError(f"{name} fails with status {status}")

    def make(self, kind: str, owner: ExitStack, *arguments: Any) -> ctypes.c_void_p:
        """An object of the library, which ``owner`` gives back."""
        made = ctypes.c_void_p()
        self.call(f"cublasLt{kind}Create", ctypes.byref(made), *arguments)
        owner.callback(getattr(self.library, f"cublasLt{kind}Destroy"), made)
        return made

    def set(self, kind: str, made: ctypes.c_void_p, attribute: int, value: Any) -> None:
        """Set an attribute of an object of the library."""
        self.call(f"cublasLt{kind}SetAttribute", made, attribute, ctypes.byref(value), ctypes.sizeof(value))

    def knows(self, desc: ctypes.c_void_p, attribute: int, value: Any) -> bool:
        """Set an attribute of an operation that an older library may not have; whether it has it."""
        status = self.library.cublasLtMatmulDescSetAttribute(desc, attribute, ctypes.byref(value), ctypes.sizeof(value))
        if status not in (0, *_UNSUPPORTED):
            raise DeviceError(f"cublasLtMatmulDescSetAttribute fails with status {status}")
        return bool(status == 0)

    def choose(self, product: Product) -> Heuristic | None:
        """The best algorithm for a product as cuBLAS sees it; None if there is none.

        It is the first that the library names. Timing several would choose another now and then, and with it the order
        of additions: results would not repeat.
        """
        return next(iter(self.candidates(product, 1)), None)

    def candidates(self, product: Product, most: int) -> list[Heuristic]:
        """The algorithms for a product, best first as cuBLAS sees it, at most that many; an empty list if there are
        none."""
        for preference in self._preferences:
            found, count = (Heuristic * most)(), ctypes.c_int()
            status = self.library.cublasLtMatmulAlgoGetHeuristic(
                self.handle, *product.described, preference, most, ctypes.byref(found), ctypes.byref(count)
            )
            if status not in (0, *_UNSUPPORTED):
                raise DeviceError(f"cublasLtMatmulAlgoGetHeuristic fails with status {status}")
            if status == 0 and (good := [one for one in found[: count.value] if one.state == 0]):
                return good
        return []

    def close(self) -> None:
        """Give back the library's handle. Products cannot be used afterwards."""
        self._owned.close()


class Product:
    """A planned product, called with the addresses of its arrays; ``Cublas.product`` makes it.

    Matrices are row-major here and column-major in cuBLAS, which sees each of them transposed, and therefore computes
    y^T = w x^T of x w^T, and likewise for other forms. A bias is added to each column of that, as it should be; it has
    y's dtype, as cublasLt.h demands. c may be y itself.
    """

    def __init__(
        self, cublas: Cublas, n: int, m: int, k: int, T: str, U: str, bias: bool, add: bool, width: int,
        scales: Scales | None = None, fast: bool = False, form: str = "nt", line: int = 0,
        choose: Callable[[Product], Heuristic | None] | None = None,
    ) -> None:  # fmt: skip
        """choose: gives the algorithm, in place of ``cublas.choose``."""
        turned = FORMS[form]  # x and w
        stored = [size[::-1] if turn else size for size, turn in zip(((n, k), (k, m)), turned, strict=True)]
        steps = (line or stored[0][1], stored[1][1], width)  # from row to row
        left, right = (f"[{rows},{columns}]" for rows, columns in stored)
        product = f"x{left}{'^T' * turned[0]}:{T} w{right}{'^T' * turned[1]}"
        self.text = f"cuBLAS: y[{n},{m}]:{U} = {product}{' + b' * bias}{' + c' * add}"
        self.sizes, self.kind = (n, m, k), Kind(T, U, bias, add, form)
        self._cublas, self._bias, self._scaled = cublas, bias, scales is not None
        self._alpha, self._beta = ctypes.c_float(1), ctypes.c_float(add)
        self._lock = threading.Lock()
        owned = ExitStack()
        weakref.finalize(self, owned.close).atexit = False
        try:
            self._desc = cublas.make("MatmulDesc", owned, _COMPUTE_32F, _TYPES["f32"])
            for at, turn in zip((_DESC_TRANSB, _DESC_TRANSA), turned, strict=True):
                cublas.set("MatmulDesc", self._desc, at, _OPERATIONS[turn])
            if bias:
                cublas.set("MatmulDesc", self._desc, _DESC_EPILOGUE, _ADD_BIAS)
                # The heuristic reads from the address only how biases are aligned.
                cublas.set("MatmulDesc", self._desc, _DESC_BIAS_POINTER, ctypes.c_void_p(_ALIGNMENT))
            self._x, self._w, self._y = (
                cublas.make("MatrixLayout", owned, _TYPES[dtype], columns, rows, step)
                for dtype, (rows, columns), step in zip((T, T, U), (*stored, (n, m)), steps, strict=True)
            )
            known = scales is None or self._scale(scales, fast)
            self.algorithm = (choose or cublas.choose)(self) if known else None
        except DeviceError as e:
            raise DeviceError(f"{self.text}: {e}") from None

    @property
    def described(self) -> tuple[ctypes.c_void_p, ...]:
        """The operation and the layouts of w, x, c and y, as functions of the library take them."""
        return self._desc, self._w, self._x, self._y, self._y

    def _scale(self, scales: Scales, fast: bool) -> bool:
        """Describe the scales of an 8-bit product; whether the library knows such."""
        cublas, desc = self._cublas, self._desc
        cublas.set("MatmulDesc", desc, _DESC_FAST_ACCUM, ctypes.c_int8(fast))
        for pointer in _DESC_SCALE_POINTERS:
            cublas.set("MatmulDesc", desc, pointer, ctypes.c_void_p(_ALIGNMENT))
        modes = zip(_DESC_SCALE_MODES, scales.modes, strict=True)
        return all(mode == _SCALE_SCALAR or cublas.knows(desc, at, ctypes.c_int32(mode)) for at, mode in modes)

    def __call__(
        self, x: int, w: int, y: int, b: int = 0, c: int = 0, x_scale: int = 0, w_scale: int = 0,
        workspace: int = 0, stream: int = 0,
    ) -> None:  # fmt: skip
        """Queue the product. b, c and the scales are given if and only if it was planned with them. Raises DeviceError.

        workspace, stream: those of this call; 0 for the library's own.
        """
        cublas, layout = self._cublas, self._y
        assert self.algorithm is not None, "a product without an algorithm is not given to anyone"
        if (x | w | y | b | c | x_scale | w_scale) % _ALIGNMENT:
            raise DeviceError(f"{self.text}: an array does not begin at a multiple of {_ALIGNMENT} bytes")
        try:
            with self._lock:  # Such pointers are a part of the description, which the threads that call share.
                if self._bias:
                    cublas.set("MatmulDesc", self._desc, _DESC_BIAS_POINTER, ctypes.c_void_p(b))
                if self._scaled:
                    for at, scale in zip(_DESC_SCALE_POINTERS, (w_scale, x_scale), strict=True):
                        cublas.set("MatmulDesc", self._desc, at, ctypes.c_void_p(scale))
                cublas.call(
                    "cublasLtMatmul", cublas.handle, self._desc, ctypes.byref(self._alpha), w, self._w, x, self._x,
                    ctypes.byref(self._beta), c or y, layout, y, layout, ctypes.byref(self.algorithm),
                    workspace or cublas.workspace, cublas.size, stream or cublas.stream,
                )  # fmt: skip
        except DeviceError as e:
            raise DeviceError(f"{self.text}: {e}") from None
