"""Breaks the engine, the backends and the models on purpose and counts how many of the breaks the fast tests find.

    .venv/bin/python -m tools.mutate_host [--sample 300] [--seed 0] [-k TEXT] [--report FILE]

Each mutation is one small edit of one module (``python_mutations.py``). The tests run once as they are, while the lines
that they execute are recorded; a mutation is then judged by the tests that execute its line, the quickest first, until
one fails. A line that runs when its module is imported is judged by the tests that run the module's functions, or where
it has none, as a table of data, those of the nearest modules that import it. A mutation that fails no test, or whose
line no test runs, has survived. Exit status 1 if fewer than 85% are killed.

Edits that change no result are not made: ``python_equivalent.py`` lists them with their reasons.

A mutation's process is forked from one that has imported the libraries and none of the project's modules, so it starts
at once and sees the edit everywhere. Needs fork, so Linux or macOS.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tools.python_equivalent import EQUIVALENT, TUNED
from tools.python_mutations import Mutation, mutations, with_mutation

__all__ = ["main"]

WANTED = 0.85
PACKAGES = ("cuplama/engine", "cuplama/backends", "cuplama/models")
TESTS = ("tests/engine", "tests/backends", "tests/models", "tests/text", "tests/test_model.py", "tests/test_fakes.py")
# What the project imports, loaded once before processes are forked.
LIBRARIES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "jinja2",
    "hypothesis",
    "threadpoolctl",
    "huggingface_hub",
)
MAX_TESTS, MAX_SECONDS = 400, 20.0  # that judge one mutation: their number, and what they take together without it
PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly")
FAST = ("-m", "not slow and not gpu")


@dataclass
class Coverage:
    """What the tests run: file -> line -> tests; and what each test takes, in seconds.

    importers: file -> the files that import it; at_import: file -> lines that run before the first test.
    """

    lines: dict[str, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    seconds: dict[str, float] = field(default_factory=dict)
    importers: dict[str, set[str]] = field(default_factory=dict)
    at_import: dict[str, set[int]] = field(default_factory=dict)

    def judges(self, path: str, mutation: Mutation) -> list[str]:
        """The tests that judge a mutation, the quickest first: of many cases of a function the first ones."""
        lines = self.lines.get(path, {})
        own = range(mutation.first, mutation.last + 1)
        there = set[str]().union(*(lines.get(i, ()) for i in own))
        if not there and (not mutation.local or self.at_import.get(path, set()).intersection(own)):
            there = self._users(path)
        ranked, cases = list[tuple[int, float, str]](), Counter[str]()
        for seconds, test in sorted((self.seconds[t], t) for t in there):
            function = test.split("[")[0]
            ranked.append((cases[function], seconds, test))
            cases[function] += 1
        chosen, total = list[str](), 0.0
        for _, seconds, test in sorted(ranked):
            total += seconds
            if len(chosen) == MAX_TESTS or (chosen and total > MAX_SECONDS):
                break
            chosen.append(test)
        return sorted(chosen, key=lambda t: (self.seconds[t], t))

    def _users(self, path: str) -> set[str]:
        """The tests that run functions of a module, or of the nearest modules that import it where none does."""
        met, level = {path}, {path}
        while level:
            if found := set[str]().union(*(tests for p in level for tests in self.lines.get(p, {}).values())):
                return found
            level = set[str]().union(*(self.importers.get(p, ()) for p in level)) - met
            met |= level
        return set()


class _Recorder:
    """A pytest plugin that records which lines of some files each passing test executes."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = {str(Path(f).resolve()): f for f in files}
        self._here: set[tuple[str, int]] = set()
        self.coverage = Coverage()
        sys.settrace(self._trace)  # for what imports run

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        name = self._files.get(frame.f_code.co_filename)
        if name is None or frame.f_code.co_name == "<module>":
            return None
        self._here.add((name, frame.f_lineno))
        return self._trace

    def pytest_collection_finish(self) -> None:
        sys.settrace(None)
        for name, line in self._here:
            self.coverage.at_import.setdefault(name, set()).add(line)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._here.clear()
        sys.settrace(self._trace)
        threading.settrace(self._trace)
        yield
        sys.settrace(None)
        threading.settrace(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        if report.when == "call" and report.passed:
            self.coverage.seconds[test] = report.duration
        if report.when == "teardown" and test in self.coverage.seconds:
            for name, line in self._here:
                self.coverage.lines[name][line].add(test)


# ---- modules --------------------------------------------------------------------------------------------------------
def _module(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def importers(files: Sequence[str]) -> dict[str, set[str]]:
    """File -> those of the files that import it. A package counts as importing its modules: it may look for them."""
    paths = {_module(f): f for f in files}
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in paths.items():
        package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                where = ".".join([*base, *([node.module] if node.module else [])])
                names = [where, *(f"{where}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for imported in names:
                if imported in paths:
                    found[paths[imported]].add(path)
        if package in paths and package != name:
            found[path].add(paths[package])
    return found


def changes_results(path: str, mutation: Mutation, source: str) -> bool:
    """Whether an edit is none of those that ``python_equivalent.py`` lists."""
    if _is_number(mutation.before) and any((path, mutation.constant) == (file, name) for file, name, _ in TUNED):
        return False
    statement = "\n".join(source.splitlines()[mutation.first - 1 : mutation.last])
    edit = (path, mutation.before, mutation.after)
    return not any(edit == (f, old, new) and text in statement for f, text, old, new, _ in EQUIVALENT)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- processes -----------------------------------------------------------------------------------------------------
def _forked(work: Callable[[], int]) -> int:
    """Runs work in a forked process without output; returns the process's id. Its result is the exit status."""
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.setsid()  # so that what it starts can be stopped with it
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = work()
    finally:
        os._exit(status)


def _run_pytest(args: Sequence[str], plugins: Sequence[Any] = ()) -> int:
    return int(pytest.main([*PYTEST, *args], plugins=list(plugins)))


class _Chosen:
    """A pytest plugin that runs these tests alone, in this order. As arguments pytest would refuse some ids."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: i for i, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self._order]
        items[:] = sorted(chosen, key=lambda item: self._order[item.nodeid])


def run_tests(tests: Sequence[str]) -> int:
    """Run these tests, by their ids, in order until one fails. Returns pytest's exit status, 0 if all pass."""
    return _run_pytest(list(dict.fromkeys(test.split("::")[0] for test in tests)), [_Chosen(tests)])


class _Mutated(importlib.machinery.SourceFileLoader):
    """Loads a module with an edit."""

    def __init__(self, name: str, path: str, number: int) -> None:
        super().__init__(name, path)
        self._number = number

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text(encoding="utf-8")
        return compile(with_mutation(source, self._number), self.path, "exec", dont_inherit=True)


class _Finder:
    """Finds the module that is mutated, before Python finds it as it is."""

    def __init__(self, path: Path, number: int) -> None:
        self._name = _module(str(path))
        self._path, self._number = str(path.resolve()), number

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        loader = _Mutated(name, self._path, self._number)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


def _judge(path: str, number: int, tests: Sequence[str]) -> int:
    finder: Any = _Finder(Path(path), number)
    sys.meta_path.insert(0, finder)
    return run_tests(tests)


def record(files: Sequence[str], tests: Sequence[str]) -> Coverage:
    """Run the fast tests as they are, in a process of their own. Raises SystemExit if none passes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coverage.json"

        def work() -> int:
            recorder = _Recorder(files)
            _run_pytest([*FAST, "--maxfail=100000", *tests], [recorder])
            found = recorder.coverage
            lines = {f: {i: sorted(t) for i, t in at.items()} for f, at in found.lines.items()}
            early = {f: sorted(at) for f, at in found.at_import.items()}
            out.write_text(json.dumps([lines, found.seconds, early]))
            return 0

        os.waitpid(_forked(work), 0)
        if not out.exists():
            raise SystemExit("the tests do not start; run them with pytest to see why")
        lines, seconds, early = json.loads(out.read_text())
    if not seconds:
        raise SystemExit("no test passes")
    coverage = Coverage(seconds=seconds, importers=importers(files))
    coverage.at_import = {name: set(at) for name, at in early.items()}
    for name, at in lines.items():
        coverage.lines[name] = defaultdict(set, {int(i): set(tests) for i, tests in at.items()})
    return coverage


@dataclass
class _Running:
    place: tuple[str, Mutation]
    until: float


def judge_all(
    todo: Sequence[tuple[str, Mutation]], coverage: Coverage, processes: int, patience: float
) -> dict[tuple[str, int], str]:
    """(path, number) -> "killed", "timeout", "survived" or "not run", ``processes`` mutations at a time.

    patience: seconds that a mutation has beside ten times what its tests take without it.
    """
    result: dict[tuple[str, int], str] = {}
    running: dict[int, _Running] = {}
    left = list(reversed(todo))
    while left or running:
        while left and len(running) < processes:
            path, mutation = left.pop()
            tests = coverage.judges(path, mutation)
            if not tests:
                result[path, mutation.number] = "not run"
                continue
            limit = patience + 10 * sum(coverage.seconds[t] for t in tests)
            pid = _forked(lambda p=path, m=mutation, t=tests: _judge(p, m.number, t))  # type: ignore[misc]
            running[pid] = _Running((path, mutation), time.monotonic() + limit)
        for pid, entry in list(running.items()):
            path, mutation = entry.place
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                result[path, mutation.number] = "survived" if status == 0 else "killed"
            elif time.monotonic() > entry.until:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                result[path, mutation.number] = "timeout"
            else:
                continue
            del running[pid]
        time.sleep(0.02)
    return result


# ---- the report ----------------------------------------------------------------------------------------------------
def report(todo: Sequence[tuple[str, Mutation]], result: dict[tuple[str, int], str], every: int) -> tuple[str, float]:
    """The report in Markdown, and the share of mutations that are killed. every: mutations there are in all."""
    found = {place: verdict in ("killed", "timeout") for place, verdict in result.items()}
    score = sum(found.values()) / len(found)
    lines = [
        "# Mutations of the host's code",
        "",
        f"{sum(found.values())} of {len(found)} killed ({score:.1%}), of {every} there are.",
        "",
        "| module | killed | of |",
        "|---|---|---|",
    ]
    for path in sorted({p for p, _ in todo}):
        verdicts = [found[p, m.number] for p, m in todo if p == path]
        lines.append(f"| `{path}` | {sum(verdicts)} | {len(verdicts)} |")
    lines += ["", "Survivors:", ""]
    for path, mutation in sorted(todo, key=lambda place: (place[0], place[1].first)):
        if not found[path, mutation.number]:
            unseen = " (no test runs it)" if result[path, mutation.number] == "not run" else ""
            lines.append(f"* `{path}`:{mutation}{unseen}")
    return "\n".join(lines) + "\n", score


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, help="so many mutations, drawn at random; all if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("-k", default="", help="only modules whose path contains this text")
    parser.add_argument("--report", type=Path, help="write the report to this file as well")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="folders of the modules")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files and folders of the tests")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds until a mutation counts as endless")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the root of the checkout. Returns the exit status."""
    options = _options(argv)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    files = [str(p) for folder in options.packages for p in sorted(Path(folder).rglob("*.py"))]
    sources = {path: Path(path).read_text(encoding="utf-8") for path in files if options.k in path}
    every = [(path, m) for path, text in sources.items() for m in mutations(text) if changes_results(path, m, text)]
    if not every:
        raise SystemExit("there is nothing to mutate")
    todo = every
    if options.sample is not None and options.sample < len(every):
        todo = random.Random(options.seed).sample(every, options.sample)
    began = time.monotonic()
    coverage = record(files, options.tests)
    print(
        f"{len(coverage.seconds)} tests recorded in {time.monotonic() - began:.0f} s; {len(todo)} mutations", flush=True
    )
    text, score = report(todo, judge_all(todo, coverage, options.processes, options.patience), len(every))
    print(text)
    print(f"{time.monotonic() - began:.0f} s")
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    return 0 if score >= WANTED else 1


if __name__ == "__main__":
    raise SystemExit(main())
