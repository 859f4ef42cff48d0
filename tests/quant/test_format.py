"""Weight formats: how stored bits become numbers, and that a weight knows its own."""

from __future__ import annotations

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.ops import OPS
from cuplama.ops.signature import OpError
from cuplama.ops.weights import weight_rows
from cuplama.quant.format import PLAIN, plain_format
from cuplama.quant.weight import Weight, as_stored


@pytest.mark.parametrize("name", list(PLAIN))
def test_a_plain_format_holds_its_numbers(name: str) -> None:
    """Every 16-bit pattern, or many numbers of all sizes; the float32 is the number itself, NaN and infinity too."""
    form = PLAIN[name]
    assert (form.name, form.dtype) == (name, DTYPES[name])
    assert form.dtype is not None
    if form.dtype.itemsize == 2:
        stored = np.arange(1 << 16, dtype=np.uint16).view(form.dtype).reshape(-1, 64)
    else:
        rng = np.random.default_rng(0)
        stored = (rng.standard_normal((9, 64)) * 10.0 ** rng.integers(-30, 30, (9, 1))).astype(form.dtype)
    found = form.decode(stored)
    assert found.dtype == np.float32
    assert np.array_equal(found, stored.astype(np.float32), equal_nan=True)
    assert np.array_equal(form.decode(stored[::2, 1:9]), stored[::2, 1:9].astype(np.float32), equal_nan=True)


def test_a_weight_has_the_format_of_its_tensors() -> None:
    for name, form in PLAIN.items():
        parts = tuple(np.ones((rows, 4), DTYPES[name]) for rows in (2, 3))
        weight = Weight("w", ("a", "b"), parts)
        assert weight.formats == (form,)
        assert form.decode(weight.array()).sum() == 20
        assert not weight.packed
        assert weight.device_bytes(DTYPES["f16"]) == 40
    with pytest.raises(ValueError, match="no plain weight format stores int32"):
        _ = Weight("w", ("a",), (np.ones((2, 2), np.int32),)).formats
    assert plain_format(np.dtype(np.float16)) is PLAIN["f16"]


def test_references_look_through_the_format() -> None:
    """The reference of every op with a weight gives the same from the numbers and from a packed format of them."""
    seen = 0
    for op in OPS.values():
        if all(spec.dtype != "W" or len(spec.dims or ()) != 2 for spec in op.signature.ins):
            continue
        case = op.cases[0]
        inputs = op.random_inputs(np.random.default_rng(0), case, DTYPES["f32"])
        attrs = {s.name: case[s.name] for s in op.signature.attrs if s.name in case}
        ins = [inputs[s.name] for s in op.signature.ins]
        stored = [
            as_stored(x, DTYPES["f32"]) if s.dtype == "W" and x is not None else x
            for s, x in zip(op.signature.ins, ins, strict=True)
        ]
        assert np.allclose(op.reference(*ins, **attrs), op.reference(*stored, **attrs), rtol=1e-6), op.name
        seen += 1
    assert seen == 17
    rows = np.arange(3, dtype=np.float64)
    assert weight_rows(rows, slice(1, 3)).dtype == np.float64


def test_a_plain_weight_has_the_dtype_of_the_model() -> None:
    """Whichever array comes first, x or the weight."""
    x, w = np.zeros((1, 8), np.float16), np.zeros((5, 8), np.float32)
    with pytest.raises(OpError, match=r"linear: w\[m,k\] is float32, not float16"):
        OPS["linear"].bind([x, w], {"U": "f32"})
    table, positions = np.zeros((5, 8), np.float16), np.zeros((5, 8), np.float32)
    with pytest.raises(OpError, match=r"embedding_pos: position_table\[P,d\] is float32, not float16"):
        OPS["embedding_pos"].bind([np.zeros(1, np.int32)] * 2 + [table, positions], {})
    call = OPS["embedding"].bind([np.zeros(1, np.int32), table], {})
    assert call.dtypes == {"T": DTYPES["f16"]}
