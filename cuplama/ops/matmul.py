"""Ops that a library may compute because they end in a product of two matrices: which product, of which arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Matmul"]


@dataclass(frozen=True)
class Matmul:
    """The product of an op, by default that of ``linear``: y[n,m] = x[n,k] w[m,k]^T + b[m] + a[n,m].

    form:     "nt" for y = x w^T, "nn" for y = x w, "tn" for y = x^T w: the letters of BLAS.
    arrays:   operand (x, w, y; b: a bias; c: a matrix that is added) -> name of the op's array. Those that a call does
              not have are left out.
    sizes:    names of the sizes: rows and columns of y, and what is summed over.
    streamed: whether the op's own kernels compute it for few rows of x: a library does only for more.
    """

    form: str = "nt"
    arrays: Mapping[str, str] = field(default_factory=lambda: {"x": "x", "w": "w", "y": "y", "b": "b", "c": "a"})
    sizes: tuple[str, str, str] = ("n", "m", "k")
    streamed: bool = True
