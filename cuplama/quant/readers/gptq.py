"""GPTQ's layout, versions 1 and 2: codes packed along the inputs, zero points along the outputs, low bits first.

Of ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear/__init__.py and utils/model.py. ``qweight`` i32 [in * bits / 32,
out], ``qzeros`` i32 [in / group, out * bits / 32], ``scales`` f16 [in / group, out], ``g_idx`` i32 [in], the group of
each input; w = scale * (code - zero). Version 1 stores zero - 1, within the bits of a code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..fields import Field, word_plane
from ..format import whole
from ..grouping import by_element, by_groups, group_size, sorted_columns
from ..modules import FLOATS, Module, Modules
from ..reader import Reader
from ..settings import Settings
from ..tensor import Tensor
from .notes import NOTES

__all__ = ["READER"]

_BITS = (4, 8)


@dataclass(frozen=True)
class _Linear:
    """How a module is stored. group: inputs, -1 for all of them; sorted: whether ``g_idx`` may be left out."""

    bits: int
    group: int
    symmetric: bool
    sorted: bool


@dataclass(frozen=True)
class _Gptq:
    """add: to the stored zero points; plain: how a module is stored; others: pattern -> how those modules are."""

    add: int
    plain: _Linear
    others: tuple[tuple[re.Pattern[str], _Linear], ...]

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = Modules(tensors)
        for module in modules.named(".qweight"):
            found = (how for pattern, how in self.others if any(map(pattern.match, module.names)))
            self._read(module, next(found, self.plain))
        return modules.finish(dict.fromkeys((".qzeros", ".scales", ".g_idx"), ".qweight"))

    def _read(self, module: Module, how: _Linear) -> None:
        bits, each = how.bits, 32 // how.bits
        words = module.take(".qweight", ("I32",))
        k, m = words.shape[0] * each, words.shape[1]
        group = k if how.group == -1 else how.group
        if k % group:
            module.refuse(".qweight", f"has {k} inputs of {bits} bits; expected: a multiple of group_size {group}")
        zeros = module.take(".qzeros", ("I32",), (k // group, -(-m // each)))
        scales = module.take(".scales", FLOATS, (k // group, m))
        order = None
        if module.has(".g_idx") or not how.sorted:
            even, order = sorted_columns(module.take(".g_idx", ("I32",), (k,)), group)
            if not even:
                module.refuse(".g_idx", f"does not put {group} of the {k} inputs into each of {k // group} groups")
        codes = Field((word_plane(words, bits, k, along=0, transposed=True),))
        if order is not None:
            codes = codes.take_columns(order)
        middle = 1 << (bits - 1)
        zero = Field((word_plane(zeros, bits, m, along=1, transposed=True),), add=self.add)
        symmetric = how.symmetric and _all(zeros, middle - self.add, bits)
        module.put(
            by_groups(
                f"int{bits}",
                whole(bits, middle) if symmetric else whole(bits),
                codes,
                by_element(scales, transposed=True),
                scales.dtype,
                0 if how.group == -1 else group,
                zero=None if symmetric else zero,
                order=order,
                nbytes=module.nbytes,
            )
        )


def _all(words: np.ndarray[Any, Any], number: int, bits: int) -> bool:
    """Whether all numbers of packed words are the same one."""
    word = np.uint32(sum(number << at for at in range(0, 32, bits)))
    return bool((words.view(np.uint32) == word).all())


def _open(settings: Settings) -> _Gptq:
    plain = _Linear(
        settings.choice("bits", _BITS),
        group_size(settings, "group_size"),
        settings.switch("sym", default=True),
        not settings.switch("desc_act"),
    )
    form = settings.choice(("checkpoint_format", "format"), ("gptq", "gptq_v2"), "gptq")
    settings.only(pack_dtype=("int32",), is_marlin_format=(False,))
    settings.switch("lm_head")
    settings.names("modules_to_not_convert")
    settings.harmless("backend", *NOTES)
    return _Gptq(int(form == "gptq"), plain, tuple(_overrides(settings.part("dynamic"), plain)))


def _overrides(dynamic: Settings, plain: _Linear) -> list[tuple[re.Pattern[str], _Linear]]:
    """GPTQModel's settings by module: a regular expression, after "+:" or nothing. Those after "-:" stay 16-bit, as the
    file shows."""
    found = []
    for name in dynamic.raw:
        begin = next((begin for begin in ("-:", "+:") if name.startswith(begin)), "")
        pattern = dynamic.patterns(name, [name], begin)[name]
        one = dynamic.part(name)
        if begin == "-:":
            one.harmless("*")
            continue
        how = replace(
            plain,
            bits=one.choice("bits", _BITS, plain.bits),
            symmetric=one.switch("sym", default=plain.symmetric),
            sorted=not one.switch("desc_act", default=not plain.sorted),
        )
        found.append((pattern, replace(how, group=group_size(one, "group_size")) if one.has("group_size") else how))
        one.harmless(*NOTES)
    return found


READER = Reader(("gptq",), _open, "quantize_config.json")
