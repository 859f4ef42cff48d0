"""What several tests of the lab and of its commands share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cuplama.cli.main import cli
from cuplama.folders import source_folder
from cuplama.lab import inventory
from cuplama.lab.peaks import Peaks
from cuplama.ops.launch import Device
from cuplama.ops.op import Op

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="draws with matplotlib")
PEAKS = Peaks(read=4e12, arithmetic=8e14, dtype="bf16")
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
EXPERTS: dict[str, Any] = {
    **TINY,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}

_needed = inventory.needed
_all_needed = functools.cache(_needed)


def needed_once(
    device: Device, ops: Iterable[str] | None = None, outside: Sequence[Op] = ()
) -> dict[str, dict[str, inventory.Need]]:
    """``inventory.needed``, whose walk over all models takes seconds: what it finds for a device is kept."""
    return _all_needed(device) if ops is None and not outside else _needed(device, ops, outside)


def invoke(*args: str) -> Any:
    """Run ``cuplama kernels``."""
    return CliRunner().invoke(cli, ["kernels", *args])


def candidate(folder: Path, old: str = "", new: str = "") -> Path:
    """A copy of residual.cu, with ``old`` replaced by ``new``."""
    text = (source_folder() / "residual.cu").read_text()
    assert old in text
    path = folder / "mine.cu"
    path.write_text(text.replace(old, new) if old else text)
    return path


def inside(ax: Any, texts: Any) -> None:
    """Every text of a drawn picture lies inside the axes."""
    page = ax.get_window_extent()
    for text in texts:
        box = text.get_window_extent()
        shown = f"{text.get_text()!r} leaves the axes"
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, shown
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, shown
