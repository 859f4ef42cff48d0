"""Ops from a user's own folder: a Python file that declares them, with the CUDA files of their kernels beside it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import ParameterError
from . import OPS
from .launch import Device, Launch, Plan
from .op import Call, Op

__all__ = ["is_outside", "load", "load_all"]

_SUFFIX = ".py"


def is_outside(name: str) -> bool:
    """Whether a name is that of an op's file, ``my_op.py`` or ``my_op.py:NAME``, and not of an op."""
    return _split(name)[0].endswith(_SUFFIX)


def load(file: str | Path) -> Op:
    """The op that a Python file declares: to be called, checked and timed like the ops of the package.

    file: ``my_op.py``, or ``my_op.py:NAME`` where it declares several. Its launches may name kernels of files beside it
    (``Launch("my_op.cu:kernel", ...)``), or of ``cuda_src/``; what lies beside it may also be included. The file is run
    anew at every call, so a change of it or of its kernels is seen. Raises ParameterError for a file that cannot be
    read or run, or that has not the one op asked for.
    """
    found = load_all(file)
    first, *others = found
    if others:
        raise ParameterError(f"{file} has several ops, {', '.join(found)}: name one, as in {file}:{first}")
    return found[first]


def load_all(file: str | Path) -> Mapping[str, Op]:
    """All ops that a Python file declares, by name, in its order; of ``my_op.py:NAME`` that one alone.

    Raises ParameterError as ``load`` does.
    """
    shown, name = _split(str(file))
    path = Path(shown).expanduser().resolve()
    if not path.is_file():
        raise ParameterError(f"there is no file {path}")
    module_name = f"cuplama_op_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ParameterError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(module_name)
    sys.modules[module_name] = module  # as an import does: dataclasses, for one, look their module up
    try:
        # The text itself is compiled: a cached file could be taken for a source that was saved twice in a second.
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    except Exception as e:  # whatever the user's file raises
        raise ParameterError(f"{path} cannot be loaded: {type(e).__name__}: {e}") from e
    finally:
        if before is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = before
    ours = set(OPS.values())  # which a file may have imported
    found = [op for op in vars(module).values() if isinstance(op, Op) and op not in ours]
    if not found:
        raise ParameterError(f"{path} declares no op: it has no object of the class cuplama.ops.Op")
    own = {op.name: _located(op, path.parent) for op in found}
    if name and name not in own:
        raise ParameterError(f"{path} has no op {name!r}; it has {', '.join(own)}")
    return {name: own[name]} if name else own


def _split(name: str) -> tuple[str, str]:
    """("my_op.py", "NAME") of "my_op.py:NAME"; a drive letter of Windows is part of the path."""
    path, colon, op = name.rpartition(":")
    return (path, op) if colon and path.endswith(_SUFFIX) else (name, "")


def _located(op: Op, folder: Path) -> Op:
    """The op, with kernels of files in the folder named by whole paths, as an executor finds them."""
    inner = op.kernels
    if inner is None:
        return op

    def kernels(call: Call, device: Device) -> Plan:
        plan = inner(call, device)
        return replace(plan, launches=tuple(_found(launch, folder) for launch in plan.launches))

    return replace(op, kernels=kernels)


def _found(launch: Launch, folder: Path) -> Launch:
    file, _, kernel = launch.kernel.rpartition(":")
    beside = folder / file  # a whole path wins over the folder
    return replace(launch, kernel=f"{beside}:{kernel}") if beside.is_file() else launch
