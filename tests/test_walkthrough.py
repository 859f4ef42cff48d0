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

from tests.needs import needs_nvrtc
from tests.paths import ROOT

README = ROOT / "cuda_src" / "README.md"

_WRITE = re.compile(r"Write `([^`]+)`:\n\n```\w+\n(.*?)```", re.S)
_RUN = re.compile(r"```sh\n(.*?)```", re.S)


def _section() -> str:
    text = README.read_text(encoding="utf-8")
    return text.split("## Add an op in one sitting\n")[1].split("\n## ")[0]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the walkthrough touches and needs, with its two files written."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("cuplama", "cuda_src", "tests/ops"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    tests = (f"tests/{name}.py" for name in ("__init__", "conftest", "fakes", "paths", "speeds", "tiny"))
    for name in ("cli.py", "pyproject.toml", "weights/config.json", *tests):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    section = _section()
    for name, content in _WRITE.findall(section):
        assert not (folder / name).exists(), f"{name} is there already"
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_section_has_the_steps_that_are_followed() -> None:
    section = _section()
    assert [name for name, _ in _WRITE.findall(section)] == ["cuda_src/scale_add.cu", "cuplama/ops/scale_add.py"]
    assert sum(len(block.splitlines()) for block in _RUN.findall(section)) == 3


@pytest.mark.slow
@needs_nvrtc
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
    # 4 cases and 4 random ones, 3 dtypes: reference, launches on two GPUs, emulator; 4 at odd addresses; two of the
    # registry; the op as a function; four tests of the gradient on each case, finite differences among them.
    assert int(passed[1]) == 8 * 3 * 4 + 4 + 2 + 1 + 4 * 4
    assert "failed" not in tested
    assert "scale_add" in benched


@needs_nvrtc
def test_a_kernel_that_is_too_large_everywhere_is_refused(tree: Path) -> None:
    """By 0.9%, in bf16, by the defaults of bench and of compare."""
    right = (tree / "cuda_src" / "scale_add.cu").read_text(encoding="utf-8")
    large = re.sub(r"from_float<T>\((.*)\);", r"from_float<T>(1.009f * (\1));", right)
    assert large != right
    (tree / "large.cu").write_text(large, encoding="utf-8")
    done = _run([sys.executable, "cli.py", "kernels", "compare", "large.cu", "--op", "scale_add"], tree)
    assert done.returncode == 1, done.stdout
    refused = r"^refused: scale_add of large\.cu bf16 n=1 d=8: .*(is allowed|are wrong)"
    assert re.search(refused, done.stderr, re.M), done.stderr


def test_an_op_that_lacks_something_is_named(tree: Path) -> None:
    path = tree / "cuplama" / "ops" / "scale_add.py"
    right = path.read_text(encoding="utf-8")
    lines = "from cuplama.ops.missing import missing; print(*missing(), sep='\\n')"
    try:
        path.write_text(re.sub(r"    sizes=.*\n", "", right), encoding="utf-8")
        assert "op scale_add: no random sizes\n" in _run([sys.executable, "-c", lines], tree).stdout
        path.unlink()
        assert "scale_add.cu: no op launches it\n" in _run([sys.executable, "-c", lines], tree).stdout
    finally:
        path.write_text(right, encoding="utf-8")


@needs_nvrtc
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
