"""Weights that are quantised while a model is loaded: the matrices of its layers, each number to the nearest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from ..errors import ParameterError
from ..quant.grid import GRIDS
from ..quant.rtn import GROUPS, Rounded, dividing_group
from ..quant.stored import Stored
from ..quant.weight import Weight
from .config import ModelConfig
from .family import GATES
from .graph import decoder

__all__ = ["linear_weights", "round_weights"]

_log = logging.getLogger("cuplama")


def linear_weights(config: ModelConfig) -> tuple[str, ...]:
    """The canonical names of the matrices that the layers multiply by, in the order of the graph; without ``GATES``."""
    products = (node for node in decoder(config).body if node.op == "linear" or node.op.startswith("expert_linear"))
    names = (node.ins[1] for node in products if "." in node.ins[1])
    return tuple(name for name in names if not name.endswith(GATES))


def round_weights(weights: Mapping[str, Weight], config: ModelConfig, quantize: str) -> dict[str, Weight]:
    """The weights with the layers' matrices quantised, as they are read. Embedding, head, norms and biases stay.

    quantize: one of ``GRIDS``. Whole rows share a scale, of "int4" groups of 128, or the most of 64 and 32 that divide
    a row; a matrix whose rows none of them divides stays as it is, and the log says so. Raises ParameterError for a
    model that is quantised already.
    """
    grid, found, left = GRIDS[quantize], dict(weights), []
    for name in linear_weights(config):
        weight = weights[name]
        if weight.packed:
            formats = " and ".join(form.name for form in weight.formats)
            raise ParameterError(f"quantize = {quantize!r}: the model is quantised already; {name} is {formats}")
        group = dividing_group(grid, weight.shape[-1])
        if group is None:
            left.append(name)
            continue
        plain = [p for p in weight.parts if not isinstance(p, Stored)]
        found[name] = replace(weight, parts=tuple(Rounded(p, grid, group) for p in plain))
    if left:
        width, sizes = weights[left[0]].shape[-1], ", ".join(map(str, GROUPS))
        which = f"{left[0]} and {len(left) - 1} more stay" if len(left) > 1 else f"{left[0]} stays"
        _log.warning("%s unquantised: none of %s divides %d", which, sizes, width)
    return found
