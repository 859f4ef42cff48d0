"""Files of a model folder: the one reader of JSON, and what a file is that is not what its name says."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, CuplamaError

__all__ = ["is_missing", "not_opened", "not_understood", "read_json", "read_optional_json", "writing"]

_LFS = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"  # some editors write it in front of UTF-8
_HTML = (b"<!doctype html", b"<html")


def read_json(path: Path, error: type[CuplamaError] = ConfigError) -> dict[str, Any]:
    """A JSON object from a file. Raises ``error`` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise error(not_opened(path, e)) from None
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number too long, too deeply nested
        raise error(not_understood(path, "is not valid JSON", str(e))) from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_optional_json(path: Path, error: type[CuplamaError] = ConfigError) -> dict[str, Any]:
    """A JSON object from a file that a folder need not have: empty if it is missing. Raises ``error`` naming it."""
    return {} if is_missing(path) else read_json(path, error)


def is_missing(path: Path) -> bool:
    """Whether there is no such name. A link that leads nowhere is there, and so is what must not be looked at."""
    try:
        path.lstat()
    except OSError as e:
        return isinstance(e, (FileNotFoundError, NotADirectoryError))
    return False


def not_opened(path: Path, problem: OSError) -> str:
    """The line for a file that cannot be opened."""
    if isinstance(problem, FileNotFoundError):
        if not path.is_symlink():
            return f"{path} does not exist"
        return f"cannot read {path}: it is a link to {os.readlink(path)}, which leads nowhere"
    return f"cannot read {path}: {problem.strerror or problem}"


def not_understood(path: Path, problem: str, reason: str) -> str:
    """The line for a file that its reader refuses. problem: what it is not; reason: the reader's own words.

    Where the first bytes show what the file is instead, the line says that.
    """
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:
        return f"{path} {problem}: {reason}"
    if head.startswith(_LFS):
        return f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder, or download it"
    if head.removeprefix(_BOM).lstrip().lower().startswith(_HTML):
        return f"{path} is a web page, most likely an error that was saved under this name; download the file again"
    if not head:
        reason = "it is empty; download it again"
    elif head.startswith(_BOM):
        reason = "it starts with a byte order mark; save it as UTF-8 without one"
    return f"{path} {problem}: {reason}"


@contextmanager
def writing(path: Path, error: type[CuplamaError], when_full: str = "") -> Iterator[None]:
    """Inside, what the system says of a file becomes an error of one line.

    path: named where the system names none; when_full: what to do about a disk without room, for the end of the line.
    """
    try:
        yield
    except OSError as e:
        hint = f"; {when_full}" if when_full and e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise error(f"{e.filename or path}: {e.strerror or e}{hint}") from None
