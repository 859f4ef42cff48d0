"""What every step gave, a row of JSON each, for whoever wants to look at it afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import writing
from .saving import saved_together

__all__ = ["TrainingLog", "read_log"]

_FULL = "the last checkpoint is whole, and --resume goes on from it when there is room"


class TrainingLog:
    """``log.jsonl`` of a folder. A row has

    step: from 1 on; loss: mean over the step's learned tokens, by the weights before the step; lr: learning rate;
    grad_norm: of all gradients together, before it was limited; tokens_per_second: that the step went through;
    positions: tokens whose prediction was learned; eval_loss: by the weights after the step, where that was measured.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """step: the last one that counts. Later rows, of a run that ended before it saved, are cut off."""
        self.path = folder / "log.jsonl"
        with writing(self.path, CheckpointError, _FULL):
            rows = [row for row in read_log(self.path) if row["step"] <= step]
            with saved_together(folder) as staging:
                staging.text(self.path.name, "".join(map(_line, rows)))
            self._file = self.path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row, which the system has at once. Raises CheckpointError."""
        with writing(self.path, CheckpointError, _FULL):
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Have all rows reach the disk. Raises CheckpointError."""
        with writing(self.path, CheckpointError, _FULL):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. What could not be written was told when it was added."""
        with suppress(OSError):
            self._file.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, up to one that is not whole; none where there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # it was being written when the machine stopped
                return
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                return
            yield row


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
