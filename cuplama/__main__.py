"""``python -m cuplama`` is ``cuplama``."""

from .cli import main

main(prog_name="cuplama")
