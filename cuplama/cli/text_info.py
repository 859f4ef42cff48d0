"""What ``cuplama info`` says of the text side of a model: tokenizer, chat template, sampling defaults, stop tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..generation_config import Settings
from ..models.config import ModelConfig
from ..text.tokenizer import Tokenizer

__all__ = ["text_facts", "text_view"]

# What every chat passes to the template anyway: that it reads these tells nothing about it.
_ALWAYS = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})


def text_facts(folder: Path | None, config: ModelConfig) -> dict[str, Any]:
    """Facts by stable names; None for what a folder has not, or all of it where there is no folder.

    The stop tokens are those that the engine uses, with their text where there is a tokenizer.
    """
    tokenizer, settings = None, Settings(stop_ids=frozenset(config.eos))
    if folder is not None:
        tokenizer = Tokenizer.find(folder)
        settings = Settings.read(folder, config, tokenizer)
    return {
        "tokenizer": tokenizer and {
            "kind": tokenizer.kind,
            "size": tokenizer.vocab_size,
            "bos": _token(tokenizer.bos, tokenizer),
            "eos": _token(tokenizer.eos, tokenizer),
        },
        "chat_template": tokenizer is not None and tokenizer.chat_template is not None,
        "template_variables": [] if tokenizer is None else sorted(tokenizer.template_variables - _ALWAYS),
        "sampling_defaults": dict(settings.defaults),
        "stop_tokens": [_token(id, tokenizer) for id in sorted(settings.stop_ids)],
    }  # fmt: skip


def text_view(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same for people: name -> a value or a list of values. A published shape has its stop tokens alone."""
    stops = {"stop tokens": [_shown(token) for token in facts["stop_tokens"]]}
    if facts["folder"] is None:
        return stops
    tokenizer, sampling = facts["tokenizer"], facts["sampling_defaults"]
    shown = "none"
    if tokenizer is not None:
        named = (f"{name.upper()} {_shown(tokenizer[name])}" for name in ("bos", "eos"))
        shown = f"{tokenizer['kind']} of {tokenizer['size']} tokens, {', '.join(named)}"
    reads = ", ".join(facts["template_variables"])
    template = f"yes; it also reads {reads}" if reads else "yes" if facts["chat_template"] else "none"
    greedy = [] if sampling.get("temperature") else ["greedy"]
    return {
        "tokenizer": shown,
        "chat template": template,
        "sampling defaults": greedy + [f"{name} {_setting(value)}" for name, value in sampling.items()],
        **stops,
    }


def _setting(value: Any) -> str:
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def _token(id: int | None, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    return None if id is None else {"id": id, "text": None if tokenizer is None else tokenizer.token_text(id)}


def _shown(token: Mapping[str, Any] | None) -> str:
    if token is None:
        return "none"
    return str(token["id"]) if token["text"] is None else f"{token['id']} {token['text']!r}"
