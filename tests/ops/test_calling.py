"""Ops as functions on NumPy arrays: what they take, what they give, and what they say of themselves."""

from __future__ import annotations

import ast
import inspect
import pydoc
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuplama.ops.linear
from cuplama import ops
from cuplama.dtypes import DTYPES
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.linear import MAX_STREAMED_ROWS
from cuplama.ops.op import Op
from cuplama.ops.signature import OpError


@pytest.mark.parametrize("name", list(OPS))
def test_every_op_is_the_reference_on_numpy_arrays(name: str) -> None:
    op: Op = getattr(ops, name)
    workload = case_workload(op, op.cases[0], "bf16")
    arrays = workload.arrays()
    copies = [None if a is None else a.copy() for a in arrays]
    found = op(*arrays, **workload.attrs)
    outs = found if isinstance(found, tuple) else (found,)
    wanted = op.reference(*copies, **workload.attrs)
    for spec, out, want in zip(
        op.signature.outs, outs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    ):
        assert type(out) is np.ndarray
        assert out.dtype == workload.call.dtype(spec)
        assert out.shape == workload.call.shape(spec)
        assert np.array_equal(out.astype(np.float64), want.astype(out.dtype).astype(np.float64), equal_nan=True)
        given = [a for s, a in zip(op.signature.ins, arrays, strict=True) if s.name == spec.name]
        assert any(a is out for a in given) == (spec.name in op.signature.in_place)


def test_a_name_that_a_module_has_as_well_is_the_op() -> None:
    assert isinstance(ops.linear, Op)
    assert MAX_STREAMED_ROWS == sys.modules["cuplama.ops.linear"].MAX_STREAMED_ROWS
    assert cuplama.ops.linear is ops.linear is OPS["linear"]
    lines = "import cuplama.ops.rope, cuplama.ops.linear\nfrom cuplama import ops\nprint(ops.rope, ops.linear)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<op rope(")
    assert "<op linear(" in done.stdout


def test_type_checkers_are_told_of_such_names() -> None:
    """Without it they take ``ops.linear`` for the module as soon as something imports that."""
    tree = ast.parse(inspect.getsource(ops))
    told = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    names = {alias.name for statement in told[0].body for alias in statement.names}  # type: ignore[attr-defined]
    assert {"linear", "rope"} <= names <= {name for name in OPS if f"cuplama.ops.{name}" in sys.modules}


def test_a_name_that_is_no_op_is_told_with_one_that_is_near() -> None:
    with pytest.raises(AttributeError, match="has no 'rmsnorm'; did you mean 'rms_norm'"):
        _ = ops.rmsnorm
    with pytest.raises(AttributeError, match="has no 'xyzzy'; ops: silu_mul, "):
        _ = ops.xyzzy
    assert set(dir(ops)) == {*OPS, *ops.__all__}


def test_the_signature_is_that_of_a_function() -> None:
    assert str(inspect.signature(ops.rms_norm)) == "(x, w, *, eps, offset=0.0)"
    assert str(inspect.signature(ops.linear)) == "(x, w, b=None, *, U='T')"
    penalize = inspect.signature(ops.penalize).parameters  # its bias may be absent, and others come behind it
    assert penalize["bias"].default is inspect.Parameter.empty
    assert inspect.signature(Op).parameters["reference"].name == "reference"  # the class has its own
    for op in OPS.values():
        named = [p for p in inspect.signature(op).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [p.name for p in named] == [s.name for s in op.signature.attrs] + ["U"] * ("U" in op.parameters.free)
        assert op.__name__ == op.name  # type: ignore[attr-defined]  # what cupyx.profiler shows


def test_help_tells_arguments_results_and_rules() -> None:
    text = pydoc.plain(pydoc.render_doc(ops.kv_append))
    assert "kv_append = <op kv_append(x, slot_mapping, k, v)>" in text
    assert "slot_mapping  [n] i32" in text
    assert "k             [P, H, S, D] C, the array that was given, changed in place" in text
    assert "C, of the cache, is T or e4m3" in text
    assert "b       [m] T, or None" in pydoc.plain(pydoc.render_doc(ops.linear))
    for op in OPS.values():
        assert op.doc in (inspect.getdoc(op) or "")


def test_the_dtype_of_a_result_has_many_names() -> None:
    x = np.ones((2, 8), ml_dtypes.bfloat16)
    for given, wanted in ((None, "bf16"), ("T", "bf16"), ("f32", "f32"), (np.float32, "f32"), ("float32", "f32")):
        named = {} if given is None else {"U": given}
        assert ops.linear(x, x, **named).dtype == DTYPES[wanted]
    assert ops.linear(x, x, U=x.dtype).dtype == x.dtype
    with pytest.raises(OpError, match=r"^linear: U is float16; it may be T, which is bfloat16, or f32; the op is y\["):
        ops.linear(x, x, U="f16")
    with pytest.raises(OpError, match=r"^linear: U is \['f32'\], not a dtype: T or f32$"):
        ops.linear(x, x, U=["f32"])
    with pytest.raises(OpError, match=r"^linear: U is 'half a float', not a dtype: T or f32$"):
        ops.linear(x, x, U="half a float")


def test_a_result_whose_dtype_nothing_gives_is_asked_for_it() -> None:
    x = np.ones((2, 8), np.float32)
    for U in ("f32", "f16", "bf16"):
        assert ops.cast(x, U=U).dtype == DTYPES[U]
    with pytest.raises(OpError, match=r"^cast: attribute U is missing: "):
        ops.cast(x)
    with pytest.raises(OpError, match=r"^cast: U is 'T', not a dtype: f32 or f16 or bf16$"):
        ops.cast(x, U="T")
    with pytest.raises(OpError, match=r"^cast: U is float8_e4m3fn; it may be f32 or f16 or bf16; "):
        ops.cast(x, U="e4m3")
    assert '"f32" or "f16" or "bf16": the dtype of the result' in (inspect.getdoc(ops.cast) or "")


def test_attributes_may_be_numbers_of_numpy() -> None:
    x = np.ones((2, 24), np.float32)
    q, k = np.ones((2, 8), np.float32)
    wanted = ops.qk_norm(x, q, k, num_heads=1, num_kv_heads=1, eps=1e-6)
    found = ops.qk_norm(x, q, k, num_heads=np.int64(1), num_kv_heads=np.int32(1), eps=np.float32(1e-6))
    assert np.allclose(found, wanted)


_X, _W = np.ones((2, 8), np.float32), np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("arrays", "named", "message"),
    [
        ((_X[:, ::2], _W[:4]), {"eps": 1e-5}, r"x\[n,d\] is not contiguous; the op is "),
        ((_X.astype(np.float16), _W), {"eps": 1e-5}, r"x\[n,d\] is float16, not float32; the op is y\[n,d\]:T = \(x"),
        ((_X, _W.astype(np.float64)), {"eps": 1e-5}, r"T is float64; it may be f32, f16, bf16"),
        (([[1.0]], _W), {"eps": 1e-5}, r"x is a list, not a CuPy or NumPy array$"),
        ((_X, [1.0]), {"eps": 1e-5}, r"w is a list, not a CuPy or NumPy array; arrays of both kinds do not mix$"),
        ((_X,), {"eps": 1e-5}, r"input w is missing; the op is"),
        ((_X, _W), {"eps": None}, r"eps is None, not a number"),
        ((_X, _W), {}, r"attribute eps is missing"),
    ],
)
def test_what_does_not_fit_is_refused_as_on_a_gpu(arrays: Any, named: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message) as caught:
        ops.rms_norm(*arrays, **named)
    assert str(caught.value).startswith("rms_norm: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("left_out", "group"),
    [("sin", "rope_rows, cos, sin"), ("rope_rows", "rope_rows, cos, sin"), ("k_norm", "q_norm, k_norm")],
)
def test_inputs_that_go_together_are_all_given_or_none(left_out: str, group: str) -> None:
    """A kernel would read the absent one."""
    op = ops.append_attention
    case = next(c for c in op.cases if c["cos"] and c["q_norm"])
    workload = case_workload(op, case, "f32")
    given = {s.name: a for s, a in zip(op.signature.ins, workload.arrays(), strict=True)}
    op(**given, **workload.attrs)
    with pytest.raises(OpError, match=f"^append_attention: {group} go together: all of them, or none; the op is "):
        op(**given | {left_out: None}, **workload.attrs)


def test_ops_are_an_attribute_of_the_package() -> None:
    lines = "import cuplama\nprint(cuplama.ops.rms_norm)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout == "<op rms_norm(x, w, *, eps, offset=0.0)>\n"


def test_importing_ops_imports_neither_cupy_nor_a_backend() -> None:
    lines = "import sys\nfrom cuplama import ops\nprint([m for m in sys.modules if m[:4] == 'cupy' or 'backends' in m])"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
