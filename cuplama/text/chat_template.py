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
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import TokenizerError
from .messages import checked_messages, messages_for
from .template_reading import Reading, read_template

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["ChatTemplate", "chat_template", "render"]


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
    compiled = chat_template(template)
    values = {"bos_token": bos_token, "eos_token": eos_token, **extra}
    return compiled.text(
        messages_for(compiled.reading, checked_messages(messages)),
        {"tools": tools, "add_generation_prompt": add_generation_prompt, **values},
    )


class ChatTemplate:
    """A compiled template; `chat_template` makes one. source: its text; reading: what it reads."""

    def __init__(self, source: str) -> None:
        import jinja2

        self.source = source
        try:
            self.reading: Reading = read_template(_environment(), source)
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"chat template, line {error.lineno}: {_one_line(error)}") from error
        except Exception as error:  # jinja2's compiler meets programs that nobody foresaw
            raise TokenizerError(f"chat template: {_one_line(error)}") from error

    def text(self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
        """What the template prints for messages in the form of its `reading`. Raises TokenizerError, in one line.

        values: its variables. One that is None is left undefined, but for `tools`, which templates compare with none.
        """
        given = {name: value for name, value in values.items() if value is not None or name == "tools"}
        try:
            return self._template.render(messages=list(messages), **given)
        except Exception as error:  # a template is a program: it may run into anything
            raise TokenizerError(f"chat template: {_one_line(error)}") from error


@lru_cache(maxsize=16)
def chat_template(source: str) -> ChatTemplate:
    """The compiled template. Raises TokenizerError if it does not compile."""
    return ChatTemplate(source)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _environment() -> ImmutableSandboxedEnvironment:
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
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter would escape <, >, & and ' for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
