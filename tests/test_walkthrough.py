"""cuda_src/README.md, "Add an op in one sitting", followed to the letter in a copy of the tree."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

README = ROOT / "cuda_src" / "README.md"

_WRITE = re.compile(r"Write `([^`]+)`:\n\n```\w+\n(.*?)```", re.S)
_IN = re.compile(r"In `([^`]+)`, (change .*?)\.\n", re.S)
_CHANGE = re.compile(r"`([^`]+)`\s+to\s+`([^`]+)`")
_RUN = re.compile(r"```sh\n(.*?)```", re.S)


def _section() -> str:
    text = README.read_text(encoding="utf-8")
    return text.split("## Add an op in one sitting\n")[1].split("\n## ")[0]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the walkthrough touches and needs, with its steps 1 to 4 done."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("cuplama", "cuda_src", "tests/ops", "tests/simt"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("cli.py", "pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    section = _section()
    for name, content in _WRITE.findall(section):
        assert not (folder / name).exists(), f"{name} is there already"
        (folder / name).write_text(content, encoding="utf-8")
    for name, sentence in _IN.findall(section):
        path = folder / name
        for old, new in _CHANGE.findall(sentence):
            text = path.read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times; the walkthrough changes one"
            path.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def test_the_section_has_the_steps_that_are_followed() -> None:
    section = _section()
    assert [name for name, _ in _WRITE.findall(section)] == ["cuda_src/scale_add.cu", "cuplama/ops/scale_add.py"]
    assert [name for name, _ in _IN.findall(section)] == ["cuplama/ops/__init__.py", "tests/ops/harness.py"]
    assert sum(len(_CHANGE.findall(sentence)) for _, sentence in _IN.findall(section)) == 3
    assert sum(len(block.splitlines()) for block in _RUN.findall(section)) == 3


def test_the_commands_succeed(tree: Path) -> None:
    commands = [shlex.split(line) for block in _RUN.findall(_section()) for line in block.splitlines()]
    outputs = []
    for command in commands:
        done = _run([sys.executable, *command[1:]] if command[0] == "python" else command, tree)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    compiled, tested, benched = outputs
    # bf16 is not compiled for sm_75: 2 + 3 instances.
    assert re.search(r"^5 kernel instances for sm_75, sm_90 in .*; 0 problems$", compiled, re.M), compiled
    passed = re.search(r"(\d+) passed", tested)
    assert passed is not None
    assert int(passed[1]) >= 8 * 3 * 4  # 4 cases and 4 random ones, 3 dtypes: reference, 2 x launches, emulator
    assert "failed" not in tested
    assert "scale_add" in benched


def test_a_broken_kernel_is_refused_with_its_case(tree: Path) -> None:
    path = tree / "cuda_src" / "scale_add.cu"
    right = path.read_text(encoding="utf-8")
    try:
        path.write_text(right.replace("if (i >= size)", "if (i >= size - 8)"), encoding="utf-8")
        done = _run([sys.executable, "cli.py", "kernels", "bench", "scale_add", "--shape", "n=2,d=64"], tree)
    finally:
        path.write_text(right, encoding="utf-8")
    assert done.returncode == 1
    assert (
        "refused: scale_add bf16 n=2 d=64: 8 of 128 elements of y are wrong, the first at [1, 56]: nan" in done.stderr
    )
    assert "µs" not in done.stdout
