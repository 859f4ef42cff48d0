"""Launcher: ``python cli.py generate "Once upon a time"`` works from a checkout without installing."""

from cuplama.__main__ import main

if __name__ == "__main__":
    main()
