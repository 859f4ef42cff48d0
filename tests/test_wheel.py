"""The wheel, installed into an empty environment away from the checkout, generates text with the bundled model."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import cuplama
from tests.needs import needs_nvrtc
from tests.paths import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "cuplama", "cuda_src", "weights")


def call(args: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"} | variables
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: building in place would leave a build folder behind."""
    if not (ROOT / "weights" / "model.safetensors").exists():
        pytest.skip("weights/model.safetensors is not there yet")
    # With hatchling here, no package index is asked; without it, pip gets it into an environment of its own.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source / name)
    call([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", out, source], out)
    (found,) = out.glob("*.whl")
    return found


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, patterns, inside in (
        ("cuplama", ("**/*.py", "py.typed", "simt/*.cpp", "simt/include/*.h", "server/page/*"), "cuplama"),
        ("cuda_src", ("**/*.cu", "**/*.cuh"), "cuplama/cuda_src"),
        ("weights", ("*.json", "*.safetensors"), "cuplama/weights"),
    ):
        files = [p for pattern in patterns for p in (ROOT / folder).glob(pattern)]
        assert files
        assert {f"{inside}/{p.relative_to(ROOT / folder)}" for p in files} <= names
    assert not [n for n in names if n.startswith(("tests", "tools", "benchmarks", "cli.py", "cuda_src", "weights"))]
    assert any(n.endswith("/LICENSE") for n in names)
    assert wheel.name.startswith(f"cuplama-{cuplama.__version__}-")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment that has the wheel, and an empty folder away from the checkout.

    The dependencies are those of this environment, seen through a .pth file behind the new one's own packages.
    """
    folder = tmp_path_factory.mktemp("installed")
    call([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    call([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], folder)
    assert (site / "cuplama").is_dir()
    # Plain paths only: this environment's own .pth files (an editable cuplama) are not followed.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    (folder / "elsewhere").mkdir()
    where = call([python, "-c", "import cuplama; print(cuplama.__file__)"], folder / "elsewhere").strip()
    assert where == str(site / "cuplama" / "__init__.py")
    return folder


def test_the_installed_wheel_generates_text(installed: Path) -> None:
    elsewhere, binaries = installed / "elsewhere", installed / "venv" / "bin"
    story = call([binaries / "cuplama", "generate", "Once upon a time", "-n", "12", "--temp", "0", "--device", "numpy"],
                 elsewhere)  # fmt: skip
    assert len(story.split()) >= 5
    code = (
        "import cuplama\n"
        "with cuplama.load(device='numpy') as model:\n"
        "    print(model.generate('Once upon a time', max_tokens=12, temperature=0).text)\n"
    )
    assert call([binaries / "python", "-c", code], elsewhere) == story
    assert "LlamaForCausalLM" in call([binaries / "cuplama", "info"], elsewhere)
    assert not list(elsewhere.iterdir())


_FAULT = """
from pathlib import Path
import cuplama
import numpy as np
from cuplama.ops.binding import BoundLaunch
from cuplama.ops.prototypes import prototypes
from cuplama.simt.emulator import KernelFault, run
x, y = np.ones((2, 16), np.float32), np.zeros((1, 8), np.float32)  # y lacks a row
prototype = prototypes("activation.cu")["silu_mul"]
args = (x, y, np.int32(8))
print(Path(cuplama.__file__).parents[1])
try:
    run(BoundLaunch("activation.cu", "silu_mul<f32>", (2, 1, 1), (32, 1, 1), 0, args, prototype))
except KernelFault as fault:
    print(str(fault).splitlines()[0])
"""


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
def test_the_installed_wheel_runs_kernels_on_the_emulator(installed: Path) -> None:
    """A right kernel is judged right, and a fault has the line of the file as a checkout calls it."""
    elsewhere, (site,) = installed / "elsewhere", (installed / "venv").glob("lib/python*/site-packages")
    # This environment's Python, because NVRTC is looked for beside it; the wheel's modules come before its own.
    table = call([sys.executable, "-m", "cuplama", "kernels", "bench", "add"], elsewhere, PYTHONPATH=str(site))
    assert re.search(r"\badd\b", table), table
    fault = call([sys.executable, "-c", _FAULT], elsewhere, PYTHONPATH=str(site))
    assert fault.startswith(f"{site}\nglobal-out-of-bounds: silu_mul<f32>: block ")
    assert re.search(r": cuda_src/\w+\.cuh?:\d+$", fault.strip()), fault
