"""``python -m cuplama`` is ``cuplama``."""

from .cli.main import main

main(prog_name="cuplama")
