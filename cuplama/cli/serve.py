"""``cuplama serve``: a model over HTTP, for clients of OpenAI's interface, with a web page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CuplamaError
from ..hub import BUNDLED
from .addresses import is_loopback
from .options import CACHE_TOKENS, Decorator, model_option, options, run_options
from .running import open_model
from .streams import notice, write_text

if TYPE_CHECKING:
    from ..model import Model
    from ..server.limits import Limits

__all__ = ["serve"]

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # "all addresses" -> one of them, which a browser can open


def _filled(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    # An empty key would let in everybody; so would a variable that is set to nothing by mistake.
    nothing = not values and isinstance(option.envvar, str) and option.envvar in os.environ
    if nothing or not all(value.strip() for value in values):
        raise click.BadParameter("the text is empty")
    return values


def _texts(*names: str, metavar: str, help: str, envvar: str | None = None) -> Decorator:
    return click.option(
        *names, multiple=True, callback=_filled, metavar=metavar, help=help, envvar=envvar, show_envvar=True
    )


def _count(name: str, least: int, help: str) -> Decorator:
    return click.option(name, type=click.IntRange(least), metavar="N", help=help)


_options = options(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free."),
    _texts("--api-key", "keys", metavar="KEY", help="Key that clients need (repeatable).", envvar="CUPLAMA_API_KEY"),
    _texts("--served-model-name", "names", metavar="NAME", help="Name that clients ask for (repeatable)."),
    _texts("--cors", "origins", metavar="ORIGIN", help="Web page that may ask, https://host or * (repeatable)."),
    _count("--max-running", 1, "Sequences that are computed at a time."),
    _count("--max-waiting", 0, "Requests that may wait; others get status 429."),
    CACHE_TOKENS,
    click.option(
        "--no-prefix-cache",
        "prefix_cache",
        flag_value=False,
        type=bool,
        default=None,
        help="Read every prompt from its beginning.",
    ),
    click.option(
        "--limit",
        "limits",
        multiple=True,
        metavar="NAME=N",
        help="Bound of a request, as in prompts=64 (repeatable).",
    ),
    click.option(
        "--drain-seconds",
        type=click.FloatRange(0),
        default=30,
        show_default=True,
        metavar="S",
        help="Time that running requests have to end after SIGTERM.",
    ),
    click.option("--reasoning-format", metavar="NAME", help="How the model writes reasoning, or none."),
    click.option("--tool-format", metavar="NAME", help="How the model writes tool calls, or none."),
    click.option("--log-prompts", is_flag=True, help="Write prompts into the log."),
)


@click.command(short_help="Serve a model over HTTP; needs the extra serve.")
@model_option()
@_options
@run_options
def serve(
    model: str | None,
    host: str,
    port: int,
    keys: tuple[str, ...],
    names: tuple[str, ...],
    origins: tuple[str, ...],
    limits: tuple[str, ...],
    drain_seconds: float,
    log_prompts: bool,
    reasoning_format: str | None,
    tool_format: str | None,
    offline: bool,
    loading: dict[str, Any],
    **more: Any,
) -> None:
    """Serve a model over HTTP: OpenAI's interface under /v1, and a page for people at /.

    The port opens at once; until the model is loaded, requests get status 503. SIGTERM or Ctrl-C lets running requests
    end, a second one stops. Each request is a line of JSON on standard error.
    """
    try:
        from ..server import lifecycle
        from ..server.log import RequestLog
        from ..server.service import Service
        from ..server.warm_up import warm_up
        from ..text.answer_form import find_form
    except ModuleNotFoundError as e:
        raise CuplamaError(f"there is no module {e.name}; serve needs an extra: pip install 'cuplama[serve]'") from None
    # A wrong name is told before the model is loaded.
    find_form(None, (), reasoning=reasoning_format, tools=tool_format)
    loading |= {name: value for name, value in more.items() if value is not None}
    log = RequestLog(prompts=log_prompts)
    service = Service(names or (_name(model),), limits=_limits(limits), keys=keys, origins=origins, log=log)
    sock = lifecycle.listen(host, port)
    if not keys and not is_loopback(host):
        notice(f"{host} can be reached from other machines, and no --api-key is set: everybody there may use the model")
    _say_where(host, sock.getsockname()[1])
    context = click.get_current_context()

    def load() -> Model:
        with context.scope(cleanup=False):  # of another thread: --quiet counts there, too
            opened = open_model(model, offline, **loading)
            if reasoning_format or tool_format:
                opened.tokenizer.choose_form(reasoning=reasoning_format, tools=tool_format)
            warm_up(opened)
            notice(f"ready: {opened!r}")
            return opened

    lifecycle.serve(service, load, sock, drain_seconds=drain_seconds, say=notice)


def _name(model: str | None) -> str:
    """What a model is called by clients, unless they are told otherwise: hub ids as they are, files by their name."""
    if model is None:
        return BUNDLED
    path = Path(model)
    if not path.exists():
        return model
    return path.resolve().stem if path.is_file() else path.resolve().name


def _limits(given: tuple[str, ...]) -> Limits:
    """Limits with some of its fields replaced."""
    from ..server.limits import Limits

    fields: dict[str, Any] = {}
    known = Limits.__dataclass_fields__
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise click.BadParameter(f"--limit {text}: known are {', '.join(known)}")
        if not value.isdigit():
            raise click.BadParameter(f"--limit {text}: it must be a whole number, as in {name}=100")
        fields[name] = int(value)
    return Limits(**fields)


def _say_where(host: str, port: int) -> None:
    """The addresses, on stdout: with --port 0 a program reads the port there."""
    host = _EVERYWHERE.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    write_text(f"page: http://{shown}:{port}/\nAPI:  http://{shown}:{port}/v1\n")
