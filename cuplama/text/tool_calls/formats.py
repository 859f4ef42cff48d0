"""The table of the forms in which models write tool calls.

Read in the chat templates of the models, and held against the tool parsers of vLLM 0.33 (vllm/tool_parsers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .events import CallReader, Numbering
from .json_bodies import JsonReader, NamedReader
from .tools import Tool
from .whole_bodies import GEMMA_BODY, PYTHON_BODY, XML_BODY, Body, WholeReader

__all__ = ["DEFAULT_FORMAT", "TOOL_FORMATS", "ToolFormat"]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    starts: tags that calls come after; the first is the one that a grammar writes. end: the tag after them, which may
    be missing. body: a key of _READERS. markers: texts of which one, in the chat template or in a token, tells the
    form.
    bare: what a call without a start tag begins with, "" if there is none. bare_anywhere: also after other content.
    separator: of the body `named`, between name and arguments, a regular expression; written: the same as a grammar
    writes it. tokens: further tokens in a body.
    ends_turn: the end tag is a stop token. short_ids: ids of calls have nine letters.
    """

    name: str
    markers: tuple[str, ...]
    starts: tuple[str, ...]
    end: str
    body: str
    bare: str = ""
    bare_anywhere: bool = False
    separator: str = ""
    written: str = ""
    tokens: tuple[str, ...] = ()
    ends_turn: bool = False
    short_ids: bool = False

    def reader(self, tools: Mapping[str, Tool], numbering: Numbering, *, bare: bool) -> CallReader:
        """A reader of what follows a start tag, or of a call that has none."""
        return _READERS[self.body](self, tools, numbering, bare)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that must be seen to read a call."""
        return (*self.starts, self.end, *self.tokens)


def _json(form: ToolFormat, tools: Mapping[str, Tool], numbering: Numbering, bare: bool) -> CallReader:
    return JsonReader(numbering, tools.keys() if bare else None)


def _named(form: ToolFormat, tools: Mapping[str, Tool], numbering: Numbering, bare: bool) -> CallReader:
    return NamedReader(numbering, form.separator)


def _whole(body: Body) -> Callable[[ToolFormat, Mapping[str, Tool], Numbering, bool], CallReader]:
    return lambda form, tools, numbering, bare: WholeReader(numbering, body, tools, form.end, bare)


_READERS: Mapping[str, Callable[[ToolFormat, Mapping[str, Tool], Numbering, bool], CallReader]] = {
    "json": _json,  # {"name": ..., "arguments": {...}}
    "json list": _json,  # [{"name": ..., "arguments": {...}}, ...]
    "json parameters": _json,  # {"name": ..., "parameters": {...}}
    "named": _named,  # name{...}
    "python": _whole(PYTHON_BODY),  # [name(a=1), ...]
    "python lines": _whole(PYTHON_BODY),  # name(a=1)
    "gemma": _whole(GEMMA_BODY),  # call:name{a:1}
    "xml": _whole(XML_BODY),  # <function=name><parameter=a>1</parameter></function>
}

# In this order: a row stands before those whose markers it has as well.
TOOL_FORMATS: Mapping[str, ToolFormat] = {
    form.name: form
    for form in (
        ToolFormat("seed", ("<seed:tool_call>",), ("<seed:tool_call>",), "</seed:tool_call>", "xml"),
        # Qwen3-Coder, Qwen3.5 and later. Qwen3-Coder forgets the start tag at times.
        ToolFormat(
            "qwen-xml", ("<function=",), ("<tool_call>",), "</tool_call>", "xml", bare="<function=", bare_anywhere=True
        ),
        ToolFormat("hermes", ("<tool_call>",), ("<tool_call>",), "</tool_call>", "json"),
        ToolFormat("gemma", ("<|tool_call>",), ("<|tool_call>",), "<tool_call|>", "gemma", tokens=('<|"|>',)),
        ToolFormat("lfm", ("<|tool_call_start|>",), ("<|tool_call_start|>",), "<|tool_call_end|>", "python"),
        ToolFormat("olmo", ("<function_calls>",), ("<function_calls>",), "</function_calls>", "python lines"),
        ToolFormat(
            "harmony",
            ("<|channel|>",),
            (
                "<|channel|>commentary to=functions.",
                "<|channel|>analysis to=functions.",
                "<|start|>assistant to=functions.",
            ),
            "<|call|>",
            "named",
            separator=r"[^{]*?<\|message\|>\s*",
            written=" <|constrain|>json<|message|>",
            tokens=("<|message|>", "<|constrain|>"),
            ends_turn=True,
        ),
        # From version 11 of Mistral's tokenizer on.
        ToolFormat(
            "mistral-args",
            ("[ARGS]",),
            ("[TOOL_CALLS]",),
            "",
            "named",
            separator=r"(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*",
            written="[ARGS]",
            tokens=("[ARGS]", "[CALL_ID]"),
            short_ids=True,
        ),
        ToolFormat("mistral", ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), "", "json list", short_ids=True),
        ToolFormat("tool-call-token", ("<|tool_call|>",), ("<|tool_call|>",), "<|/tool_call|>", "json list"),
        # Phi-4-mini; its template shows tools and no call.
        ToolFormat(
            "functools", ("functools[", "<|tool|>"), ("functools", "<|tool_call|>"), "<|/tool_call|>", "json list"
        ),
        # Llama 4, and Llama 3.2 where its prompt asks for it.
        ToolFormat("pythonic", ("[func_name1(",), ("<|python_start|>",), "<|python_end|>", "python", bare="["),
        # Llama 3.1 to 3.3. Also what a model is asked for whose template does not say how it calls tools.
        ToolFormat(
            "llama-json",
            ('"parameters": dictionary of argument name', "<|python_tag|>"),
            ("<|python_tag|>", "<|python_start|>"),
            "<|python_end|>",
            "json parameters",
            bare="{",
        ),
    )
}
DEFAULT_FORMAT = TOOL_FORMATS["llama-json"]
