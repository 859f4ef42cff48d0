"""The tokenizer's files in a model folder: tokenizer.json, and what the optional files beside it add.

tokenizer_config.json adds the names of BOS and EOS, added tokens, and the chat template; added_tokens.json adds tokens
where tokenizer_config.json lists none. As in transformers 5 (5.24: `tokenization_utils_tokenizers.py` and the classes
of the families), where there is a tokenizer.json

- `split_special_tokens` is followed: special tokens in a text are then text;
- `add_prefix_space` is followed for the classes that build their own byte-level pre-tokenizer;
- `add_bos_token` and `add_eos_token` are not: the post-processor of tokenizer.json decides.

What the files say and the tokenizer does not do is named in a warning on the ``cuplama`` logger.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from ..files import not_opened, not_understood, read_optional_json

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TokenizerFiles", "read_file", "read_folder"]

_log = logging.getLogger("cuplama")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Classes of transformers 5 that replace the pre-tokenizer of tokenizer.json by their own, with `add_prefix_space`.
_BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says: the `tokenizers` object, special tokens and jinja2 templates by name."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]


def read_file(path: Path) -> TokenizerFiles:
    """Read a tokenizer.json, with the files beside it if that is its name. Raises as ``read_folder`` does."""
    return read_folder(path.parent) if path.name == "tokenizer.json" else TokenizerFiles(_backend(path), {}, {})


def read_folder(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json and the optional files beside it.

    Raises TokenizerError, naming the file, if tokenizer.json is missing or any of the files is unusable. Logs a warning
    for what is left out.
    """
    backend = _backend(folder / "tokenizer.json")
    config_path = folder / "tokenizer_config.json"
    config = read_optional_json(config_path, TokenizerError)
    map_path = folder / "special_tokens_map.json"
    special = read_optional_json(map_path, TokenizerError)
    names = {**_special_tokens(map_path, special), **_special_tokens(config_path, config)}
    _add_tokens(backend, *_listed_tokens(folder, config, names))
    for name in ("bos_token", "eos_token"):
        if name in names and backend.token_to_id(names[name]) is None:
            _log.warning("%s: %s = %r is not in tokenizer.json and counts as absent", folder, name, names.pop(name))
    for ignored in (*_apply_switches(backend, config), *_lacking(backend, config)):
        _log.warning("%s: %s", config_path, ignored)
    return TokenizerFiles(backend, names, _chat_templates(folder, config))


def _backend(path: Path) -> tokenizers.Tokenizer:
    """The `tokenizers` object of a tokenizer.json."""
    import tokenizers

    if not path.is_file():
        hint = "; a tokenizer.model alone is not supported" if (path.parent / "tokenizer.model").exists() else ""
        raise TokenizerError(f"{path} is a folder" if path.is_dir() else not_opened(path, FileNotFoundError()) + hint)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())
        if "did not match any variant" in reason or "Unknown tokenizer version" in reason:
            reason += f"; a newer tokenizers than {tokenizers.__version__} may read it: pip install -U tokenizers"
        raise TokenizerError(not_understood(path, "cannot be read", reason)) from error


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


def _listed_tokens(
    folder: Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[str, dict[int, tokenizers.AddedToken]]:
    """(which list, id -> token): tokenizer_config.json's list of added tokens, or without one added_tokens.json."""
    import tokenizers

    path = folder / "tokenizer_config.json"
    where, tokens = f"{path}: added_tokens_decoder", dict[int, tokenizers.AddedToken]()
    try:
        if "added_tokens_decoder" in config:
            for id, entry in (config["added_tokens_decoder"] or {}).items():
                tokens[int(id)] = tokenizers.AddedToken(**{k: v for k, v in dict(entry).items() if k != "__type"})
        else:
            path = folder / "added_tokens.json"
            where = str(path)
            for content, id in read_optional_json(path, TokenizerError).items():
                special = content in names.values()
                tokens[int(id)] = tokenizers.AddedToken(content, special=special, normalized=not special)
    except (AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(f"{where} is malformed: {error}") from error
    return where, tokens


def _add_tokens(backend: tokenizers.Tokenizer, where: str, tokens: Mapping[int, tokenizers.AddedToken]) -> None:
    """Add what tokenizer.json lacks, under the ids that the list gives; a listed token's flags count, too."""
    known = backend.get_added_tokens_decoder()
    for id, token in sorted(tokens.items()):
        given = backend.token_to_id(token.content)
        if given is None or (given == id and repr(known.get(id)) != repr(token)):
            backend.add_tokens([token])
            given = backend.token_to_id(token.content)
            if given != id:
                raise TokenizerError(
                    f"{where} gives {token.content!r} id {id}, but tokenizer.json has room for {given}"
                )
        elif given != id:
            _log.warning(
                "%s gives %r id %d; in tokenizer.json it has %d, and keeps it", where, token.content, id, given
            )


def _apply_switches(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> Iterator[str]:
    """Follow the switches of tokenizer_config.json that transformers follows; what is not followed, in words."""
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    prefix = config.get("add_prefix_space")
    if isinstance(prefix, bool):
        if str(config.get("tokenizer_class")).removesuffix("Fast") in _BYTE_LEVEL_CLASSES:
            _set_prefix_space(backend, prefix)
        pieces = backend.encode("a", add_special_tokens=False).tokens
        if pieces and pieces[0].startswith(("Ġ", "▁")) != prefix:
            does = "puts no space" if prefix else "puts a space"
            yield f"add_prefix_space = {json.dumps(prefix)} is not followed: tokenizer.json {does} in front of a text"
    added = backend.encode("a").special_tokens_mask
    for name, place, adds in (("add_bos_token", "in front of", added[:1]), ("add_eos_token", "after", added[-1:])):
        wanted = config.get(name)
        if isinstance(wanted, bool) and adds and wanted != bool(adds[0]):
            does = "puts no token" if wanted else "puts a token"
            yield f"{name} = {json.dumps(wanted)} is not followed: tokenizer.json {does} {place} a text"


def _lacking(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> Iterator[str]:
    """Further special tokens that tokenizer.json lacks. transformers would give them ids beyond the vocabulary."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or ()
        values = listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()
        texts = [value.get("content") if isinstance(value, dict) else value for value in values]
        if missing := [text for text in texts if isinstance(text, str) and backend.token_to_id(text) is None]:
            yield f"{key} {', '.join(map(repr, missing))} not in tokenizer.json, and left out"


def _set_prefix_space(backend: tokenizers.Tokenizer, prefix: bool) -> None:
    """Whether a byte-level pre-tokenizer, alone or in a sequence, puts a space in front of a text."""
    if (stage := backend.pre_tokenizer) is None:
        return
    state = json.loads(stage.__getstate__())  # its part of tokenizer.json
    for part in (state, *state.get("pretokenizers", ())):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = prefix
    stage.__setstate__(json.dumps(state).encode())
    backend.pre_tokenizer = stage


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
    holders = {alone: read_optional_json(alone, TokenizerError), folder / "tokenizer_config.json": config}
    for path, holder in holders.items():
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
