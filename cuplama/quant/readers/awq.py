"""AutoAWQ's "gemm" layout: 4-bit codes and zero points, eight to a word along the outputs, in an order of its own.

Of casper-hansen/AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py. ``qweight`` i32 [in, out / 8],
``qzeros`` i32 [in / group, out / 8], ``scales`` f16 [in / group, out]; w = scale * (code - zero), zeros as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..fields import Field, word_plane
from ..format import whole
from ..grouping import by_element, by_groups, group_size
from ..modules import FLOATS, Module, Modules
from ..reader import Reader
from ..settings import Settings
from ..tensor import Tensor
from .notes import NOTES

__all__ = ["READER"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of a word's eight numbers lies in its bits 4 i .. 4 i + 3
_EACH = 8


@dataclass(frozen=True)
class _Awq:
    group: int  # inputs, -1 for all of them

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = Modules(tensors)
        for module in modules.named(".qweight"):
            self._read(module)
        return modules.finish({".qzeros": ".qweight", ".scales": ".qweight"})

    def _read(self, module: Module) -> None:
        words = module.take(".qweight", ("I32",))
        k, m = words.shape[0], words.shape[1] * _EACH
        group = k if self.group == -1 else self.group
        if k % group:
            module.refuse(".qweight", f"has {k} inputs; expected: a multiple of group_size {group}")
        zeros = module.take(".qzeros", ("I32",), (k // group, m // _EACH))
        scales = module.take(".scales", FLOATS, (k // group, m))
        code, zero = (Field((word_plane(x, 4, m, along=1, transposed=True, order=_ORDER),)) for x in (words, zeros))
        width = 0 if self.group == -1 else group
        scale = by_element(scales, transposed=True)
        module.put(by_groups("int4", whole(4), code, scale, scales.dtype, width, zero=zero, nbytes=module.nbytes))


def _open(settings: Settings) -> _Awq:
    settings.choice(("bits", "w_bit"), (4,))
    settings.choice(("version", "format", "checkpoint_format"), ("gemm",), "gemm")
    settings.choice("zero_point", (True,), True)
    settings.only(pack_dtype=("int32",))
    if settings.get("backend") == "llm-awq":
        settings.refuse("backend", "autoawq")
    settings.names("modules_to_not_convert")
    # transformers writes the fields of GPTQ with their defaults too, whatever is stored.
    settings.harmless("sym", "desc_act", "lm_head", "dynamic", *NOTES)
    return _Awq(group_size(settings, "group_size", "q_group_size"))


READER = Reader(("awq",), _open, "quant_config.json")
