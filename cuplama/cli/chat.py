"""``cuplama chat``: a question for a model that has a chat template, or a conversation with it."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import PromptError
from ..text.tokenizer import Tokenizer
from .chat_session import ChatSession
from .conversation import Conversation
from .form import form_options
from .openai_server import OpenAIServer
from .options import given_params, model_option, options, run_options, sampling_options
from .prompt import prompt_options, prompt_text, read_file, read_text
from .remote_chat import RemoteSession, find_name
from .repl import repl
from .running import open_model
from .streams import print_json

__all__ = ["chat"]


# How Python spells what JSON has, too: as text, False would count as true in a template.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def _variables(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE as variables of a template: VALUE is JSON, or Python's True, False or None, or else text."""
    found: dict[str, Any] = {}
    for given in values:
        name, equals, value = given.partition("=")
        if not (name.isidentifier() and equals):
            raise click.BadParameter("must look like enable_thinking=false: a name and a value, which is JSON or text")
        if name in inspect.signature(Tokenizer.apply_chat).parameters:
            raise click.BadParameter(f"{name} is not a variable that can be set; see the other options")
        try:
            found[name] = json.loads(_PYTHON.get(value, value))
        except json.JSONDecodeError:
            found[name] = value
    return found


def _objects(_: click.Context, __: click.Parameter, file: Path | None) -> list[dict[str, Any]] | None:
    """What a file with a JSON list of objects holds."""
    if file is None:
        return None
    try:
        found = json.loads(read_file(file))
    except json.JSONDecodeError as e:
        raise click.BadParameter(f"{file} is not JSON: {e}") from None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise click.BadParameter(f"{file} must hold a JSON list of objects")
    return found


_FILE = click.Path(path_type=Path)
# What a template is rendered with beside the questions.
_template_options = options(
    click.option("--system", metavar="TEXT", help="The system message."),
    click.option(
        "--template-arg",
        "variables",
        multiple=True,
        callback=_variables,
        metavar="NAME=VALUE",
        help="A variable of the chat template, such as enable_thinking=false (repeatable).",
    ),
    click.option("--tools", type=_FILE, callback=_objects, metavar="FILE", help="A JSON list of tools the model has."),
    click.option("--documents", type=_FILE, callback=_objects, metavar="FILE", help="A JSON list of documents."),
    click.option("--special-text", is_flag=True, help="Special tokens written in a question are control tokens."),
)

_server_options = options(
    click.option("--server", metavar="URL", help="Chat with the model of this server, such as http://127.0.0.1:8000."),
    click.option("--api-key", envvar="CUPLAMA_API_KEY", metavar="KEY", help="With --server: the key that it asks for."),
)
# Parameters that say how a model runs here.
_LOCAL = (
    "device", "dtype", "quantize", "kv_cache_dtype", "activations", "context", "adapter", "offline", "special_text",
)  # fmt: skip


@click.command(short_help="Answer a QUESTION, or hold a conversation; needs a model with a chat template.")
@model_option()
@prompt_options("QUESTION")
@sampling_options
@form_options
@_template_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr after each answer.")
@_server_options
@run_options
def chat(
    prompt: str | None,
    prompt_option: str | None,
    file_option: Path | None,
    model: str | None,
    offline: bool,
    loading: dict[str, Any],
    system: str | None,
    variables: dict[str, Any],
    as_json: bool,
    stats: bool,
    server: str | None,
    api_key: str | None,
    **more: Any,
) -> None:
    """Answer a QUESTION, or hold a conversation in a terminal, where /help lists the commands.

    The model must have a chat template. With --server nothing is loaded here: the model is that of a server with
    OpenAI's interface, and -m names it where there are several.

    Without a QUESTION, what is piped in is the question: all of it is one. With a QUESTION, standard input is not read.

    An answer may be as long as the context allows, unless -n is given. When a conversation no longer fits the context,
    its oldest turns are left out. Other sampling options that are not given come from the model's
    generation_config.json.
    """
    question = None  # what is piped in is read when the model is there: nothing may come for a long time
    if any(given is not None for given in (prompt, prompt_option, file_option)):
        question = prompt_text(prompt, prompt_option, file_option, "QUESTION")
    interactive = question is None and sys.stdin is not None and sys.stdin.isatty()
    if as_json and interactive:
        raise click.UsageError("--json needs a QUESTION, -f FILE or a pipe")
    template = variables | {k: value for k in ("tools", "documents", "special_text") if (value := more.pop(k))}
    sampling, conversation = {"max_tokens": None, **given_params(more)}, Conversation(system)
    if server is not None:
        _refuse_local_options()
        there = OpenAIServer(server, api_key)
        asked = RemoteSession(there, model or find_name(there), sampling, template, conversation, stats, as_json)
        if interactive:
            repl(asked, asked.name)
        else:
            _answer_once(asked, question, as_json)
        return
    if _is_given("api_key"):
        raise click.UsageError("--api-key needs --server")
    with open_model(model, offline, **loading) as m:
        session = ChatSession(m, sampling, template, conversation, stats)
        session.check()
        if interactive:
            repl(session, Path(model or "").name or m.folder.resolve().name)
        else:
            _answer_once(session, question, as_json)


def _is_given(name: str) -> bool:
    """Whether the command line has this parameter; the environment and defaults do not count."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_local_options() -> None:
    for parameter in click.get_current_context().command.params:
        if parameter.name in _LOCAL and _is_given(parameter.name):
            raise click.UsageError(f"{max(parameter.opts, key=len)} does not go with --server: the server decides it")


def _answer_once(session: ChatSession | RemoteSession, question: str | None, as_json: bool) -> None:
    question = read_text("-") if question is None else question
    if not question.strip():
        raise PromptError("the question is empty")
    answer = session.ask(question, show=not as_json)
    if answer.finish_reason is None:
        raise KeyboardInterrupt
    if as_json:
        print_json({**answer.to_dict(), "messages": session.conversation.messages()})
