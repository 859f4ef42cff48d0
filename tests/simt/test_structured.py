"""Constraints in captured steps: two graphs a step, and a mask between them."""

from __future__ import annotations

from typing import Any

import pytest

import cuplama
from cuplama import Model
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.text.tokenizer import Tokenizer
from tests.fakes import FakeGpu
from tests.tiny import CHARS

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'cuplama[serve]'")


def test_constrained_rows_and_free_ones_give_what_numpy_gives() -> None:
    config, backend = load_config(CHARS), CudaBackend("f32", gpu=FakeGpu(emulate=True))
    weights = {name: backend.load_weight(w) for name, w in load_weights(CHARS, config).items()}
    tokenizer = Tokenizer.load(CHARS)
    emulated = Model(CHARS, config, tokenizer, Engine(backend, config, weights, 80, 640), Settings())
    free: dict[str, Any] = {"temperature": 1.0, "seed": 9, "max_tokens": 12}
    bound = {**free, "regex": "[A-Z][a-z]{2,4}( [a-z]{2,3})?[.!]"}
    with cuplama.load(CHARS, device="numpy", cache_tokens=640) as plain:
        wanted = plain.generate("What", **free).text
        texts = [c.text for c in plain.generate(["First", "To be"], **bound)]
    stream = emulated.stream("What", **free)
    mixed = next(stream).text  # its other tokens share steps with those of the next call
    assert [c.text for c in emulated.generate(["First", "To be"], **bound)] == texts
    assert mixed + "".join(d.text for d in stream) == wanted
    assert all(text[-1] in ".!" for text in texts)
