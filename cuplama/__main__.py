"""``python -m cuplama`` is ``cuplama``: both begin here."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # see cuplama/__init__.py
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["main"]


def main(prog_name: str = "cuplama") -> NoReturn:
    """Run the command line. Ctrl-C while the modules are imported, some 0.3 s, ends quietly with status 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing has begun that would have to be ended
    from .cli.main import main as run

    run(prog_name)


if __name__ == "__main__":
    main()
