"""The ``cuplama`` command: its sub-commands, and how whatever goes wrong in one of them ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

import click

from .. import __version__
from ..errors import CuplamaError
from .bench import bench
from .chat import chat
from .completion import completion
from .doctor import doctor
from .generate import generate
from .graph import graph
from .info import info
from .kernels import kernels
from .merge import merge
from .models import models
from .perplexity import perplexity
from .pull import pull
from .quantize import quantize
from .serve import serve
from .streams import say
from .tokenize import tokenize
from .train import train

__all__ = ["cli", "main"]

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_new_tokens, as Python programs spell options
}


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="cuplama")
def cli() -> None:
    """Run Llama-family language models: no PyTorch, no conversion, a GPU if there is one."""


_COMMANDS = (
    bench, chat, completion, doctor, generate, graph, info, kernels, merge, models, perplexity, pull,
    quantize, serve, tokenize, train,
)  # fmt: skip
for _command in _COMMANDS:
    cli.add_command(_command)


def main(prog_name: str = "cuplama") -> NoReturn:
    """Run the command line. What a user can cause ends in one line on stderr and exit status 2."""
    _prepare_streams()
    try:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        ):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # __main__ had another while modules were imported
        cli.main(prog_name=prog_name, standalone_mode=False, color=None if _colourful() else False)
        sys.stdout.flush()
    except BrokenPipeError:  # `cuplama ... | head -1` ends quietly
        _drop_output()
        sys.exit(1)
    except click.ClickException as e:
        if type(e).__name__ == "NoArgsIsHelpError":  # no command: its message is the help text (click 8.2 and later)
            e.show()
            sys.exit(e.exit_code)
        help_ = f" ({e.ctx.command_path} --help)" if isinstance(e, click.UsageError) and e.ctx is not None else ""
        _fail(f"{e.format_message()}{help_}", e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as e:
        if "--debug" in sys.argv:
            raise
        _fail_by(e)
    sys.exit(0)


def _colourful() -> bool:
    """Whether a terminal may get colours (https://no-color.org); what is no terminal gets none anyway."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _prepare_streams() -> None:
    """Make stdout and stderr usable whatever the caller closed and whatever the text holds; log to stderr."""
    if sys.stderr is None:  # `cuplama ... 2>&-`: Python has no stream for what is closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    if sys.stdout is None:
        _fail("standard output is closed", 2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="cuplama: %(message)s", level=logging.WARNING, stream=sys.stderr)


def _fail_by(error: Exception) -> NoReturn:
    """End with status 2 for what a user can mend, and with 1 for what is our fault."""
    if isinstance(error, CuplamaError):
        _fail(str(error), 2)
    if isinstance(error, OSError):  # a full disk, a terminal that is gone; files are named where they are opened
        _drop_output()
        _fail(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", 2)
    _fail(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1)


def _drop_output() -> None:
    """Send the rest of stdout nowhere: what could not be written must not be tried again when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> NoReturn:
    """Print one line on stderr, whatever the message holds, and exit."""
    say(f"cuplama: {' '.join(message.splitlines())}")
    sys.exit(status)
