"""The folder of a training run: the model as others read it, and beside it what a run needs to go on.

``OUT/training/state.safetensors`` alone is enough to go on: float32 weights, the optimizer's moments, the step, and
what the run was given. It is moved to its place after the model: where a run is killed in between, the model is one
save newer than the state, and going on makes it again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import is_missing, not_understood, writing
from .lock import FolderLock
from .saving import UNFINISHED, Staging, saved_together
from .settings import TrainingSettings

__all__ = ["Run", "Saved", "TrainingFolder"]

_STATE = "training/state.safetensors"
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Run:
    """What a run was given. data, model: fingerprints of the tokens and of what is trained; context: T."""

    settings: TrainingSettings
    data: str
    model: str
    context: int

    def text(self) -> str:
        """As JSON."""
        facts = {**self.settings.facts(), "context": self.context}
        return json.dumps({"settings": facts, "data": self.data, "model": self.model})


@dataclass(frozen=True)
class Saved:
    """A checkpoint: the step after which it was made, the trainer's arrays, and the ``Run`` as JSON."""

    step: int
    arrays: Arrays
    run: Mapping[str, Any]


class TrainingFolder:
    """Where a model is trained, by one process until ``close``. path: the folder."""

    def __init__(self, path: Path, resume: bool) -> None:
        """Opens or makes the folder.

        Raises CheckpointError for one with a checkpoint unless ``resume``, for one that holds anything else, for one
        that another process trains in, and where it cannot be made.
        """
        self.path = path
        self._step = 0  # of the checkpoint that is there
        with writing(path, CheckpointError):
            names = set(os.listdir(path)) if path.exists() else set()
            if self.has_checkpoint and not resume:
                raise CheckpointError(f"{path} has a checkpoint; --resume goes on from it, or choose another folder")
            if names and "training" not in names:
                raise CheckpointError(f"{path} is not empty, and nothing was trained there")
            (path / "training").mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path / "training")  # before anything is touched that may be another's
            for file in (*path.glob(f"*{UNFINISHED}"), *path.glob(f"*/*{UNFINISHED}")):
                file.unlink()

    def close(self) -> None:
        """Let others train there."""
        self._lock.close()

    def __enter__(self) -> TrainingFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run can go on from here."""
        return not is_missing(self.path / _STATE)

    def load(self, run: Run) -> Saved | None:
        """The checkpoint, None for none. Raises CheckpointError for one that is damaged, or of another run."""
        if not self.has_checkpoint:
            return None
        path = self.path / _STATE
        try:
            with path.open("rb"), safe_open(str(path), framework="np") as file:
                said = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it has no __iter__)
            saved = Saved(int(said["step"]), arrays, json.loads(said["run"]))
        except SafetensorError as e:
            raise CheckpointError(not_understood(path, "is truncated or corrupt", str(e).split(": ", 1)[-1])) from None
        except (KeyError, ValueError):
            raise CheckpointError(f"{path} is not the checkpoint of a training") from None
        self._compare(saved.run, run)
        self._step = saved.step
        return saved

    def _compare(self, before: Mapping[str, Any], run: Run) -> None:
        now = json.loads(run.text())
        others = run.settings.differences({**before.get("settings", {}), "context": run.settings.context})
        was = before.get("settings", {}).get("context")
        if was != run.context:
            others.insert(0, f"context = {was}, not {run.context}")
        if others:
            raise CheckpointError(f"{self.path} was trained with {', '.join(others)}; --resume needs the same")
        for name, words in (("data", "other data"), ("model", "another model, or an older version of it")):
            if before.get(name) != now[name]:
                raise CheckpointError(f"{self.path} was trained from {words}; --resume needs the same")

    def save(self, step: int, arrays: Arrays, run: Run, model: Callable[[Staging], None]) -> None:
        """Write a checkpoint. arrays: the trainer's; model: writes the files of the model.

        All is written before the first file takes its place. Raises CheckpointError, also for a disk that is full and
        for arrays that are not finite, as after too large a step; the checkpoint before stays then.
        """
        kept, full = "nothing is saved yet", ""
        if self._step:
            kept, full = (
                f"the checkpoint of step {self._step}",
                " is whole, and --resume goes on from it when there is room",
            )
        # A sum in float64 of what fits in float32 is finite if all numbers are, and needs no memory.
        if not all(math.isfinite(array.sum(dtype=np.float64)) for array in arrays.values()):
            stays = f"{kept} stays" if self._step else kept
            raise CheckpointError(
                f"step {step} has left weights that are not finite; {stays} (a smaller --lr or a --warmup may help)"
            )
        with writing(self.path, CheckpointError, kept + full), saved_together(self.path) as staging:
            model(staging)
            staging.tensors(_STATE, arrays, {"step": str(step), "run": run.text()})
        self._step = step
