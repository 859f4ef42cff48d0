"""Launch descriptions, plain data: which kernels an op launches, with what grids, on what device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Device", "Launch", "Plan"]


@dataclass(frozen=True)
class Device:
    """What a launch may depend on. arch: 75, 80, ..., 120; sms: multiprocessors; shared: bytes of shared memory that a
    block can have; deterministic: what is computed for a row may not depend, bit for bit, on how many other rows there
    are, so one kernel instance with one order of additions serves every number of rows."""

    arch: int = 90
    sms: int = 132
    shared: int = 232448
    deterministic: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, before its arguments are bound.

    kernel: ``"norm.cu:rms_norm"``; shared: bytes of dynamic shared memory; constants: values for parameters (run time
    or template) that are neither arrays, dims nor attributes; names: parameter -> the array that it takes, where that
    has another name: scratch, another array of the op, or ``w.0``, the first segment of a packed weight w, and
    ``w.0.order``, the order of its columns; starts: parameter -> where along the first axis of its array it begins.

    ahead: arrays that the kernel reads before it waits for earlier kernels if its parameter ``ahead``, which is 0 in
    ``constants``, is 1: whoever knows the order of launches grants that where the launch directly before writes none of
    them and ``waits_first``. That says of a kernel that each thread waits for earlier kernels before it lets the next
    one start, so that all kernels ahead of it have ended when the next one starts.
    """

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int = 0
    constants: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, int] = field(default_factory=dict)
    ahead: tuple[str, ...] = ()
    waits_first: bool = False


@dataclass(frozen=True)
class Plan:
    """The launches that compute an op, in order, and the scratch buffers they share: name -> (shape, dtype name).

    zeroed: scratch buffers that hold zeros before the first launch and that the launches leave holding zeros, such as
    counters. They are made once and kept; the others hold anything.
    shared: scratch buffers that are made once and kept as well, because each captured graph would have its own of the
    others, and these are large. All calls use the same, one after the other.
    """

    launches: tuple[Launch, ...]
    scratch: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    zeroed: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
