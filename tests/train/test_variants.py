"""Gradients of models that no family has yet, against differences of the loss."""

from __future__ import annotations

import numpy as np
import pytest

from cuplama.errors import ParameterError
from cuplama.models.export import checkpoint_tensors
from cuplama.train import gradients
from cuplama.train.step import training_step
from tests.models.synthetic import VARIANTS, model_of, synthetic, weights_of

IDS = np.array([[3, 17, 5, 60, 42, 8, 9, 31, 2]])


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"xielu"}))
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 0.01), ("bf16", 0.05)])
def test_the_loss_falls_by_the_square_of_the_gradient(variant: str, dtype: str, tolerance: float) -> None:
    """Along the gradient g a loss grows by |g|^2; the difference is taken in float32, whatever the gradients are in."""
    config = synthetic(**VARIANTS[variant])
    weights = weights_of(config)
    with model_of(config, weights, dtype) as model:
        found = gradients(model, IDS)[1]
    names = {tensor: name for name, recipe in config.recipes().items() for _, tensor in recipe.parts}
    assert found.keys() == names.keys()
    square = sum(float(np.vdot(g, g)) for g in found.values())
    losses = []
    for step in (1e-3, -1e-3):
        moved = {name: array.copy() for name, array in weights.items()}
        for tensor, view in checkpoint_tensors(config, moved):
            view += step / square**0.5 * found[tensor]
        with model_of(config, moved) as model:
            losses.append(gradients(model, IDS)[0])
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(square**0.5, rel=tolerance)


def test_a_model_with_an_op_without_gradient_is_refused_by_name() -> None:
    config = synthetic(**VARIANTS["xielu"])
    with pytest.raises(ParameterError, match=r"^LlamaForCausalLM cannot be trained: node .*: xielu has no gradient"):
        training_step(config, 4, list(config.weight_shapes()))
