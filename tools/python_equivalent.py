"""Edits of ``mutate_host`` that no test can find or should: they change speed, or nothing. Each has its reason.

An entry that fits no edit any more fails tests/tools/test_mutate_host.py.
"""

from __future__ import annotations

__all__ = ["EQUIVALENT", "TUNED"]

# (file, constant of the module, why another number gives the same results).
TUNED: tuple[tuple[str, str, str], ...] = (
    ("cuplama/engine/decode.py", "AHEAD", "steps in flight: how long the device works before the host must look"),
    ("cuplama/engine/graphs.py", "MAX_STEPS", "captured steps that are kept: memory against capturing again"),
    ("cuplama/engine/input_buffer.py", "_ALIGNMENT", "of arrays in a buffer: NumPy takes any, a GPU a multiple of 16"),
    ("cuplama/engine/memory.py", "FIXED", "a margin in a plan, in bytes"),
    ("cuplama/models/config_sizes.py", "_MAX_LAYERS", "far beyond any model"),
    ("cuplama/models/config_reader.py", "MAX_NUMBER", "far beyond any setting, and far below what overflows"),
)

# (file, text in the lines of the statement, what is edited, the edit, why it gives the same results).
EQUIVALENT: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "cuplama/models/rope.py",
        "np.maximum(length, rope.context)",
        "np.maximum(length, rope.context)",
        "np.maximum(rope.context, length)",
        "the larger of two is the same in either order",
    ),
    (
        "cuplama/models/rope.py",
        "np.array_split(everywhere[rope.context :], 64)",
        "64",
        "65",
        "how many pieces the table is computed in: memory while it is made, and the same rows",
    ),
    (
        "cuplama/models/rope.py",
        "self._rows(everywhere, 1)",
        "1",
        "2",
        "any length within the original context gives the short factors, and that context is 2 at least",
    ),
    (
        "cuplama/models/rope.py",
        "wavelength > rope.original / low",
        "wavelength > rope.original / low",
        "wavelength >= rope.original / low",
        "at that wavelength the blend is f / factor as well",
    ),
    (
        "cuplama/models/rope.py",
        "wavelength < rope.original / high",
        "wavelength < rope.original / high",
        "wavelength <= rope.original / high",
        "at that wavelength the blend is f as well",
    ),
    (
        "cuplama/models/rope.py",
        "1.0 if factor <= 1 else 0.1 * mscale",
        "factor <= 1",
        "factor < 1",
        "log(1) is 0, so both branches give 1",
    ),
    (
        "cuplama/models/rope.py",
        "1.0 if factor <= 1 else math.sqrt",
        "factor <= 1",
        "factor < 1",
        "log(1) is 0, so both branches give 1",
    ),
    (
        "cuplama/engine/memory.py",
        "if bare < free else 0",
        "bare < free",
        "bare <= free",
        "no room is left at equality: 0 tokens either way",
    ),
    (
        "cuplama/engine/graphs.py",
        "if rows <= limit",
        "rows <= limit",
        "rows < limit",
        "every limit is a multiple of its own unit and of the next one",
    ),
    (
        "cuplama/engine/decode.py",
        "logit_rows=0",
        "0",
        "1",
        "that input is taken out in the next line",
    ),
    (
        "cuplama/engine/memory.py",
        "alive, peak = ",
        "0",
        "1",
        "the least that a maximum of bytes can be: every node makes more than one",
    ),
)
