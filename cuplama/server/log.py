"""The log of requests: one line of JSON for each on stderr, and more where something broke."""

from __future__ import annotations

import json
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

__all__ = ["RequestLog"]


class RequestLog:
    """Writes a line per request. prompts: whether it has the request's body; without, no text of a request is written.

    Where something broke the traceback's last line is what the error says, which may quote such text.
    """

    def __init__(self, stream: TextIO | None = None, prompts: bool = False) -> None:
        self._stream = stream
        self.prompts = prompts

    def write(self, **fields: Any) -> None:
        """One line: the time in UTC, and the fields that have a value."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps({"time": now, **known}, default=str)
        stream = self._stream or sys.stderr
        stream.write(f"{line}\n")  # at once: print would let another thread's line in before the line break
        stream.flush()

    def failure(self, error: BaseException, **fields: Any) -> None:
        """A line for what is our fault, or the device's, with the traceback."""
        self.write(**fields, error=repr(error), traceback="".join(traceback.format_exception(error)))
