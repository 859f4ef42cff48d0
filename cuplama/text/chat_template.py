"""Chat templates: a list of messages in, the text of the prompt out.

Templates come from the model folder and are untrusted code, so jinja2's immutable sandbox runs them. The environment
(whitespace rules, helper functions, the `generation` block) is the one that Hugging Face documents for template
writers, because templates are written against it:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template


__all__ = ["render"]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """Render `messages` ({"role": str, "content": str} each) with the jinja2 source `template`.

    A special token that is None is left undefined, so it prints as nothing; `extra` names further variables of the
    template (`enable_thinking`, `documents`, ...). Raises TokenizerError, in one line, for messages that are not of
    that form, for a template that does not compile, and for whatever the template itself refuses or runs into.
    """
    import jinja2

    variables = {"bos_token": bos_token, "eos_token": eos_token, **extra}
    try:
        return _compile(template).render(
            messages=_checked(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{name: value for name, value in variables.items() if value is not None},
        )
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"chat template, line {error.lineno}: {_one_line(error)}") from error
    except TokenizerError:
        raise
    except Exception as error:  # a template is a program: it may run into anything
        raise TokenizerError(f"chat template: {_one_line(error)}") from error


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TokenizerError(f"messages must be a list of dicts, not {type(messages).__name__}")
    if not messages:
        raise TokenizerError("messages is empty: a chat needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(f"messages[{i}] must be a dict with role and content, not {message!r:.80}")
        # An assistant that only calls tools says nothing.
        silent = message.get("content") is None and message.get("tool_calls")
        for field in ("role",) if silent else ("role", "content"):
            if field not in message:
                raise TokenizerError(f"messages[{i}] has no {field!r}")
            if not isinstance(message[field], str):
                raise TokenizerError(f"messages[{i}][{field!r}] must be a string, not {message[field]!r:.80}")
    return [dict(message) for message in messages]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    # Imported here because it takes longer than everything else that `import cuplama` does.
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; at inference it is a plain scope."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter would escape <, >, & and ' for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
