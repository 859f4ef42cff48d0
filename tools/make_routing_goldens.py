"""Write what transformers' routers choose for tokens that are near a tie.

    python -m tools.make_routing_goldens [case ...]

Needs the `golden` extra. The routers are those of the golden models with experts, in float32. Of many random tokens the
nearest to a tie are kept, in which the last expert that is chosen and the first that is not differ by little more than
float32's roundings; tests/golden/README.md says what each file holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.goldens.model import load, routers
from tools.make_goldens import CASES_DIR

__all__ = ["main", "make"]

OUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "routing"
TOKENS, KEPT = 1 << 17, 48
NEAREST = 2e-6  # a logit's difference that another order of a sum of some dozen products does not turn


def router_of(model: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """The first router, with the correction where that is beside it and no part of it, as in MiniMax-M2."""
    router = routers(model)[0]
    outer = next(module for module in model.modules() if router in module.children())
    beside = (outer.e_score_correction_bias,) if hasattr(outer, "e_score_correction_bias") else ()
    return lambda x: tuple(router(x, *beside))


def chosen(router: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, weights) [n, k], experts in ascending order."""
    outs = router(x)
    experts, weights = outs[2], outs[1]
    order = experts.argsort(-1)
    return experts.gather(-1, order), weights.gather(-1, order)


def make(name: str) -> str:
    """Write the file of a golden model. Returns a line about it."""
    model = load(CASES_DIR / name)
    router, width = router_of(model), model.config.hidden_size
    x = torch.randn((TOKENS, width), generator=torch.Generator().manual_seed(1))
    experts, weights = chosen(router, x)
    # A token is as near to a tie as the smallest step towards a random other token that gives it other experts.
    towards, near = x.roll(1, 0) - x, torch.full((TOKENS,), float("inf"))
    for step in 2.0 ** -torch.arange(8, 24):
        other = (chosen(router, x + step * towards)[0] != experts).any(-1)
        near[other] = step
    tie = near.argsort()[:KEPT]
    tie = tie[near[tie] > NEAREST]
    arrays = {"x": x[tie].numpy(), "experts": experts[tie].numpy().astype(np.int32), "weights": weights[tie].numpy()}
    OUT.mkdir(exist_ok=True)
    np.savez_compressed(OUT / f"{name}.npz", **arrays)
    return f"{name:16} {len(tie)} tokens, turned by steps of {near[tie].min():.1e} to {near[tie].max():.1e}"


def main(names: list[str]) -> None:
    """Write the files of these cases; of all with experts if there are none."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for folder in sorted(CASES_DIR.iterdir()):
        if (folder.name in names or not names) and "experts_0" in np.load(folder / "golden.npz"):
            print(make(folder.name), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
