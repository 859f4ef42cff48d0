"""The command line as a real process, where pipes, signals and terminals matter."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time

from tests.paths import ROOT

LAUNCHER = [sys.executable, str(ROOT / "cli.py")]


def interruptible() -> None:
    """Restore the default of SIGINT; for ``preexec_fn``.

    A shell starts its background jobs with SIGINT ignored, and children inherit that: Ctrl-C would do nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, args: list[str], env: dict[str, str]) -> None:
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if not self.pid:
            interruptible()
            os.execve(args[0], args, env)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def send_bytes(self, data: bytes) -> None:
        os.write(self.fd, data)

    def until(self, words: str, seconds: float = 30) -> str:
        """Read up to and including the words."""
        end = time.monotonic() + seconds
        while words.encode() not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} did not come: {self.seen!r}"
            self.seen += os.read(self.fd, 4096)
        text, _, self.seen = self.seen.partition(words.encode())
        return text.decode(errors="replace")

    def status(self) -> int:
        """Read to the end, and wait."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # the terminal is gone
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
