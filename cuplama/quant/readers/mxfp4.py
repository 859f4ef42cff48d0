"""MXFP4 as gpt-oss is published: ``X_blocks`` u8 [experts, out, in / 32, 16], ``X_scales`` u8 [experts, out, in / 32].

Of openai/gpt-oss, gpt_oss/torch/weights.py, and transformers, integrations/mxfp4.py. A byte has two codes, the even
column in its low half; a scale is the exponent of a power of two, 127 more than it. Only experts are quantised, and
their tensors hold all of them; the weight goes by the name of the plain one, X.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..fields import Field, Plane, bytes_of, element_plane
from ..format import E2M1, grouped
from ..modules import Module, Modules
from ..reader import Reader
from ..settings import Settings
from ..stored import Stored
from ..tensor import Tensor

__all__ = ["READER"]

_GROUP, _BYTES = 32, 16
_BLOCKS, _SCALES = "_blocks", "_scales"
_FORMAT = grouped("mxfp4", E2M1, _GROUP, "e8m0")


class _Mxfp4:
    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = Modules(tensors)
        modules.drop_cache_scales()
        for module in modules.named(_BLOCKS):
            self._read(module)
        return modules.finish({_SCALES: _BLOCKS})

    def _read(self, module: Module) -> None:
        shape = module.tensor(_BLOCKS).shape
        experts, m, groups = (*shape, 1, 1, 1)[:3]
        blocks = module.take(_BLOCKS, ("U8",), (experts, m, groups, _BYTES))
        scales = module.take(_SCALES, ("U8", "F8_E8M0"), (experts, m, groups))
        rows, k = experts * m, groups * _GROUP
        line = np.arange(rows, dtype=np.int64) * (4 * k)
        code = Field((Plane(bytes_of(blocks), 4, line, np.arange(k, dtype=np.int64) * 4),))
        fields = {"code": code, "scale": Field((element_plane(scales.reshape(rows, groups)),))}
        module.put(Stored((rows, k), _FORMAT, fields, module.nbytes), "", (experts, m, k))


def _open(settings: Settings) -> _Mxfp4:
    settings.names("modules_to_not_convert")
    settings.harmless("dequantize")
    return _Mxfp4()


READER = Reader(("mxfp4",), _open)
