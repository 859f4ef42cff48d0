"""The settings of a training run: every option of ``cuplama train`` that the steps depend on, with its check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..arguments import checked, in_range, items, need_type, one_of, real, whole_number
from ..device import DEVICES
from ..errors import ParameterError
from .backward import RECOMPUTE
from .schedule import SCHEDULES, learning_rate

__all__ = ["DOCUMENTS", "DTYPES", "OPTIMIZERS", "TrainingSettings"]

DTYPES = ("auto", "float32", "bfloat16")
"""What a model may be trained in. auto: bfloat16 on CUDA, float32 on NumPy."""
OPTIMIZERS = ("adamw", "muon")
"""What may update the weights. muon: the matrices of the layers by Muon, the rest by AdamW."""
DOCUMENTS = ("apart", "together")
"""Whether the documents of a row see those before them: "together" they do, as in one long text."""
_DEFAULT_CONTEXT = 1024  # tokens of a row, of a model that allows more
_MAX_SEED = 2**64 - 1  # Philox takes a key of 64 bits
# Settings that may change from one run to the next that goes on: they decide where and when, not what is computed.
# With ``steps`` the learning rates of the steps to come change, of which the run tells.
_FREE = ("steps", "device", "recompute", "eval_every", "save_every")


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained.

    steps: updates of the weights in all; batch_size: rows of a batch; context: tokens of a row, None: the model's
    own limit, at most 1024; optimizer: one of ``OPTIMIZERS``; lr: the highest learning rate; warmup: steps in which
    it rises to that; schedule: how it falls afterwards, one of ``SCHEDULES``; weight_decay: of every tensor of two
    or more dimensions; beta1, beta2, eps: of AdamW; grad_clip: the largest norm of all gradients together, 0 for no
    limit; accumulate: batches whose gradients are added up for one update; seed: of the first weights, the order of
    the data and dropout; dtype: one of ``DTYPES``; device: as of ``load``; documents: one of ``DOCUMENTS``;
    dropout: the share of embeddings and of what a block adds to the residual stream that is set to 0; lora: rank of
    the adapters, 0 to train the weights themselves; lora_alpha: adapters count lora_alpha / lora times, None for
    twice the rank; lora_targets: names of the modules that get adapters ("q_proj"), none for all linear layers;
    recompute: one of ``RECOMPUTE``; eval_every, save_every: steps between two evaluations and two saves, 0 for none
    before the end; teachers: models to learn from; teacher_share: the share that their probabilities have in the
    target, against that of the text.

    Raises ParameterError that names the setting, its value and what it takes.
    """

    steps: int
    batch_size: int = 8
    context: int | None = None
    optimizer: str = "adamw"
    lr: float = 3e-4
    warmup: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    documents: str = "apart"
    dropout: float = 0.0
    lora: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    recompute: str = "nothing"
    eval_every: int = 500
    save_every: int = 500
    teachers: tuple[str, ...] = ()
    teacher_share: float = 0.5

    def __post_init__(self) -> None:
        for name, (read, wanted) in _CHECKS.items():
            object.__setattr__(self, name, checked(name, getattr(self, name), read, wanted))
        for name, words in _WORDS.items():
            one_of(name, getattr(self, name), words)
        if self.warmup > self.steps:
            raise ParameterError(f"warmup = {self.warmup} is more than steps = {self.steps}")
        if self.lora and self.optimizer == "muon":
            raise ParameterError(
                "optimizer = muon is for the matrices of the layers, which lora does not train; adamw is"
            )
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) and not self.lora:
                raise ParameterError(f"{name} is for adapters alone; give lora, their rank, as well")

    def learning_rate(self, step: int) -> float:
        """The learning rate of an update, counted from 1."""
        return learning_rate(step, self.steps, self.lr, self.warmup, self.schedule)

    def row_length(self, limit: int, learned: bool = False) -> int:
        """T, the tokens of a row. limit: the positions that the model was made for; learned: it has no others.

        Raises ParameterError for more than there are.
        """
        if self.context is None:
            return min(limit, _DEFAULT_CONTEXT)
        if learned and self.context > limit:
            raise ParameterError(f"context = {self.context} is more than the {limit} positions that the model learns")
        return self.context

    def facts(self) -> dict[str, Any]:
        """Name -> value of every setting, as JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Settings that another run must share to go on from this one's checkpoint, and does not: "lr = 0.1, not 0.2".

        before: ``facts`` of the run that saved. The first value is the saved one.
        """
        mine = self.facts()
        return [
            f"{name} = {_shown(before.get(name))}, not {_shown(value)}"
            for name, value in mine.items()
            if name not in _FREE and before.get(name) != value
        ]


def _above_zero(value: Any) -> float:
    number = real(0, _FINITE)(value)
    in_range(number > 0)
    return number


def _below_one(value: Any) -> float:
    number = real(0, 1)(value)
    in_range(number < 1)
    return number


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _words(value: Any) -> tuple[str, ...]:
    found = items(value)
    for item in found:
        need_type(isinstance(item, str), item)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


_FINITE = math.nextafter(math.inf, 0)
_MOST = 2**31 - 1  # of whole numbers that reach a kernel
# Setting -> its reader, and what it takes in words.
_CHECKS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "steps": (whole_number(1, _MOST), "a number of at least 1"),
    "batch_size": (whole_number(1, _MOST), "a number of at least 1"),
    "context": (whole_number(1, _MOST, none=True), "a number of at least 1"),
    "lr": (_above_zero, "a number above 0"),
    "warmup": (whole_number(0), "a number of steps, or 0"),
    "weight_decay": (real(0, _FINITE), "a number of at least 0"),
    "beta1": (_below_one, "a number from 0 to below 1"),
    "beta2": (_below_one, "a number from 0 to below 1"),
    "eps": (_above_zero, "a number above 0"),
    "grad_clip": (real(0, _FINITE), "a number of at least 0"),
    "accumulate": (whole_number(1, _MOST), "a number of at least 1"),
    "seed": (whole_number(0, _MAX_SEED), f"a number from 0 to {_MAX_SEED}"),
    "dropout": (_below_one, "a number from 0 to below 1"),
    "lora": (whole_number(0, _MOST), "a rank of at least 1, or 0 for none"),
    "lora_alpha": (_optional(_above_zero), "a number above 0"),
    "lora_targets": (_words, "names of modules"),
    "eval_every": (whole_number(0), "a number of steps, or 0"),
    "save_every": (whole_number(0), "a number of steps, or 0"),
    "teachers": (_words, "names of models"),
    "teacher_share": (real(0, 1), "a number from 0 to 1"),
}
_WORDS = {
    "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "documents": DOCUMENTS, "dtype": DTYPES, "device": DEVICES,
    "recompute": RECOMPUTE,
}  # fmt: skip
