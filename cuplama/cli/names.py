"""Names that people bring from other programs: options that go by more than one, and words for devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

__all__ = ["DEVICE_WORDS", "NamedOption", "device_word"]

# What other programs call the devices of ``load``.
DEVICE_WORDS: Mapping[str, str] = {"cpu": "numpy", "gpu": "cuda"}


def device_word(_: click.Context, __: click.Parameter, value: str) -> str:
    """A click callback: the device that a word stands for."""
    return DEVICE_WORDS.get(value, value)


class NamedOption(click.Option):
    """An option with a value that also goes by names that llama.cpp, transformers or vLLM have for it.

    also: those names. The help names them after its text; messages about the option do not.
    """

    def __init__(self, *args: Any, also: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.also = tuple(also)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Teach click's parser all names."""
        super().add_to_parser(parser, ctx)
        if self.also:
            action = "append" if self.multiple else "store"
            parser.add_option(self, self.also, dest=self.name, action=action, nargs=self.nargs)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The two columns of --help."""
        record = super().get_help_record(ctx)
        if record is None or not self.also:
            return record
        return record[0], f"{record[1]}  [also: {', '.join(self.also)}]"
