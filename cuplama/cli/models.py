"""``cuplama models``: what was downloaded from the hub, and whether it runs here."""

from __future__ import annotations

import click

from .options import DEBUG, QUIET
from .streams import notice, print_json, print_table, progress_bar, size_text

__all__ = ["models"]


@click.command(short_help="The downloaded models, and whether each runs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@QUIET
@DEBUG
def models(as_json: bool) -> None:
    """The models of the Hugging Face cache: their size, and whether cuplama runs them, or why not.

    Every name can be given to -m. The bundled story model is not among them; it runs without -m.
    """
    from ..hub import cached_models
    from .runnable import why_not

    cached, found = cached_models(), []
    with progress_bar("looking at", "models") as progress:
        for model in cached:
            found.append((model, why_not(model.folder)))
            progress(len(found), len(cached))
    if as_json:
        print_json(
            [
                {
                    "model": model.repository,
                    "folder": str(model.folder),
                    "bytes": model.size,
                    "runs": reason is None,
                    "reason": reason,
                }
                for model, reason in found
            ]
        )
    elif found:
        rows = [(m.repository, size_text(m.size), "yes" if reason is None else f"no: {reason}") for m, reason in found]
        print_table(("model", "size", "runs"), rows)
    else:
        notice("no model was downloaded yet; cuplama pull ORG/NAME downloads one")
