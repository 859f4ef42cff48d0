"""Commands with many options: --help lists them under headings, and an option may take several files at once."""

from __future__ import annotations

from typing import Any

import click

from .options import Decorator, options

__all__ = ["FilesOption", "SectionedCommand", "section"]

_SECTION = "cuplama_section"  # an attribute of a parameter: the heading that it stands under


class SectionedCommand(click.Command):
    """Lists its options under the headings that ``section`` gave them, and the others last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, _SECTION, "Other options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def section(heading: str, *decorators: Decorator) -> Decorator:
    """Options that stand together in --help."""

    def decorate(command: Any) -> Any:
        before = list(getattr(command, "__click_params__", []))
        command = options(*decorators)(command)
        for parameter in command.__click_params__:
            if parameter not in before:
                setattr(parameter, _SECTION, heading)
        return command

    return decorate


class FilesOption(click.Option):
    """An option that takes one file or several, ``--data A B``, and may be given again."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Teach click's parser to take whatever follows that is no option."""
        super().add_to_parser(parser, ctx)
        for name in self.opts:
            option = parser._long_opt[name]
            option.process = _taking_all(option.process)


def _taking_all(take: Any) -> Any:
    def process(value: Any, state: Any) -> None:
        take(value, state)
        while state.rargs and not state.rargs[0].startswith("-"):
            take(state.rargs.pop(0), state)

    return process
