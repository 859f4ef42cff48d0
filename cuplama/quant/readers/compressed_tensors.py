"""compressed-tensors, as llm-compressor writes it: "pack-quantized", "int-quantized", "float-quantized" and "naive-".

Of vllm-project/compressed-tensors, compressors/pack_quantized, compressors/naive_quantized and quantization/. Packed:
``weight_packed`` i32 [out, ceil(in * bits / 32)], low bits first along the inputs, of codes that are 2^(bits - 1) more
than the number; ``weight_shape``; ``weight_zero_point`` alike, but packed along the outputs. Else ``weight`` i8 or e4m3
[out, in], and ``weight_zero_point`` i8. ``weight_scale`` [out, groups], [out, 1], [1] or [blocks, blocks];
``weight_g_idx`` i32 [in], the group of each input. w = scale * (number - zero).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..fields import Field, element_plane, word_plane
from ..format import E4M3, whole
from ..grouping import by_block, by_element, by_groups, by_row, sorted_columns
from ..modules import FLOATS, Module, Modules
from ..reader import Reader
from ..settings import Settings
from ..tensor import SAFETENSORS, Tensor
from .schemes import BLOCK, Scheme, Schemes, open_schemes

__all__ = ["READER"]

_log = logging.getLogger("cuplama")
_PACKED, _SCALE, _ZERO = ".weight_packed", ".weight_scale", ".weight_zero_point"
_ACTIVATIONS = tuple(f".{x}_{part}" for x in ("input", "output") for part in ("scale", "zero_point"))
_COMPANIONS = {
    ".weight_shape": _PACKED,
    **dict.fromkeys((_SCALE, _ZERO, ".weight_g_idx", *_ACTIVATIONS), ".weight_packed, nor a .weight in 8 bits"),
}


@dataclass(frozen=True)
class _CompressedTensors:
    schemes: Schemes

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = Modules(tensors)
        modules.drop_cache_scales()
        found = [
            (end, m) for end, *dtypes in ((_PACKED,), (".weight", "I8", "F8_E4M3")) for m in modules.named(end, *dtypes)
        ]
        sixteen = 0
        for end, module in found:
            scheme = self.schemes.of(module.names)
            if scheme is None:
                module.refuse(end, "is quantised, but no group of quantization_config.config_groups has it as a target")
            sixteen += scheme.activations
            _read(module, scheme)
        if sixteen:
            _log.info(
                "activations of %d modules stay 16-bit, which is more exact than the checkpoint asks for", sixteen
            )
        return modules.finish(_COMPANIONS)


def _read(module: Module, scheme: Scheme) -> None:
    codes = _packed_codes(module, scheme.bits) if scheme.packed else _plain_codes(module, scheme.real)
    m, k = codes.shape
    group = scheme.group if scheme.strategy == "group" else BLOCK if scheme.strategy == "block" else 0
    if scheme.strategy == "group" and k % group:
        module.refuse(
            _PACKED if scheme.packed else ".weight", f"has {k} inputs; expected: a multiple of group_size {group}"
        )
    order = None if scheme.sorted else _order(module, k, group)
    scale = module.take(_SCALE, FLOATS, *_shapes(scheme, m, k))
    zero = _zero(module, scheme, m, k)
    bits = scheme.bits if scheme.packed else 8
    code = E4M3 if scheme.real else whole(bits) if zero is not None else whole(bits, 1 << (bits - 1))
    module.drop(*_ACTIVATIONS)
    module.put(
        by_groups(
            "fp8" if scheme.real else f"int{bits}",
            code,
            codes if order is None else codes.take_columns(order),
            _spread(scale, scheme, m),
            scale.dtype,
            group,
            zero=zero,
            order=order,
            nbytes=module.nbytes,
        )
    )


def _packed_codes(module: Module, bits: int) -> Field:
    m, k = (int(x) for x in module.take(".weight_shape", ("I64", "I32"), (2,)))
    if m < 1 or k < 1:
        module.refuse(".weight_shape", f"says {[m, k]}; expected: positive sizes")
    words = module.take(_PACKED, ("I32",), (m, -(-k * bits // 32)))
    return Field((word_plane(words, bits, k, along=1),))


def _plain_codes(module: Module, real: bool) -> Field:
    """Signed bytes as unsigned ones, 128 more."""
    weight = module.take(".weight", ("F8_E4M3",) if real else ("I8",))
    return Field((element_plane(weight),), flip=0 if real else 0x80)


def _order(module: Module, k: int, group: int) -> np.ndarray[Any, Any] | None:
    """The columns sorted by group; -1 in the list says that they never were in another order."""
    g_idx = module.take(".weight_g_idx", ("I32", "I64"), (k,))
    if (g_idx == -1).any():
        return None
    even, order = sorted_columns(g_idx, group)
    if not even:
        module.refuse(".weight_g_idx", f"does not put {group} of the {k} inputs into each of {k // group} groups")
    return order


def _shapes(scheme: Scheme, m: int, k: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that scales may have."""
    if scheme.strategy == "group":
        return ((m, k // scheme.group),)
    if scheme.strategy == "block":
        return ((-(-m // BLOCK), -(-k // BLOCK)),)
    return ((m, 1), (m,)) if scheme.strategy == "channel" else ((1,), (), (1, 1))


def _spread(array: np.ndarray[Any, Any], scheme: Scheme, m: int) -> Field:
    """What scales or zero points are for each row and group."""
    if scheme.strategy == "group":
        return by_element(array)
    return by_block(array, m, BLOCK) if scheme.strategy == "block" else by_row(array, m)


def _zero(module: Module, scheme: Scheme, m: int, k: int) -> Field | None:
    if scheme.symmetric:
        if module.has(_ZERO) and (data := module.take(_ZERO, tuple(SAFETENSORS), module.tensor(_ZERO).shape)).any():
            module.refuse(
                _ZERO, f"has {np.count_nonzero(data)} zero points that are not 0; expected: none, symmetric is true"
            )
        return None
    if scheme.packed and scheme.strategy != "tensor":
        columns = k // scheme.group if scheme.strategy == "group" else 1
        words = module.take(_ZERO, ("I32",), (-(-m * scheme.bits // 32), columns))
        return Field((word_plane(words, scheme.bits, m, along=0),))
    zeros = module.take(_ZERO, ("I8",), *_shapes(scheme, m, k))
    return replace(_spread(zeros, scheme, m), add=1 << (scheme.bits - 1) if scheme.packed else 128)


def _open(settings: Settings) -> _CompressedTensors:
    return _CompressedTensors(open_schemes(settings))


READER = Reader(("compressed-tensors",), _open)
