"""What tests of models share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.ops import OPS


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray[Any, Any]]:
    """The experts that references choose from here on, layer after layer: [rows, k] in ascending order."""
    found: list[np.ndarray[Any, Any]] = []

    def recorded(name: str) -> Any:
        reference = OPS[name].reference

        def run(logits: np.ndarray[Any, Any], *ins: Any, **attrs: Any) -> Any:
            outs = reference(logits, *ins, **attrs)
            if logits.shape[1] > 1:  # otherwise the gate of an expert that all tokens share
                found.append(np.sort(outs[0], -1))
            return outs

        return replace(OPS[name], reference=run)

    for name in ("route", "route_sparsemixer"):
        monkeypatch.setitem(OPS, name, recorded(name))
    return found
