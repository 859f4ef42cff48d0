"""The rules of the house that a program can check: sizes of files and functions, and whose names a module uses."""

from __future__ import annotations

import ast
import inspect
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from tests.fakes import FakeGpu
from tests.paths import GOLDEN, ROOT

MAX_FUNCTION, MAX_FILE, MAX_FRAMES = 60, 450, 10
_SOURCES = sorted(p for folder in ("cuplama", "tools", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", _SOURCES, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION}  # type: ignore[operator]
    assert not long


@pytest.mark.parametrize("path", _SOURCES, ids=_name)
def test_no_module_imports_a_private_name(path: Path) -> None:
    imports = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    ours = [n for n in imports if n.level or (n.module or "").startswith("cuplama")]
    private = [a.name for n in ours for a in n.names if re.match(r"_(?!_)", a.name)]
    assert not private


@pytest.mark.parametrize("path", _SOURCES, ids=_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert path.name == "__init__.py" or (doc and "TODO" not in doc)


def test_a_prompt_reaches_a_kernel_in_ten_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the caller's ``generate`` to what launches a kernel, for the first pass of a prompt."""
    folder = GOLDEN / "llama3-gqa"
    config = load_config(folder)
    backend = CudaBackend("f32", gpu=FakeGpu())
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    model = Model(folder, config, None, Engine(backend, config, weights, 64, 64), Settings())
    deepest: list[list[str]] = []

    def launcher(*_: Any) -> Any:
        def launch(*_: Any) -> None:
            frames = [f.function for f in inspect.stack()[1:]]
            deepest.append(frames[: frames.index("generate_from_here")])

        return launch

    monkeypatch.setattr(backend.gpu, "function", launcher)

    def generate_from_here() -> None:
        prompt = np.load(folder / "golden.npz")["prompt_1"].tolist()
        with suppress(cuplama.CuplamaError):  # the logits are what the memory held before
            model.generate(prompt, max_tokens=1)

    generate_from_here()
    assert deepest
    longest = max(deepest, key=len)
    assert len(longest) <= MAX_FRAMES, " < ".join(longest)


@pytest.mark.parametrize("path", sorted((ROOT / "cuda_src").rglob("*.cu*")), ids=_name)
def test_conditions_ahead_of_pragmas_have_braces(path: Path) -> None:
    """Where an ``if constexpr`` that does not hold has a loop with a pragma and no braces, NVRTC drops the next such
    loop, too. A product's sums were nowhere, and the emulator cannot see it."""
    assert not re.findall(r"(?:if constexpr \(.*\)|[^#]\belse)\n\s*#pragma", path.read_text(encoding="utf-8"))
