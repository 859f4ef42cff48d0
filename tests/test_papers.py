"""What the papers name exists: files, headings, make targets, commands, options and the letters of signatures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import click
import pytest

from cuplama.cli.main import cli
from cuplama.dtypes import DTYPES
from cuplama.ops import OPS
from cuplama.ops.signature import dim_names
from tests.paths import ROOT

FOLDERS = (".ci", ".github", "benchmarks", "cuda_src", "cuplama", "docs", "examples", "tests", "tools", "weights")
PAPERS = sorted(
    [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md") if "cases" not in p.parts)]
)
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".md", ".json", ".toml", ".txt", ".csv", ".png", ".npz", ".yml")
PLACEHOLDER = re.compile(r"(?<![A-Za-z])(?:NAME|DATE)\b")
# These papers name files that are gone: results name those of the commit that they were measured on.
HISTORY = (ROOT / "CHANGELOG.md", *(ROOT / "benchmarks" / "results").glob("*.md"))

_FENCE = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
_SPAN = re.compile(r"`([^`\n]+)`")
_INDENTED = re.compile(r"^    (\S.*)$", re.M)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_WRITTEN = re.compile(r"Write `([^`]+)`")  # what a reader of a walkthrough makes


def code(text: str) -> Iterator[str]:
    """Blocks and spans of code."""
    yield from _FENCE.findall(text)
    without = _FENCE.sub("", text)
    yield from _SPAN.findall(without)
    yield from _INDENTED.findall(without)


@cache
def files() -> frozenset[str]:
    """Every file and folder that a paper may name, from the top of the checkout."""
    found = [p for p in ROOT.iterdir() if p.is_file()]
    found += [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
    return frozenset(p.relative_to(ROOT).as_posix() for p in found)


def is_path(word: str) -> bool:
    """Whether a word in code looks like a file of this repository."""
    if not re.fullmatch(r"[\w.*][\w.*/-]*", word) or word in SUFFIXES or PLACEHOLDER.search(word):
        return False
    return word.split("/")[0] in FOLDERS or word.endswith(SUFFIXES)


def exists(word: str) -> bool:
    """From the top of the checkout, or the end of some file's path; with * as a wildcard."""
    name = word.rstrip("/")
    return name in FOLDERS or any(fnmatch(f, name) or fnmatch(f, f"*/{name}") for f in files())


def missing_paths(text: str) -> list[str]:
    written = set(_WRITTEN.findall(text))
    return [w for w in _SPAN.findall(_FENCE.sub("", text)) if is_path(w) and w not in written and not exists(w)]


def missing_modules(text: str) -> list[str]:
    """Of ``python -m tools.NAME`` and the like."""
    named = [m for c in code(text) for m in re.findall(r"-m ((?:tools|benchmarks|tests)(?:\.\w+)+)", c)]
    return [m for m in named if not exists(m.replace(".", "/") + ".py")]


def anchors(paper: Path) -> set[str]:
    """The headings of a paper as GitHub links to them."""
    heads = re.findall(r"^#+ (.+)$", paper.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def missing_links(text: str, paper: Path) -> list[str]:
    found = []
    for link in _LINK.findall(_FENCE.sub("", text)):
        target, _, anchor = link.partition("#")
        path = (paper.parent / target).resolve() if target else paper
        if re.match(r"https?:", link):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(link)
    return found


def missing_targets(text: str) -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))
    return [t for c in code(text) for t in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", c, re.M) if t not in targets]


def missing_commands(text: str) -> list[str]:
    context = click.Context(cli)
    found = []
    for piece in code(text):
        for name, sub in re.findall(r"(?<!from )(?:cuplama|cli\.py) ([a-z]+)(?: ([a-z]+)\b)?", piece):
            command = cli.get_command(context, name)
            if command is None:
                found.append(name)
            elif isinstance(command, click.Group) and sub and command.get_command(context, sub) is None:
                found.append(f"{name} {sub}")
    return found


def options(command: click.Command) -> set[str]:
    """Every option of a command and of those below it."""
    own = {o for p in command.params for o in (*p.opts, *p.secondary_opts, *getattr(p, "also", ()))} | {"--help", "-h"}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            own |= options(below)
    return own


def test_the_papers_that_a_stranger_looks_for_are_there() -> None:
    names = {p.relative_to(ROOT).as_posix() for p in PAPERS}
    wanted = {"README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "SECURITY", "examples/README", "cuda_src/README"}
    assert {f"{name}.md" for name in wanted} <= names
    assert ".github/pull_request_template.md" in names


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_paper_names_exists(paper: Path) -> None:
    text = paper.read_text(encoding="utf-8")
    missing = [*missing_links(text, paper), *missing_targets(text), *missing_commands(text)]
    if paper not in HISTORY:
        missing += [*missing_paths(text), *missing_modules(text)]
    assert not missing, f"{paper.relative_to(ROOT)} names what is not there: {', '.join(missing)}"


def test_what_does_not_exist_is_found() -> None:
    assert missing_paths("`cuplama/no/such.py`, `cuda_src/norm.cu`, `norm.cu`, `no_such.cu`, `.cu`, `n=3`") == [
        "cuplama/no/such.py",
        "no_such.cu",
    ]
    assert missing_paths("Write `cuda_src/mine.cu`: `cuda_src/mine.cu`, `cuplama/ops/NAME.py`") == []
    readme = ROOT / "README.md"
    assert missing_links("[a](LICENSE) [b](#install) [c](#no-such) [d](no/such) [e](https://x.org)", readme) == [
        "#no-such",
        "no/such",
    ]
    assert missing_targets("`make test`, and to make sense: `make nonsense`\n```sh\nmake more\n```") == [
        "more",
        "nonsense",
    ]
    assert missing_modules("`python -m tools.verify --out x`, `python -m tools.vanish`") == ["tools.vanish"]
    assert missing_commands("`cuplama kernels list`, `cuplama kernels lost`, `cuplama sing`") == [
        "kernels lost",
        "sing",
    ]


def test_the_workflow_runs_what_ci_runs_on_every_python() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', project)
    assert oldest is not None
    assert re.findall(r'"(3\.\d+)"', text) == ["3.11", "3.12", "3.13", "3.14"]
    assert re.findall(r'"(3\.\d+)"', text)[0] == oldest[1]
    assert "- run: .ci/run" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("paper", ["README.md", "docs/training.md"])
def test_options_in_a_paper_exist(paper: str) -> None:
    text = (ROOT / paper).read_text(encoding="utf-8")
    named = {o for c in code(text) for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", c)}
    assert len(named) > 10
    assert named - options(cli) - {"--version"} == set()


def test_the_programs_of_the_page_on_training_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    looked, loop = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    looked_at, steps = _printed(looked, tmp_path), _printed(loop, tmp_path)
    assert re.match(r"[\d.]+ nats per token$", looked_at[0])
    assert looked_at[1].startswith("model.embed_tokens.weight (4096, 384) ")
    losses = [float(x) for line in steps for x in re.findall(r"loss ([\d.]+)", line)]
    assert len(losses) == 10
    assert losses[-1] < 0.1 * losses[0]
    assert (tmp_path / "fox" / "model.safetensors").exists()


def test_the_program_of_the_page_on_batches_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "batching.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    found, shared = _printed(program, tmp_path)
    assert found.startswith("128 of ")  # two full pages of 64 tokens
    tokens, steps, lost = map(int, re.findall(r"\d+", shared))
    assert (tokens > 400, lost) == (True, 0)
    assert steps < tokens / 2  # eight callers in turn would take a step for each token


def _printed(program: str, folder: Path) -> list[str]:
    """The lines that a program prints, run in a folder without a GPU."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_glossary_has_every_letter_of_the_signatures() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.split("\n## Letters\n")[1].split("\n## ")[0]
    listed = {letter for row in re.findall(r"^\| (\w(?:, \w)*) \|", table, re.M) for letter in row.split(", ")}
    used = set()
    for op in OPS.values():
        for spec in (*op.signature.ins, *op.signature.outs):
            used |= {n for d in spec.dims or () for n in dim_names(d) if len(n) == 1}
            used |= {spec.dtype} - DTYPES.keys()
    assert used - listed == set()


def test_the_floors_in_the_architecture_are_all_of_the_package() -> None:
    floors = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    drawn = set(re.findall(r"\b(\w+)(?:/|\.py)", floors))
    modules = {p.stem for p in (ROOT / "cuplama").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {m for m in modules if not m.startswith("__")} - drawn == set()
