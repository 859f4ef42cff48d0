"""Models whose layers rotate differently: every part of cuplama gives each layer the tables of its own rotation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.backends.numpy import NumPyBackend
from cuplama.cli.model_info import facts, view
from cuplama.conversion.calibration import Calibration
from cuplama.conversion.source import layer_of
from cuplama.lab.workloads import decode_workloads, prompt_workloads
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.families import FAMILIES
from cuplama.models.family import Rotations
from cuplama.train import gradients
from tests.conversion.made import write_model

IDS = np.random.default_rng(0).integers(0, 65, 24).tolist()
ONE: dict[str, Any] = {"rope_theta": 50.0}
SAME = {**ONE, "rope_type": "linear", "factor": 1.0}  # another rotation, with the same tables
STILL = {"rope_type": "linear", "factor": 1e12}  # no angle of which is more than 1e-10


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a Llama of three layers, each with one of the settings of ``rope_parameters``, or without rotation."""
    rule = Rotations(("rotated_by",), lambda raw, windows: raw["rotated_by"])
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", replace(FAMILIES["LlamaForCausalLM"], rotations=rule))

    def written(layers: list[str | None], **settings: Any) -> Path:
        folder = tmp_path / "-".join(map(str, [*layers, *map(hash, map(str, settings.values()))]))
        return write_model(folder, rotated_by=layers, rope_parameters=settings, torch_dtype="float32")

    return written


def answers(folder: Path) -> list[Any]:
    """Logits of a prompt, tokens that follow it, what a calibration has behind the layers, a loss and its gradients."""
    with cuplama.load(folder, device="numpy") as model:
        found = [model.logits(IDS), np.array(model.generate(IDS, max_tokens=6, temperature=0.0).tokens)]
        loss, by_name = gradients(model, np.array([IDS]))
    config, backend = load_config(folder), NumPyBackend()
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    backend.end_loading()
    calibration = Calibration(backend, config, [IDS, IDS[:7]], folder)
    calibration.embed(weights)
    for layer in range(config.num_layers):
        calibration.advance(layer, {name: w for name, w in weights.items() if layer_of(name) == layer})
    return [*found, np.array(calibration.x), loss, *by_name.values()]


def test_two_rotations_with_the_same_tables_are_one(write: Any) -> None:
    plain, mixed = write(["a", "a", "a"], a=ONE), write(["a", "b", "a"], a=ONE, b=SAME)
    assert list(load_config(mixed).ropes) == ["rope", "rope1"]
    for wanted, found in zip(answers(plain), answers(mixed), strict=True):
        assert np.array_equal(wanted, found)
    other = answers(write(["a", "b", "a"], a=ONE, b={"rope_theta": 9.0}))
    assert not np.allclose(other[0], answers(plain)[0], atol=0.01)


def test_a_layer_without_rotation_is_one_that_does_not_turn(write: Any) -> None:
    still, none = write(["a", "b", "a"], a=STILL, b=ONE), write([None, "b", None], b=ONE)
    assert list(load_config(none).ropes) == ["rope"]
    for wanted, found in zip(answers(still), answers(none), strict=True):
        assert np.allclose(wanted, found, atol=1e-5)


def test_no_layer_may_rotate(write: Any) -> None:
    """Then the order of the tokens before the last one changes nothing in the first layer; positions still advance."""
    still, none = write(["a"] * 3, a=STILL), write([None] * 3)
    for wanted, found in zip(answers(still), answers(none), strict=True):
        assert np.allclose(wanted, found, atol=1e-5)


def test_the_lab_knows_the_tables_of_each_layer(write: Any) -> None:
    config = load_config(write(["a", "b", None], a=ONE, b={"rope_theta": 9.0, "partial_rotary_factor": 1.0}))
    decode, prompt = decode_workloads(config, "f32", depth=20), prompt_workloads(config, "f32", tokens=20)
    assert sorted(w.count for w in decode if w.op.name == "append_attention") == [1, 2]  # without, and with rotation
    assert [w.count for w in prompt if w.op.name == "rope"] == [2]


def test_info_shows_every_rotation(write: Any) -> None:
    folder = write(["a", "b", None], a=ONE, b=SAME)
    found = facts(folder, load_config(folder))
    assert found["rotations"] == [
        {"type": "default", "theta": 50.0, "size": 16, "layers": 1},
        {"type": "linear", "theta": 50.0, "size": 16, "layers": 1},
    ]
    some = ", ".join(f"{what} in 1 of 3 layers" for what in ("(default, theta 50)", "RoPE (linear, theta 50)", "none"))
    assert view(found)["positions"] == f"RoPE {some}"
