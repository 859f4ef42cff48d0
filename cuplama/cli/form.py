"""The options that say what a text must look like: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ParameterError
from ..output_form import FORMS
from ..sampling_params import read_parameter
from .options import options
from .prompt import read_file

__all__ = ["form_options"]


def _form(context: click.Context, parameter: click.Parameter, given: str | Path | None) -> Any:
    """What was given, or the file has, as the parameter of that name keeps it."""
    if given is None:
        return None
    text = read_file(given) if isinstance(given, Path) else given
    try:
        form = read_parameter(str(parameter.name), text)
    except ParameterError as e:
        raise click.BadParameter(str(e)) from None
    others = [name for name in FORMS if name != parameter.name and context.params.get(name) is not None]
    if others:
        names = " and ".join("--" + str(name).replace("_", "-") for name in (others[0], parameter.name))
        raise click.UsageError(f"{names} do not go together: a text has one form")
    return form


_FILE = click.Path(path_type=Path)
form_options = options(
    click.option("--json-schema", type=_FILE, callback=_form, metavar="FILE", help="The text is JSON of this schema."),
    click.option("--regex", callback=_form, metavar="REGEX", help="The whole text matches."),
    click.option("--grammar", type=_FILE, callback=_form, metavar="FILE", help="The text follows a Lark or GBNF file."),
)
