"""8-bit floats as vendors publish them, "fp8" and "fbgemm_fp8": ``weight`` e4m3 [out, in] and scales to multiply by.

Of transformers, integrations/finegrained_fp8.py and integrations/fbgemm_fp8.py. ``weight_scale_inv`` or
``weight_scale``: [ceil(out / 128), ceil(in / 128)] for blocks, [out, 1] for rows, a single number for all. What is
there to quantise activations with is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..format import E4M3
from ..grouping import by_block, by_element, by_groups, by_row
from ..modules import FLOATS, Module, Modules
from ..reader import Reader
from ..settings import Settings
from ..tensor import Tensor

__all__ = ["READER"]

_BLOCK = 128
_SCALES = (".weight_scale_inv", ".weight_scale")
_ACTIVATIONS = (".activation_scale", ".input_scale", ".input_scale_ub", ".output_scale")


@dataclass(frozen=True)
class _Fp8:
    blocks: bool

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = Modules(tensors)
        modules.drop_cache_scales()
        for module in modules.named(".weight", "F8_E4M3"):
            self._read(module)
        return modules.finish(dict.fromkeys((*_SCALES, *_ACTIVATIONS), ".weight of dtype F8_E4M3"))

    def _read(self, module: Module) -> None:
        weight = module.take(".weight", ("F8_E4M3",))
        m, k = weight.shape
        end = next((end for end in _SCALES if module.has(end)), _SCALES[0])
        blocks = (-(-m // _BLOCK), -(-k // _BLOCK))
        shapes = (blocks,) if self.blocks else ((), (1,), (1, 1), (m,), (m, 1))
        scale = module.take(end, (*FLOATS, "F8_E8M0"), *shapes)
        if scale.dtype == np.uint8:  # powers of two, by their exponent
            scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
        module.drop(*_ACTIVATIONS)
        scales, group = (by_block(scale, m, _BLOCK), _BLOCK) if self.blocks else (by_row(scale, m), 0)
        module.put(by_groups("fp8", E4M3, by_element(weight), scales, scale.dtype, group, nbytes=module.nbytes))


def _open(settings: Settings) -> _Fp8:
    settings.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    settings.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    settings.only(weight_block_size=([_BLOCK, _BLOCK],), expert_dtype=("fp8",), scale_fmt=("ue8m0", "float"))
    settings.names("modules_to_not_convert", "ignored_layers", "ignored_modules")
    settings.harmless("modules_to_convert", "activation_scale_ub", "dequantize", "kv_cache_scheme", "is_checkpoint_*")
    return _Fp8(settings.has("weight_block_size"))


READER = Reader(("fp8", "fbgemm_fp8"), _open)
