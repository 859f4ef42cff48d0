"""The tokenizer's files in a model folder: tokenizer.json, and what the optional files beside it add.

tokenizer_config.json adds the names of BOS and EOS, added tokens that tokenizer.json lacks, and the chat template. Its
`add_bos_token` is ignored: transformers 5 ignores it too where there is a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TokenizerFiles", "read_folder"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says: the `tokenizers` object, special tokens and jinja2 templates by name."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]


def read_folder(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json and the optional files beside it.

    Raises TokenizerError, naming the file, if tokenizer.json is missing or any of the files is unusable.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "; a tokenizer.model alone is not supported" if (folder / "tokenizer.model").exists() else ""
        raise TokenizerError(f"{path} does not exist{hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path)
    map_path = folder / "special_tokens_map.json"
    names = {**_special_tokens(map_path, _read_object(map_path)), **_special_tokens(config_path, config)}
    _add_missing_tokens(backend, config, config_path)
    return TokenizerFiles(backend, names, _chat_templates(folder, config))


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _special_tokens(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of the special tokens that `path` names, as strings or as serialized AddedTokens."""
    names: dict[str, str] = {}
    for name, value in values.items():
        if name not in _SPECIAL_NAMES or value is None:
            continue
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str):
            raise TokenizerError(f"{path}: {name} must be a string, not {value!r:.80}")
        names[name] = token
    return names


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json lists, under the ids it gives them."""
    import tokenizers

    listed = config.get("added_tokens_decoder") or {}
    try:
        entries = sorted((int(id), dict(entry)) for id, entry in listed.items())
        tokens = [(id, tokenizers.AddedToken(**_without_type(entry))) for id, entry in entries]
    except (AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: added_tokens_decoder is malformed: {error}") from error
    for id, token in tokens:
        if backend.token_to_id(token.content) is not None:
            continue
        backend.add_tokens([token])
        if (given := backend.token_to_id(token.content)) != id:
            raise TokenizerError(
                f"{path}: added_tokens_decoder gives {token.content!r} id {id}, but tokenizer.json has room for {given}"
            )


def _without_type(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "__type"}


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source: chat_template.jinja before chat_template.json before tokenizer_config.json.

    Each file `additional_chat_templates/NAME.jinja` adds one more, or replaces the one of its name.
    """
    jinja = folder / "chat_template.jinja"
    named = {"default": _read_text(jinja)} if jinja.is_file() else _templates_of_configs(folder, config)
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {**named, **{path.stem: _read_text(path) for path in more}}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error


def _templates_of_configs(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source, from chat_template.json or else tokenizer_config.json."""
    alone = folder / "chat_template.json"
    for path, holder in ((alone, _read_object(alone)), (folder / "tokenizer_config.json", config)):
        value = holder.get("chat_template")
        if value is None:
            continue
        if isinstance(value, str):
            return {"default": value}
        try:
            named = {entry["name"]: entry["template"] for entry in value}
        except (TypeError, KeyError):
            named = {}
        if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
            raise TokenizerError(f"{path}: chat_template must be a string or a list of {{name, template}}")
        return named
    return {}
