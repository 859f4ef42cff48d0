"""What a chat asks for: messages to the ids of a prompt, and tools and reasoning to what splits the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import read_chat
from ..errors import TokenizerError
from ..model import Model
from ..text.answer_form import AnswerForm
from ..text.splitter import Splitter
from ..text.tool_calls.tools import Tool, read_tools
from .errors import ApiError
from .kinds import json_shown

__all__ = ["ChatRequest", "encode_chat"]

_END = 32  # tokens at the end of a prompt in which a start tag of the reasoning is looked for
