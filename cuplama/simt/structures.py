"""The C structures of ``runtime.cpp``, for ctypes. Fields and their order are those of the C++ text."""

from __future__ import annotations

import ctypes

__all__ = ["LaunchRequest", "Parameter", "Region", "Variable"]


class Region(ctypes.Structure):
    """Memory that a kernel may use: the addresses of an array, whether it may be written, and whose argument it is."""

    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
    )


class Variable(ctypes.Structure):
    """A static ``__shared__`` variable of an object."""

    _fields_ = (("low", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("name", ctypes.c_char_p))


class Parameter(ctypes.Structure):
    """A parameter of a kernel, as the object itself describes it; ``objects.LoadedKernel`` explains the fields."""

    _fields_ = (("kind", ctypes.c_char), ("flags", ctypes.c_uint8), ("bytes", ctypes.c_uint16))


class LaunchRequest(ctypes.Structure):
    """Everything that ``simt_launch`` reads, and the buffer for its report."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
        ("variables", ctypes.c_void_p),
        ("variable_count", ctypes.c_uint64),
        ("argument_names", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("stack_bytes", ctypes.c_uint64),
        ("max_blocks", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
        ("check", ctypes.c_uint32),
        ("race_check", ctypes.c_uint32),
        ("report", ctypes.c_char_p),
        ("report_bytes", ctypes.c_uint64),
    )
