"""``cuplama completion``: the scripts, and what the command line answers to them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.processes import LAUNCHER, environment

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, run: Run, tmp_path: Path) -> None:
    status, out, err = run("completion", shell)
    assert (status, err) == (0, "")
    assert f"_CUPLAMA_COMPLETE={shell}_complete" in out
    if shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


def test_answers() -> None:
    """What the script of bash asks for while somebody types ``cuplama to``."""
    env = environment(_CUPLAMA_COMPLETE="bash_complete", COMP_WORDS="cuplama to", COMP_CWORD="1")
    done = subprocess.run(LAUNCHER, capture_output=True, env=env, timeout=60, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,tokenize\n", "")


def test_models_are_completed_as_files_and_downloads(tmp_path: Path) -> None:
    for name in ("models--org--one", "models--org--two", "models--other--one", "datasets--org--set"):
        (tmp_path / name / "snapshots" / "abc").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "abc" / "config.json").write_text("{}")
    for command in ("info", "bench"):
        env = environment(
            HF_HUB_CACHE=str(tmp_path),
            _CUPLAMA_COMPLETE="bash_complete", COMP_WORDS=f"cuplama {command} -m or", COMP_CWORD="3",
        )  # fmt: skip
        done = subprocess.run(LAUNCHER, capture_output=True, env=env, timeout=60, text=True)
        assert done.stdout.splitlines() == ["plain,org/one", "plain,org/two", "file,or"]


def test_other_shells_are_refused(fails: Fails) -> None:
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in fails("completion", "csh")
