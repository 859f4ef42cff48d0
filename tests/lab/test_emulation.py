"""The lab's emulator where it is missing, and what it says of a fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cuplama.backends.cuda.nvrtc import nvrtc_library
from cuplama.cli.main import cli
from cuplama.errors import DeviceError
from cuplama.lab.emulation import Emulator, _brief, emulator_missing
from tests.needs import needs_nvrtc


def _invoke(*args: str) -> Any:
    return CliRunner().invoke(cli, ["kernels", *args])


def test_of_a_compilers_messages_the_first_is_shown() -> None:
    text = "compile-error: x.cu\nin file\nx.cu:3: error: no such name\n  3 | a\nx.cu:4: error: more"
    assert _brief(text) == "compile-error: x.cu x.cu:3: error: no such name"
    assert _brief("race: here\nthere") == "race: here\nthere"


@needs_nvrtc
@pytest.mark.usefixtures("walked_once")
def test_without_a_compiler_it_says_so_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What can be done without one is done: the kernels are compiled for the GPU."""
    monkeypatch.setattr("cuplama.backends.cuda.driver.cuda_available", lambda device=0: (False, "no GPU in this test"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert emulator_missing() == "without a GPU kernels run on an emulator, which needs the C++ compiler g++"
    with pytest.raises(DeviceError, match=r"C\+\+ compiler"):
        Emulator()
    nvrtc_library()
    done = _invoke("bench", "add", "--dtype", "f32")
    assert done.exit_code == 1, done.output
    assert re.search(r"^add +f32 +- +not run$", done.stdout, re.M)
    assert "1 kernel instance compiles" in done.stdout
    assert re.search(r"^nothing is timed: no GPU in this test; without a GPU kernels run on", done.stdout, re.M)
    done = _invoke("bench", "add", "--dtype", "f32", "-o", "json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["rows"] == [{"op": "add", "dtype": "f32", "cases": None, "emulator": "not run"}]
