"""GPTQ: the algorithm of the paper, column by column, and what it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.quant import gptq as module
from cuplama.quant.gptq import DAMPING, gptq, inverse_factor
from cuplama.quant.grid import GRIDS, inverse
from cuplama.quant.rtn import round_to_nearest

BF16 = DTYPES["bf16"]


def _problem(k: int = 96, m: int = 24, n: int = 700) -> tuple[Any, Any]:
    """Inputs that differ much and hang together, and weights."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    x = (rng.standard_normal((n, k)) @ mixed * 0.05).astype(np.float32)
    return x, (rng.standard_normal((m, k)) * 0.02).astype(np.float32)


def _hessian(x: Any) -> Any:
    return x.T.astype(np.float64) @ x


def _as_in_the_paper(w: Any, hessian: Any, name: str, size: int) -> Any:
    """One column after the other, with all that are left updated each time."""
    grid, k = GRIDS[name], w.shape[1]
    importance = (hessian.diagonal() / hessian.diagonal().max()).astype(np.float32).reshape(-1, size)
    scales = np.repeat(grid.scales(w.reshape(len(w), -1, size), BF16, importance), size, 1)
    order = np.argsort(-hessian.diagonal(), kind="stable")
    damped = hessian[np.ix_(order, order)] + DAMPING * hessian.diagonal().mean() * np.eye(k)
    u = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, found = w[:, order].astype(np.float64), np.empty(w.shape)
    for j, c in enumerate(order):
        scale = scales[:, c]
        found[:, c] = grid.nearest((left[:, j] * inverse(scale)).astype(np.float32)) * scale
        left[:, j:] -= np.outer((left[:, j] - found[:, c]) / u[j, j], u[j, j:])
    return found


@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int4", 0), ("int8", 0), ("fp8", 96)])
def test_it_is_the_algorithm_of_the_paper(name: str, group: int) -> None:
    x, w = _problem()
    q = gptq(w, _hessian(x), GRIDS[name], group, BF16)
    expected = _as_in_the_paper(w, _hessian(x), name, group or 96)
    assert q.scales.shape == (24, 96 // (group or 96))
    differ = np.abs(q.numbers() - expected) > 1e-6  # a tie may go either way, and moves those after it
    assert differ.mean() < 0.01


@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int8", 0), ("fp8", 0)])
def test_the_product_loses_at_most_two_thirds_of_what_rounding_loses(name: str, group: int) -> None:
    x, w = _problem()

    def loss(numbers: Any) -> Any:
        return np.linalg.norm(x @ (numbers - w).T)

    rounded = round_to_nearest(w, GRIDS[name], group, BF16)
    assert loss(gptq(w, _hessian(x), GRIDS[name], group, BF16).numbers()) < 0.67 * loss(rounded.numbers())


def test_inputs_that_are_never_there_cost_nothing() -> None:
    x, w = _problem()
    x[:, 7] = 0
    before = w.copy()
    q = gptq(w, _hessian(x), GRIDS["int4"], 32, BF16)
    assert np.isfinite(q.numbers()).all()
    assert not q.numbers()[:, 7].any()
    assert np.array_equal(w, before)
    nothing = gptq(w, np.zeros((96, 96)), GRIDS["int4"], 32, BF16)
    assert not nothing.numbers().any()


def test_a_hessian_that_rounding_left_indefinite_is_damped_more() -> None:
    x, w = _problem()
    hessian = _hessian(x)
    values, vectors = np.linalg.eigh(hessian)
    values[:5] = -0.05 * hessian.diagonal().mean()
    q = gptq(w, (vectors * values) @ vectors.T, GRIDS["int4"], 32, BF16)
    rounded = round_to_nearest(w, GRIDS["int4"], 32, BF16).numbers()
    assert np.linalg.norm(x @ (q.numbers() - w).T) < np.linalg.norm(x @ (rounded - w).T)
    with pytest.raises(np.linalg.LinAlgError, match="no inverse"):
        inverse_factor(-np.eye(4))


def test_the_factor_of_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = _hessian(_problem()[0])
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(96)
    for uncut in (128, 5):
        monkeypatch.setattr(module, "_UNCUT", uncut)
        u = inverse_factor(hessian)
        assert np.array_equal(u, np.triu(u))
        assert np.allclose(u.T @ u @ damped, np.eye(96), atol=1e-9)
