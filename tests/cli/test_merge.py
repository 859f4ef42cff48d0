"""``cuplama merge``, and ``--adapter`` of the commands that load a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import write_adapter
from tests.conversion.made import TEXT, write_model

NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and an adapter of it."""
    model = write_model(tmp_path_factory.mktemp("plain"), torch_dtype="float32")
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), model, base_model_name_or_path=None)
    return str(model), str(adapter)


def test_a_merged_model_says_what_the_adapted_one_says(folders: tuple[str, str], run: Run, tmp_path: Path) -> None:
    model, adapter = folders
    out = str(tmp_path / "out")
    assert run("merge", model, adapter, out) == (0, f"{out}\n", "")
    assert run("merge", model, adapter, out) == (0, f"{out}\n", f"cuplama: {out} is finished; there is nothing to do\n")
    generate = ("generate", "To be", *NUMPY, "-n", "9", "--temp", "0", "-q")
    status, text, _ = run(*generate, "-m", out)
    assert status == 0
    assert run(*generate, "-m", model, "--adapter", adapter) == (0, text, "")
    assert run(*generate, "-m", model)[1] != text
    found = json.loads(run(*generate, "-m", model, "--adapter", adapter, "--json")[1])
    assert found["adapter"] == adapter
    (tmp_path / "text").write_text(TEXT[:200])
    perplexity = ("perplexity", str(tmp_path / "text"), *NUMPY, "--json", "-m")
    adapted, merged, plain = (
        json.loads(run(*perplexity, *which)[1])["perplexity"]
        for which in ((model, "--adapter", adapter), (out,), (model,))
    )
    assert adapted == pytest.approx(merged, rel=1e-5)
    assert adapted != pytest.approx(plain, rel=1e-2)


def test_info_shows_an_adapter(folders: tuple[str, str], run: Run) -> None:
    model, adapter = folders
    plain = json.loads(run("info", "-m", model, "--json")[1])
    found = json.loads(run("info", "-m", model, "--adapter", adapter, "--json")[1])
    assert plain["adapter"] is None
    size = 3 * 3 * ((64 + 64) + (64 + 32))  # layers, rank, q and v
    assert found["adapter"] == {"ranks": [3], "parameters": size, "modules": ["q_proj", "v_proj"], "base": None}
    assert found["parameters"] == plain["parameters"]
    assert found["bytes_by_part"].pop("adapter") >= 4 * size
    assert found["bytes_by_part"] == plain["bytes_by_part"]
    assert (
        f"LoRA of rank 3, {size:,} parameters, for q_proj, v_proj\n"
        in run("info", "-m", model, "--adapter", adapter)[1]
    )


def test_what_is_refused(folders: tuple[str, str], fails: Fails, tmp_path: Path) -> None:
    model, adapter = folders
    out = str(tmp_path / "out")
    assert "give its base model to -m and this folder to --adapter, or cuplama merge both" in fails(
        "generate", "x", "-m", adapter
    )
    assert "adapter_config.json does not exist" in fails("generate", "x", *NUMPY, "-m", model, "--adapter", model)
    assert "there' does not exist" in fails("merge", model, str(tmp_path / "there"), out)
    assert "--shard-size = 0 is out of range" in fails("merge", model, adapter, out, "--shard-size", "0")
    assert "--adapter needs a model's weights" in fails("info", "-m", "llama-3.2-1b", "--adapter", adapter)
