"""What ``import cuplama`` costs and shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuplama
from cuplama import errors
from tests.paths import ROOT

LIMIT = 0.2  # seconds
LAZY = ["cupy", "cupy_backends", "cuda", "torch", "transformers"]
EVERYTHING = "import cuplama; [getattr(cuplama, name) for name in cuplama.__all__]"
LAZY += ["asyncio", "jinja2", "huggingface_hub", "rich", "click", "tokenizers"]


def python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # or every start compiles the package again
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return done.stdout.strip()


def test_import_pulls_in_nothing_heavy() -> None:
    loaded = python(f"import sys; {EVERYTHING}; print(*sys.modules)").split()
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

    Where NumPy alone takes long, the machine is slow: there cuplama may take three and a half times as long as NumPy,
    which takes 58 ms where the limit is 0.2 s. One BLAS thread, because those that wait for work count as busy.
    """
    code = "import time; t = time.process_time(); {}; print(time.process_time() - t)"
    own, numpy = (min(float(python(code.format(line))) for _ in range(5)) for line in (EVERYTHING, "import numpy"))
    assert own < max(LIMIT, 3.5 * numpy)


def test_public_names() -> None:
    assert cuplama.__all__ == sorted(cuplama.__all__)
    assert set(errors.__all__) < set(cuplama.__all__)
    others = {"ChatOptions", "Completion", "Delta", "Model", "ModelConfig", "SamplingOptions", "SamplingParams"}
    others |= {"Answer", "AsyncStream", "ToolCall", "read_answer"}
    assert set(cuplama.__all__) - set(errors.__all__) == others | {"Stream", "Timings", "Token", "Tokenizer", "load"}
    for name in cuplama.__all__:
        assert getattr(cuplama, name).__module__.startswith("cuplama.")
        assert getattr(cuplama, name).__doc__
    assert cuplama.__version__.count(".") == 2
    found = python("from cuplama import *; print(*sorted(n for n in dir() if n[:1] != '_'))").split()
    assert found == sorted(cuplama.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'cuplama' has no attribute 'lod'"):
        cuplama.lod  # noqa: B018
    assert {"load", "Model", "__version__"} <= set(dir(cuplama))


@pytest.mark.parametrize("module", ["typing", "cuplama.cli.main", "click", "numpy", "cuplama.sampling_params"])
@pytest.mark.parametrize("argv", [["-m", "cuplama"], [str(ROOT / "cli.py")]])
def test_an_interrupt_while_modules_are_imported_ends_quietly(tmp_path: Path, module: str, argv: list[str]) -> None:
    """The process sends itself Ctrl-C when it begins to look for the module."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
""")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *argv, "generate", "Hi"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_every_error_is_a_cuplama_error() -> None:
    for name in errors.__all__:
        kind = getattr(cuplama, name)
        assert kind is getattr(errors, name)
        assert issubclass(kind, cuplama.CuplamaError)
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert found == set(errors.__all__)
    # Callers who know Python's own errors catch these, too.
    assert issubclass(cuplama.ParameterError, ValueError)
    assert issubclass(cuplama.PromptError, ValueError)
    assert issubclass(cuplama.ClosedError, RuntimeError)
    assert issubclass(cuplama.CopyError, TypeError)
