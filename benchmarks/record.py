"""What a benchmark writes: its command, the machine, and the results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cuplama.backends.cuda.backend import CudaBackend
from tools.verify import environment


def record(results: Sequence[dict[str, Any]], file: Path | None) -> None:
    """Write the results as JSON to ``file``, if there is one."""
    if file is None:
        return
    backend = CudaBackend("bf16")
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    whole = {"command": command, "environment": environment(backend), "results": list(results)}
    backend.close()
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
