"""How tensors lie in a safetensors file, before anything of it is written.

The format is of https://github.com/huggingface/safetensors: the length of a header, the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..quant.compressed import TensorSpec

__all__ = ["ITEM_BYTES", "lay_out", "tensor_bytes"]

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's data."""
    return ITEM_BYTES[spec.dtype] * math.prod(spec.shape)


def lay_out(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """(the file's first bytes, up to the data; where each tensor begins, in bytes of the file, in their order there).

    The widest elements come first, so that every tensor is aligned. metadata: text by name for the header; format is
    "pt" without, as libraries that read models want it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at, offsets = 0, {}
    for name, spec in sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype]):
        end = at + tensor_bytes(spec)
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}
