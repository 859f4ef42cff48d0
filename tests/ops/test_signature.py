"""Signatures and prototypes: what is read from them, and that nothing unfit reaches a launch."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, dtype_name
from cuplama.folders import source_folder
from cuplama.ops import OPS
from cuplama.ops.binding import bind
from cuplama.ops.launch import Device, Launch
from cuplama.ops.op import Op
from cuplama.ops.prototypes import Parameter, parse_prototypes, prototypes
from cuplama.ops.signature import OpError, Signature, Spec, dim_names, dim_value

F32, F16, I32 = (DTYPES[t] for t in ("f32", "f16", "i32"))


# ---- reading a signature ---------------------------------------------------------------------------------------------


def test_parse() -> None:
    s = Signature.parse("y[n,m]:U, c[P]:T = (x[n,2*f]:T, c[P]:T, b[m]:T?, eps:f32)")
    assert s.outs == (Spec("y", ("n", "m"), "U"), Spec("c", ("P",), "T"))
    assert s.ins == (Spec("x", ("n", "2*f"), "T"), Spec("c", ("P",), "T"), Spec("b", ("m",), "T", True))
    assert s.attrs == (Spec("eps", None, "f32"),)
    assert s.in_place == {"c"}


@pytest.mark.parametrize("text", ["y[n:T = (x[n]:T)", "y[n]:T = (x[n])", "y[n]:T = (x[n]:T; w[n]:T)"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read the signature at"):
        Signature.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y[n]:f32 - (x[n]:f32)", r"^a signature is as in y\[n\]:T = .*, not 'y\[n\]:f32 - \(x\[n\]:f32\)'$"),
        ("y[n]:f32 = x[n]:f32", "^a signature is as in"),
        ("y[n]:f33 = (x[n]:f32)", "^y has the dtype f33; it may be f64, f32, .*, or a capital letter$"),
        ("y[n,2*e]:f32 = (x[n]:f32, d:i32)", "^y has a size e that no input gives: "),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Signature.parse(text)


def test_dim_expressions() -> None:
    assert dim_names("(num_heads+2*num_kv_heads)*D") == ("D", "num_heads", "num_kv_heads")
    assert dim_value("(num_heads+2*num_kv_heads)*D", dict(num_heads=4, num_kv_heads=2, D=8)) == 64


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_registry_is_consistent(op: Op) -> None:
    """Every op documents itself, has cases, and its cases fix every dim of its outputs."""
    assert OPS[op.name] is op
    assert op.doc
    assert op.cases
    known = {n for s in op.signature.ins for d in s.dims or () for n in dim_names(d)} | {
        s.name for s in op.signature.attrs
    }
    assert {n for s in op.signature.outs for d in s.dims or () for n in dim_names(d)} <= known


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_a_reference_has_the_defaults_of_the_signature(op: Op) -> None:
    given = inspect.signature(op.reference).parameters
    assert {name: given[name].default for name in op.signature.defaults} == op.signature.defaults


def test_an_attribute_may_have_a_default() -> None:
    signature = Signature.parse("y[n]:T = (x[n]:T, eps:f32, first:i32=-1, offset:f32=0.5)")
    assert signature.defaults == {"first": -1, "offset": 0.5}
    op = Op("shifted", signature.text, "y = x", lambda x, eps, first=-1, offset=0.5: x + offset)
    assert op(np.ones(2, np.float32), eps=0)[0] == 1.5
    assert op(np.ones(2, np.float32), eps=0, offset=2)[0] == 3
    assert str(inspect.signature(op)) == "(x, *, eps, first=-1, offset=0.5)"
    with pytest.raises(OpError, match="attribute eps is missing"):
        op(np.ones(2, np.float32))


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_names(name: str) -> None:
    assert dtype_name(DTYPES[name]) == name


# ---- binding arrays --------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: Any = F32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def test_bind_solves_dims_and_dtypes() -> None:
    call = OPS["linear"].bind([zeros(3, 8, dtype=F16), zeros(5, 8, dtype=F16)], {"U": "f32"})
    assert (call["n"], call["m"], call["k"]) == (3, 5, 8)
    assert call.dtypes == {"T": F16, "U": F32}
    (y,) = OPS["linear"].signature.outs
    assert call.shape(y) == (3, 5)
    assert call.dtype(y) == F32
    assert call.arrays["b"] is None
    assert call.nbytes() == 3 * 8 * 2 + 5 * 8 * 2 + 3 * 5 * 4
    assert call.flops() == 2 * 3 * 5 * 8


def test_bind_solves_expressions() -> None:
    call = OPS["silu_mul"].bind([zeros(2, 14)], {})
    assert call["f"] == 7
    call = OPS["qk_norm"].bind([zeros(1, 64), zeros(8), zeros(8)], dict(num_heads=4, num_kv_heads=2, eps=1e-5))
    assert call["D"] == 8


_NORM = dict(eps=1e-5)
_HEADS = dict(num_heads=4, num_kv_heads=2, eps=1e-5)


@pytest.mark.parametrize(
    ("op", "ins", "attrs", "message"),
    [
        ("rms_norm", [zeros(2, 8), zeros(7)], _NORM, r"rms_norm: w has 7 where d is 8"),
        ("silu_mul", [zeros(2, 7)], {}, r"silu_mul: x has 7 where 2\*f is 6"),
        ("qk_norm", [zeros(1, 65), zeros(8), zeros(8)], _HEADS, r"qk_norm: x has 65 where .* is 64"),
        ("rms_norm", [zeros(8), zeros(8)], _NORM, r"rms_norm: x\[n,d\] has shape \(8,\)"),
        ("rms_norm", [zeros(2, 8, dtype=F16), zeros(8)], _NORM, r"rms_norm: x\[n,d\] is float16, not float32"),
        ("linear", [zeros(1, 8), zeros(5, 8, dtype=F16)], {"U": "f32"}, r"linear: w\[m,k\] is float16, not float32"),
        ("embedding", [zeros(2), zeros(5, 8)], {}, r"embedding: input_ids\[n\] is float32, not int32"),
        ("add", [zeros(8, 2).T, zeros(2, 8)], {}, r"add: a\[n,d\] is not contiguous"),
        ("add", [zeros(2, 16)[:, ::2], zeros(2, 8)], {}, r"add: a\[n,d\] is not contiguous"),
        ("add", [zeros(2, 8)], {}, r"add: input b is missing"),
        ("add", [zeros(2, 8), None], {}, r"add: input b is missing"),
        ("add", [zeros(2, 8)] * 3, {}, r"add: 3 inputs for"),
        ("rms_norm", [zeros(2, 8), zeros(8)], {}, r"rms_norm: attribute eps is missing"),
    ],
)
def test_bind_refuses(op: str, ins: list[Any], attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        OPS[op].bind(ins, attrs)


# ---- reading prototypes ----------------------------------------------------------------------------------------------


_TEXT = """
// __global__ void commented_out(int n) {
__device__ float helper(float x) { return x; }
template <typename T, int D>
__global__ void __launch_bounds__(128)
    one(const T* __restrict__ x, T *y,  // the output
        unsigned long long seed, float eps) {
}
extern "C" __global__ void two(int n) {}
"""


def test_parse_prototypes() -> None:
    found = parse_prototypes(_TEXT)
    assert list(found) == ["one", "two"]
    assert found["one"].template == (Parameter("T", "typename"), Parameter("D", "int"))
    assert found["one"].parameters == (
        Parameter("x", "T", pointer=True, const=True),
        Parameter("y", "T", pointer=True),
        Parameter("seed", "unsigned long long"),
        Parameter("eps", "float"),
    )


def test_every_global_function_is_found() -> None:
    """The parser misses no kernel of cuda_src/: as many prototypes as the word __global__ in the code."""
    for path in source_folder().rglob("*.cu"):
        code = "\n".join(line.split("//")[0] for line in path.read_text(encoding="utf-8").splitlines())
        name = path.relative_to(source_folder()).as_posix()
        assert len(prototypes(name)) == code.count("__global__"), name


# ---- binding a launch ------------------------------------------------------------------------------------------------


def _linear(T: Any = F16) -> Any:
    call = OPS["linear"].bind([zeros(3, 8, dtype=T), zeros(5, 8, dtype=T)], {"U": "f32"})
    call.arrays["y"] = zeros(3, 5)
    return call


def test_bind_launch_by_name() -> None:
    call = _linear()
    assert OPS["linear"].kernels is not None
    (launch,) = OPS["linear"].kernels(call, Device()).launches
    bound = bind(launch, call, {})
    assert bound.expression.startswith("linear_mma<f16, f32, ")
    args = dict(zip((p.name for p in bound.prototype.parameters), bound.args, strict=True))
    assert args["w"] is call.arrays["w"]
    assert args["b"] == 0  # absent: a null pointer
    assert (args["m"], args["k"], args["first"]) == (5, 8, 0)
    assert all(type(args[name]) is np.int32 for name in ("m", "k", "first"))
    assert "linear_mma.cu: linear_mma<f16" in bound.describe()
    assert "w=(5, 8):float16" in bound.describe()


def test_bind_casts_attributes() -> None:
    call = OPS["rms_norm"].bind([zeros(2, 8), zeros(8)], {"eps": 1e-5})
    call.arrays["y"] = zeros(2, 8)
    bound = bind(Launch("norm.cu:rms_norm", (2,), (32,), constants={"CHUNKS": 1}), call, {})
    assert [(type(x), x) for x in bound.args[-2:]] == [(np.float32, np.float32(1e-5)), (np.float32, np.float32(0))]
    assert (bound.grid, bound.block) == ((2, 1, 1), (32, 1, 1))


def test_bind_names_what_is_missing() -> None:
    call = OPS["rms_norm"].bind([zeros(2, 8), zeros(8)], {"eps": 1e-5})
    call.arrays["y"] = zeros(2, 8)
    with pytest.raises(OpError, match="rms_norm: no value for template parameter CHUNKS"):
        bind(Launch("norm.cu:rms_norm", (2,), (32,)), call, {})
    del call.env["d"]
    with pytest.raises(OpError, match="rms_norm: no value for parameter d"):
        bind(Launch("norm.cu:rms_norm", (2,), (32,), constants={"CHUNKS": 1}), call, {})


def test_bind_checks_element_types() -> None:
    call = _linear()
    call.arrays["y"] = zeros(3, 5, dtype=np.float64)
    assert OPS["linear"].kernels is not None
    with pytest.raises(OpError, match=r"linear_mma: y is float64, the kernel takes f32\*"):
        bind(OPS["linear"].kernels(call, Device()).launches[0], call, {})


def test_rows_beyond_one_launch() -> None:
    """20 rows are groups of 8, 8 and 4."""
    call = OPS["linear"].bind([zeros(20, 8), zeros(5, 8)], {"U": "f32"})
    assert OPS["linear"].kernels is not None
    launches = OPS["linear"].kernels(call, Device()).launches
    assert [(x.constants["first"], x.constants["ROWS"]) for x in launches] == [(0, 8), (8, 8), (16, 4)]


def test_few_rows_go_to_tensor_cores() -> None:
    """Two to eight rows in 16 bits, where k and the GPU allow it; a ninth is a launch of its own."""

    def launched(n: int, k: int, T: Any, device: Device) -> list[str]:
        call = OPS["linear"].bind([zeros(n, k, dtype=T), zeros(50, k, dtype=T)], {"U": "f32"})
        assert OPS["linear"].kernels is not None
        return [launch.kernel for launch in OPS["linear"].kernels(call, device).launches]

    plain, tensor = ["linear.cu:linear"], ["linear_mma.cu:linear_mma"]
    assert launched(1, 64, F16, Device()) == plain
    assert launched(2, 64, F16, Device()) == launched(8, 64, F16, Device()) == tensor
    assert launched(9, 64, F16, Device()) == tensor + plain
    assert launched(10, 64, F16, Device()) == tensor + tensor
    assert launched(2, 64, F32, Device()) == launched(2, 68, F16, Device()) == plain
    assert launched(2, 64, F16, Device(arch=75)) == plain


def test_a_row_too_long_for_registers_is_refused() -> None:
    call = OPS["rms_norm"].bind([zeros(1, 16392), zeros(16392)], {"eps": 1e-5})
    assert OPS["rms_norm"].kernels is not None
    with pytest.raises(OpError, match="rms_norm: d is 16392; the kernel takes at most 16384"):
        OPS["rms_norm"].kernels(call, Device())


def test_kernels_that_wait_are_told_from_those_that_do_not() -> None:
    found = parse_prototypes(
        "__device__ void helper() { pdl_wait(); }\n"
        "__global__ void early(int n) { if (n) { n++; } pdl_wait(); }\n"
        "__global__ void plain(int n) { /* no pdl_wait() */ n++; }\n"
    )
    assert {name: p.waits for name, p in found.items()} == {"early": True, "plain": False}


def test_inline_ptx_is_in_two_headers() -> None:
    """The emulator supplies the functions of ptx.cuh, which includes the other, and nothing else."""
    found = {p.name for p in source_folder().rglob("*.cu*") if re.search(r"\b(__)?asm\b", p.read_text())}
    assert found == {"ptx.cuh", "ptx_wgmma.cuh"}


def test_whoever_waits_is_launched_early() -> None:
    """A kernel whose helper waits would be launched like any other, and nobody would see why it is slow."""
    for path in sorted(source_folder().glob("*.cu*")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
        calls = text.count("pdl_wait(") - ("void pdl_wait(" in text)
        assert calls == sum(p.waits for p in prototypes(path.name).values()), path.name


def test_what_a_waiting_kernel_gets_from_earlier_kernels_is_not_taken_for_constant() -> None:
    """A __restrict__ pointer lets the compiler move loads above the wait. Weights may have it: nothing writes them."""
    for file in source_folder().glob("*.cu"):
        text = file.read_text()
        for name, proto in prototypes(file.name).items():
            if proto.waits and file.stem.startswith("linear"):
                for changing in {"x", "a", "y"} & {p.name for p in proto.parameters}:
                    declared = text[text.index(f" {name}(") :].split("{")[0]
                    assert f"__restrict__ {changing}," not in declared, f"{file.name}: {name}: {changing}"
