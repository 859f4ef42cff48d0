"""The wheel, installed into an empty environment away from the checkout, generates text with the bundled model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.paths import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "cuplama", "cuda_src", "weights")


def call(args: Sequence[str | Path], cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: building in place would leave a build folder behind."""
    if not (ROOT / "weights" / "model.safetensors").exists():
        pytest.skip("weights/model.safetensors is not there yet")
    # With setuptools here, no package index is asked; without it, pip gets it into an environment of its own.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
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
        ("cuplama", ("*.py", "*/*.py", "py.typed"), "cuplama"),
        ("cuda_src", ("*.cu", "*.cuh"), "cuplama/cuda_src"),
        ("weights", ("*.json", "*.safetensors"), "cuplama/weights"),
    ):
        files = [p for pattern in patterns for p in (ROOT / folder).glob(pattern)]
        assert files
        assert {f"{inside}/{p.relative_to(ROOT / folder)}" for p in files} <= names
    assert not [n for n in names if n.startswith(("tests", "tools", "benchmarks", "cli.py"))]
    assert any(n.endswith("/LICENSE") for n in names)


def test_the_installed_wheel_generates_text(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment, seen through a .pth file behind the new one's own packages."""
    call([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    call([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], tmp_path)
    assert (site / "cuplama").is_dir()
    # Plain paths only: this environment's own .pth files (an editable cuplama) are not followed.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = call([python, "-c", "import cuplama; print(cuplama.__file__)"], elsewhere).strip()
    assert where == str(site / "cuplama" / "__init__.py")
    command = tmp_path / "venv" / "bin" / "cuplama"
    story = call([command, "generate", "Once upon a time", "-n", "12", "--temp", "0", "--device", "numpy"], elsewhere)
    assert len(story.split()) >= 5
    code = (
        "import cuplama\n"
        "with cuplama.load(device='numpy') as model:\n"
        "    print(model.generate('Once upon a time', max_tokens=12, temperature=0).text, end='')\n"
    )
    assert call([python, "-c", code], elsewhere) == story
    assert "LlamaForCausalLM" in call([command, "info"], elsewhere)
    assert not list(elsewhere.iterdir())
