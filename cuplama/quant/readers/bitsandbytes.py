"""bitsandbytes: NF4 in blocks along the rows, the scales themselves quantised or not, and 8-bit rows of LLM.int8().

Of bitsandbytes, functional.py, utils.py and backends/default/ops.py. NF4: ``weight`` u8, two codes a byte, the earlier
one in the upper half, over the rows one after the other; ``weight.absmax`` f32, one for each block of 64; where they
are quantised u8, to be looked up in ``weight.nested_quant_map``, times ``weight.nested_absmax``, one for 256 of them,
plus an offset; sizes in a JSON. 8 bits: ``weight`` i8 [out, in], ``SCB`` f32 [out], the largest magnitude of each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..fields import Field, Plane, bytes_of, element_plane
from ..format import NF4, NF4_NUMBERS, whole
from ..grouping import by_element, by_groups, by_row
from ..modules import Module, Modules
from ..reader import Reader
from ..settings import Settings
from ..tensor import Tensor

__all__ = ["READER"]

_STATE = ".weight.quant_state.bitsandbytes__"
_STORAGE = ("U8", "BF16", "F16", "F32")  # the bytes of codes may be called any of these
_MOST = 2**31 - 1  # of a size
_COMPANIONS = {
    **{f".weight.{x}": _STATE + "nf4" for x in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
    ".weight_format": ".SCB",
}


class _Bits:
    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = Modules(tensors)
        for module in modules.named(_STATE + "nf4"):
            _read_nf4(module)
        for module in modules.named(_STATE + "fp4"):
            module.refuse(_STATE + "fp4", "says that the weight is in fp4; expected: nf4")
        for module in modules.named(".SCB"):
            _read_int8(module)
        return modules.finish(_COMPANIONS)


@dataclass(frozen=True)
class _State:
    """What the JSON says. offset: of quantised scales, else None."""

    m: int
    k: int
    block: int
    nested: int
    offset: float | None


def _state(module: Module) -> _State:
    end = _STATE + "nf4"
    data = module.take(end, ("U8",), module.tensor(end).shape)
    try:
        raw = json.loads(data.tobytes())
        m, k = raw["shape"]
        nested = raw.get("nested_blocksize")
        state = _State(m, k, raw["blocksize"], nested or 0, float(raw["nested_offset"]) if nested else None)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        module.refuse(end, f"is no JSON with shape, blocksize and nested_offset ({type(e).__name__}: {e})")
    sizes = (m, k, state.block, state.nested or 1)
    if not all(type(x) is int and 0 < x <= _MOST for x in sizes):
        said = f"shape {raw['shape']}, blocksize {state.block} and nested_blocksize {state.nested}"
        module.refuse(end, f"says {said:.160}; expected: whole numbers from 1 to {_MOST}")
    if state.block % 64 or k % state.block:
        module.refuse(end, f"says blocks of {state.block} and rows of {k}; expected: whole blocks of a multiple of 64")
    return state


def _read_nf4(module: Module) -> None:
    state = _state(module)
    m, k, blocks = state.m, state.k, state.m * state.k // state.block
    codes = bytes_of(module.take(".weight", _STORAGE, module.tensor(".weight").shape))
    if codes.size * 2 != m * k:
        module.refuse(".weight", f"has {codes.size} bytes; expected: {m * k // 2} for {m} x {k} codes of 4 bits")
    numbers = module.take(".weight.quant_map", ("F32",), (16,))
    if not np.array_equal(numbers, np.array(NF4_NUMBERS, np.float32)):
        module.refuse(".weight.quant_map", "has other numbers than NF4")
    if state.offset is None:
        scale = module.take(".weight.absmax", ("F32",), (blocks,))
    else:
        scale = _nested(module, state, blocks)
    columns = np.arange(k, dtype=np.int64)
    plane = Plane(codes, 4, np.arange(m, dtype=np.int64) * (4 * k), columns // 2 * 8 + 4 * (1 - columns % 2))
    scales = by_element(scale.reshape(m, -1))
    module.put(by_groups("nf4", NF4, Field((plane,)), scales, scale.dtype, state.block, nbytes=module.nbytes))


def _nested(module: Module, state: _State, blocks: int) -> np.ndarray[Any, Any]:
    """The scales of blocks from quantised ones, float32 [blocks]."""
    codes = module.take(".weight.absmax", ("U8",), (blocks,))
    table = module.take(".weight.nested_quant_map", ("F32",), (256,))
    outer = module.take(".weight.nested_absmax", ("F32",), (-(-blocks // state.nested),))
    found: np.ndarray[Any, Any] = table[codes]
    whole = blocks // state.nested
    found[: whole * state.nested].reshape(whole, state.nested)[...] *= outer[:whole, None]
    found[whole * state.nested :] *= outer[-1]
    found += np.float32(state.offset)
    return found


def _read_int8(module: Module) -> None:
    weight = module.take(".weight", ("I8",))
    m = len(weight)
    largest = module.take(".SCB", ("F32",), (m,))
    if module.has(".weight_format") and np.any(module.take(".weight_format", ("U8",), (), (1,))):
        module.refuse(".SCB", "belongs to a weight whose weight_format is not 0; expected: rows one after the other")
    scale = largest / np.float32(127)
    codes = Field((element_plane(weight),), flip=0x80)
    module.put(by_groups("int8", whole(8, 128), codes, by_row(scale, m), scale.dtype, 0, nbytes=module.nbytes))


def _open(settings: Settings) -> _Bits:
    four = settings.switch("load_in_4bit", "_load_in_4bit")
    eight = settings.switch("load_in_8bit", "_load_in_8bit")
    if four == eight:
        settings.refuse("load_in_4bit", "true, or load_in_8bit true")
    if four:
        settings.choice("bnb_4bit_quant_type", ("nf4",))
        settings.switch("bnb_4bit_use_double_quant")
    settings.names("llm_int8_skip_modules")
    # The products' own affairs: outliers among activations, their dtype, the container of the codes.
    settings.harmless("bnb_4bit_*", "llm_int8_*")
    return _Bits()


READER = Reader(("bitsandbytes",), _open, signs=("load_in_4bit", "load_in_8bit"))
