"""What ``import cuplama`` costs and shows."""

from __future__ import annotations

import os
import subprocess
import sys

import cuplama
from tests.paths import ROOT

LIMIT = 0.2  # seconds
LAZY = ["cupy", "cupy_backends", "cuda", "torch", "transformers"]
LAZY += ["jinja2", "huggingface_hub", "rich", "click", "tokenizers"]


def python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return done.stdout.strip()


def test_import_pulls_in_nothing_heavy() -> None:
    loaded = python("import sys, cuplama; print(*sys.modules)").split()
    assert "numpy" in loaded
    assert [name for name in LAZY if name in loaded] == []


def test_generating_on_numpy_needs_no_gpu_library() -> None:
    code = """
import sys, cuplama
with cuplama.load("tests/golden/cases/gpt2-char", device="numpy") as model:
    assert len(model.generate("First", max_tokens=2).text) == 2
print(*sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, cwd=ROOT)
    loaded = done.stdout.split()
    assert [name for name in LAZY if name in loaded] == ["tokenizers"]


def test_import_is_quick() -> None:
    """In processor time, and a few times over, because the machine may be busy with something else.

    Where NumPy alone takes long, the machine is slow: there cuplama may take three times as long as NumPy. One BLAS
    thread, because those that wait for work count as busy.
    """
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    own, numpy = (min(float(python(code.format(name))) for _ in range(5)) for name in ("cuplama", "numpy"))
    assert own < max(LIMIT, 3 * numpy)


def test_public_names() -> None:
    assert cuplama.__all__ == ["Completion", "CuplamaError", "Delta", "Model", "SamplingParams", "load"]
    for name in cuplama.__all__:
        assert getattr(cuplama, name).__module__.startswith("cuplama.")
        assert getattr(cuplama, name).__doc__
    assert cuplama.__version__.count(".") == 2
    found = python("from cuplama import *; print(*sorted(n for n in dir() if n[:1] != '_'))").split()
    assert found == sorted(cuplama.__all__)
