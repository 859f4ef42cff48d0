"""What the settings of a training refuse, and how the learning rate goes."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cuplama.errors import ParameterError
from cuplama.train.schedule import learning_rate
from cuplama.train.settings import TrainingSettings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps = 0 is out of range; it must be a number of at least 1"),
        ({"steps": 2.0}, "steps = 2.0 is a float"),
        ({"batch_size": True}, "batch_size = True is a bool"),
        ({"context": 0}, "context = 0 is out of range"),
        ({"lr": 0}, "lr = 0 is out of range; it must be a number above 0"),
        ({"lr": math.nan}, "lr = nan is out of range"),
        ({"lr": math.inf}, "lr = inf is out of range"),
        ({"warmup": 11}, "warmup = 11 is more than steps = 10"),
        ({"schedule": "step"}, "schedule = 'step' is not supported; supported: cosine, linear, constant"),
        ({"optimizer": "sgd"}, "optimizer = 'sgd' is not supported; supported: adamw, muon"),
        ({"optimizer": "muon", "lora": 2}, "optimizer = muon is for the matrices of the layers, which lora"),
        ({"beta1": 1}, "beta1 = 1 is out of range; it must be a number from 0 to below 1"),
        ({"beta2": -0.1}, "beta2 = -0.1 is out of range"),
        ({"eps": 0}, "eps = 0 is out of range"),
        ({"grad_clip": -1}, "grad_clip = -1 is out of range"),
        ({"accumulate": 0}, "accumulate = 0 is out of range"),
        ({"seed": 2**64}, "seed = 18446744073709551616 is out of range"),
        ({"dtype": "float16"}, "dtype = 'float16' is not supported"),
        ({"device": "tpu"}, "device = 'tpu' is not supported"),
        ({"recompute": "all"}, "recompute = 'all' is not supported"),
        ({"dropout": 1.0}, "dropout = 1.0 is out of range"),
        ({"lora_alpha": 4}, "lora_alpha is for adapters alone"),
        ({"lora_targets": ("q_proj",)}, "lora_targets is for adapters alone"),
        ({"lora": 2, "lora_targets": (3,)}, "lora_targets = (3,): 3 is an int"),
        ({"teacher_share": 1.5}, "teacher_share = 1.5 is out of range"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        TrainingSettings(**{"steps": 10, **given})
    assert str(caught.value).startswith(said)


def test_numbers_of_numpy_become_plain_ones() -> None:
    given: dict[str, Any] = {"lr": np.float64(0.5), "seed": np.uint64(2**63), "lora_targets": [], "teachers": ["a"]}
    settings = TrainingSettings(**given, steps=np.int64(3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(settings.facts()))["seed"] == 2**63
    assert settings == TrainingSettings(3, lr=0.5, seed=2**63, teachers=("a",))


def test_the_length_of_a_row() -> None:
    assert TrainingSettings(1).row_length(64) == 64
    assert TrainingSettings(1).row_length(4096) == 1024
    assert TrainingSettings(1, context=128).row_length(64) == 128
    with pytest.raises(ParameterError, match="context = 128 is more than the 64 positions that the model learns"):
        TrainingSettings(1, context=128).row_length(64, learned=True)


def test_differences_name_what_must_be_the_same() -> None:
    before = TrainingSettings(10, lr=0.1).facts()
    assert not TrainingSettings(20, lr=0.1, device="numpy", recompute="cheap", save_every=3).differences(before)
    now = TrainingSettings(10, lr=0.2, seed=1, teachers=("a", "b"))
    assert now.differences(before) == ["lr = 0.1, not 0.2", "seed = 0, not 1", "teachers = none, not a,b"]


def test_the_learning_rate_rises_and_falls() -> None:
    def rates(schedule: str, warmup: int = 4, steps: int = 14) -> list[float]:
        return [learning_rate(k, steps, 2.0, warmup, schedule) for k in range(1, steps + 1)]

    assert rates("constant") == [0.5, 1.0, 1.5, *[2.0] * 11]
    assert rates("linear")[3:] == pytest.approx([2.0 - 0.18 * k for k in range(11)])
    cosine = rates("cosine")
    assert cosine[3] == 2.0
    assert cosine[8] == pytest.approx(1.1)  # half way between 2 and a tenth of it
    assert cosine[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(cosine[3:]))
    assert rates("cosine", 0, 1) == pytest.approx([0.2])
    assert rates("linear", 3, 3)[-1] == 2.0  # all of it is warm-up
    assert TrainingSettings(14, lr=2.0, warmup=4).learning_rate(9) == cosine[8]
