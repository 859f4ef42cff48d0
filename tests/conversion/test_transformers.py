"""Folders that we write, read by transformers and compressed-tensors: the same logits as ours.

pip install -e ".[golden]" compressed-tensors
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cuplama
from cuplama.conversion.run import Options, quantise
from tests.conversion.made import TEXT, write_model

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")

CASES = [
    Options("int4", 32),
    Options("int4", 0),
    Options("int4", 32, "gptq", TEXT, samples=4, length=50, device="numpy"),
    Options("int8"),
    Options("int8", 32),
    Options("fp8"),
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: f"{o.format}-{o.group_size}-{o.method}")
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_transformers_computes_the_same_logits(options: Options, shard_bytes: int, tmp_path: Path) -> None:
    """In float32, on weights that both take apart: scales and codes of the file."""
    model, out, prompt = write_model(tmp_path / "model"), tmp_path / "out", list(range(3, 40))
    quantise(model, out, replace(options, shard_bytes=shard_bytes))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0].numpy()
    with cuplama.load(out, device="numpy") as ours:
        found = ours.logits(prompt)
    assert np.abs(found - expected).max() < 2e-3
    assert np.abs(expected).max() > 1
