"""``cuplama quantize``, and ``--quantize`` of the commands that load a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.made import TEXT, write_model

NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("plain")))


def test_a_folder_is_written_and_used(model: str, run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    quantize = ("quantize", model, out, "--format", "fp8")
    assert run(*quantize) == (0, f"{out}\n", "")
    assert run(*quantize) == (0, f"{out}\n", f"cuplama: {out} is finished; there is nothing to do\n")
    generate = ("generate", "To be", *NUMPY, "-n", "9", "--temp", "0", "-q")
    status, text, _ = run(*generate, "-m", out)
    assert status == 0
    assert run(*generate, "-m", model, "--quantize", "fp8") == (0, text, "")
    assert run(*generate, "-m", model)[1] != text
    assert "fp8" in json.loads(run("info", "-m", out, "--json")[1])["weight_formats"]
    formats = json.loads(run("info", "-m", model, "--quantize", "int4", "--json")[1])["weight_formats"]
    assert formats["int4 g64"]["bits"] == 4.25
    assert formats["int4 g32"]["bits"] == 4.5


def test_gptq_by_a_text(model: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    out = str(tmp_path / "out")
    gptq = ("--format", "int4", "--method", "gptq", "--calibrate", str(tmp_path / "text"), "--samples", "3", *NUMPY)
    assert run("quantize", model, out, *gptq)[0] == 0
    recipe = json.loads((tmp_path / "out" / "quantize.json").read_text())["recipe"]
    assert {name: recipe[name] for name in ("method", "samples", "length", "group_size")} == {
        "method": "gptq",
        "samples": 3,
        "length": 128,
        "group_size": 32,
    }


def test_what_is_refused(model: str, fails: Fails, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "empty").write_text("")
    quantize = ("quantize", model, out, "--format", "int4")
    assert "--method gptq needs --calibrate FILE" in fails(*quantize, "--method", "gptq")
    assert "--method gptq needs --calibrate FILE" in fails(*quantize, "--calibrate", "x")
    assert "empty is empty" in fails(*quantize, "--method", "gptq", "--calibrate", str(tmp_path / "empty"))
    assert "--group-size = 64 does not divide the rows of model.layers.0" in fails(*quantize, "--group-size", "64")
    for size in ("nan", "inf", "0", "-1"):
        assert f"--shard-size = {size} is out of range; it must be a number of GB" in fails(
            *quantize, "--shard-size", size
        )
    assert "there' does not exist" in fails("quantize", str(tmp_path / "there"), out, "--format", "int4")
    assert "'int5' is not one of 'int4', 'int8', 'fp8'" in fails("quantize", model, out, "--format", "int5")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    assert f"{out} is not empty" in fails(*quantize)
    shape = ("info", "-m", "llama-3.2-1b", "--quantize", "int4")
    assert "--quantize needs a model's weights" in fails(*shape)
    bench = ("bench", "-m", "llama-3.2-1b", "--dummy-weights", "--quantize", "int4")
    assert "with --dummy-weights it is --weight-format" in fails(*bench)
