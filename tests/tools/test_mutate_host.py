"""The mutation run of the host's code, on a module of a few lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tools.mutate_host import Coverage, changes_results, importers, run_tests
from tools.python_equivalent import EQUIVALENT, TUNED
from tools.python_mutations import Mutation, mutations, with_mutation

MODULE = '''"""A module."""
from __future__ import annotations
__all__ = ["clip"]
LIMIT: int = 3
def clip(x: int) -> int:
    """Documentation."""
    if x > LIMIT:
        return LIMIT
    return x + 0 * unseen(x)
def unseen(x: int) -> int:
    return x
def endless(n: int) -> int:
    while n > 0:
        n -= 1
    return 7
'''
TESTS = """from pack.module import clip, endless
def test_above(): assert clip(5) == 3
def test_below(): assert clip(-2) == -2
def test_ends(): assert endless(3) == 7
def test_fails_as_it_is(): assert clip(0) == 9
"""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("a is not None and b in c", ["a is not None or b in c", "a is None", "b not in c"]),
        ("not a", ["a"]),
        ("a // 2", ["a * 2", "3"]),
        ("x = True", ["False"]),
        ("a if b else c", ["c if b else a"]),
        ("f(a, b, c)", ["pass", "f(b, a, c)"]),
        ("f(a, a)", ["pass"]),
        ("max(a, b)", ["pass"]),
        ("f(*a, b)", ["pass"]),
        ("x += y", ["pass"]),
        ("raise E(f'{x + 1}')", ["pass"]),
        ("x: int[3] = y", []),
        ("'documentation'", []),
        ("__all__ = ['a', 3]", []),
        ("zip(a, b, strict=True)", ["pass", "zip(b, a, strict=True)"]),
        ("_log.info('x', 3)", []),
        ("if TYPE_CHECKING:\n    f(a, b)", []),
        ("def f(a: int[3]) -> int[4]:\n    return a", ["return None"]),
        ("for a in b:\n    continue", ["break"]),
    ],
)
def test_the_mistakes_that_are_made(text: str, wrong: list[str]) -> None:
    assert [m.after for m in mutations(text)] == wrong


def test_a_mutation_changes_its_own_place_alone() -> None:
    found = {m.before: m.number for m in mutations(MODULE)}
    scope: dict[str, object] = {}
    exec(compile(with_mutation(MODULE, found["x > LIMIT"]), "module", "exec"), scope)
    exec("same = [clip(x) for x in (2, 3, 4)]", scope)
    assert scope["same"] == [2, 3, 3]
    assert len(mutations(MODULE)) == len(set(found.values()) | {m.number for m in mutations(MODULE)})


def _run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.mutate_host", "--packages", "pack", "--tests", "test_it.py",
               "--patience", "2", *options]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=300, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of one module and its tests."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "module.py").write_text(MODULE)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:schemathesis\nmarkers =\n    slow: x\n    gpu: x\n")
    return tmp_path


@pytest.mark.slow
def test_survivors_are_named_and_fail_the_run(folder: Path) -> None:
    done = _run(folder, "--report", "report.md")
    text = (folder / "report.md").read_text()
    assert text in done.stdout
    total = len(mutations(MODULE))
    survivors = re.findall(r"^\* `pack/module.py`:(\d+): `(.*)` -> `(.*)`", text, re.M)
    killed = total - len(survivors)
    assert f"{killed} of {total} killed" in text
    assert f"| `pack/module.py` | {killed} | {total} |" in text
    # At the limit itself both ways give the limit, and 0 times anything is nothing.
    assert ("7", "x > LIMIT", "x >= LIMIT") in survivors
    assert ("13", "n > 0", "n >= 0") in survivors
    # An edit of a number that is read when the module is imported, and a loop without an end.
    assert ("4", "3", "4") not in survivors
    assert ("14", "n -= 1", "pass") not in survivors
    assert done.returncode == (0 if killed >= 0.85 * total else 1)


@pytest.mark.slow
def test_a_sample_is_the_same_for_a_seed(folder: Path) -> None:
    first, again = (_run(folder, "--sample", "3", "--seed", "1").stdout.splitlines()[1:-1] for _ in range(2))
    assert first == again
    assert "of 3 killed" in "\n".join(first)


def test_a_table_of_data_is_judged_by_the_users_of_the_nearest_module_that_imports_it() -> None:
    names = ("tables/__init__", "tables/sizes", "reader", "shop", "other")
    coverage = Coverage(
        lines={"p/reader.py": {4: {"test_reader"}}, "p/shop.py": {2: {"test_shop"}}},
        seconds={"test_reader": 1.0, "test_shop": 0.1},
        importers={
            "p/tables/sizes.py": {"p/tables/__init__.py"},
            "p/tables/__init__.py": {"p/reader.py"},
            "p/reader.py": {"p/shop.py"},
        },
    )
    at_import, in_function = (Mutation(0, 1, 1, local, "1", "2") for local in (False, True))
    wanted = [["test_reader"]] * 3 + [["test_shop"], []]
    assert [coverage.judges(f"p/{name}.py", at_import) for name in names] == wanted
    assert coverage.judges("p/tables/sizes.py", in_function) == []


def test_of_many_cases_of_one_test_the_first_judge_beside_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.mutate_host.MAX_TESTS", 3)
    seconds = {"test_a[1]": 0.1, "test_a[2]": 0.2, "test_a[3]": 0.3, "test_b": 2.0}
    coverage = Coverage(lines={"m.py": {1: set(seconds)}}, seconds=seconds)
    assert coverage.judges("m.py", Mutation(0, 1, 1, True, "1", "2")) == ["test_a[1]", "test_a[2]", "test_b"]


def test_who_imports_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {
        "p/__init__.py": "from . import a",
        "p/a.py": "import os\nfrom .q.c import x",
        "p/b.py": "from p import a\nimport p.q.c",
        "p/q/__init__.py": "",
        "p/q/c.py": "from ..b import y",
    }
    (tmp_path / "p/q").mkdir(parents=True)
    for name, text in texts.items():
        Path(name).write_text(text)
    found = importers(list(texts))
    assert found["p/q/c.py"] == {"p/a.py", "p/b.py", "p/q/__init__.py"}
    assert found["p/b.py"] == {"p/q/c.py", "p/__init__.py"}
    assert found["p/a.py"] == {"p/__init__.py", "p/b.py"}


def test_every_edit_that_is_left_out_is_there() -> None:
    """An entry whose code has changed would hide nothing, or the wrong edit."""
    for file in {file for file, *_ in (*TUNED, *EQUIVALENT)}:
        text = (ROOT / file).read_text()
        left_out = [m for m in mutations(text) if not changes_results(file, m, text)]
        for _, name, reason in (row for row in TUNED if row[0] == file):
            assert any(m.constant == name for m in left_out), (file, name)
            assert reason
        for _, statement, old, new, reason in (row for row in EQUIVALENT if row[0] == file):
            same = [m for m in left_out if (m.before, m.after) == (old, new)]
            there = ["\n".join(text.splitlines()[m.first - 1 : m.last]) for m in same]
            assert sum(statement in lines for lines in there) == 1, (file, statement)
            assert reason


def test_an_operator_of_a_tuned_constant_is_edited() -> None:
    text = "FIXED = 160 << 20\nOTHER = 160"
    left = [m.after for m in mutations(text) if changes_results("cuplama/engine/memory.py", m, text)]
    assert left == ["160 >> 20", "161"]


def test_tests_are_chosen_by_any_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_ids.py").write_text(
        "import pytest\n@pytest.mark.parametrize('a', ['x::y/[1]', 'wrong'])\ndef test_a(a): assert a != 'wrong'\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run_tests(["test_ids.py::test_a[x::y/[1]]"]) == 0
    assert run_tests(["test_ids.py::test_a[x::y/[1]]", "test_ids.py::test_a[wrong]"]) == 1
