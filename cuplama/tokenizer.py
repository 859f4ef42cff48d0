"""Text to token ids and back: tokenizer.json, streaming detokenization, stop strings.

`tokenizers` reads tokenizer.json, which is the whole truth about encoding and decoding: normalizer, model,
post-processor (the BOS and EOS around a text) and decoder. tokenizer_config.json adds the names of BOS and EOS, added
tokens that tokenizer.json lacks, and the chat template. Its `add_bos_token` is ignored: transformers 5 ignores it too
where there is a tokenizer.json. One known difference: transformers 5 replaces the normalizer of its Llama class, so
that text right after a special token inside a prompt gets no `▁`; here, as in `tokenizers` itself, the file decides.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cuplama import chat_template
from cuplama.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Detokenizer", "StopStrings", "Tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A model folder's tokenizer; build one with `Tokenizer.load`.

    `vocab_size` counts added tokens too (largest id + 1). `bos` and `eos` are the ids that the folder names, or None.
    `chat_template` is the jinja2 source of the default template, or None. `special_ids` are the ids that
    `decode(skip_special=True)` leaves out.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()  # a limit saved from training must not cut a prompt
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._stages = _stages(_decoder_spec(backend))
        self._pieces: dict[int, str | None] = {}
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        self.bos: int | None = self._named_id("bos_token")
        self.eos: int | None = self._named_id("eos_token")
        self.chat_template: str | None = self._chat_templates.get("default")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and the optional files beside it from `folder`.

        Raises TokenizerError, naming the file, if tokenizer.json is missing or any of the files is unusable.
        """
        import tokenizers

        folder = Path(folder)
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
        try:
            return cls(backend, names, _chat_templates(folder, config))
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from error

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in the text become their ids.

        With `bos`, the model's post-processor puts its tokens (BOS, for the models that have one) around the text,
        but never a second BOS before a text that already starts with it. Without, the ids are those of the text
        alone. Raises PromptError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            char = text[error.start]
            raise PromptError(f"the text is not valid Unicode: {char!r} at character {error.start}") from None
        encoding = self._backend.encode(text, add_special_tokens=bos)
        ids: list[int] = encoding.ids
        # The mask is 1 only for what the post-processor added, so text that itself doubles a token is left alone.
        doubled = encoding.special_tokens_mask[:2] == [1, 0] and ids[0] == ids[1]
        return ids[1:] if doubled else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids without a token become nothing."""
        return self._backend.decode([id for id in ids if id >= 0], skip_special_tokens=skip_special)

    def token_text(self, id: int) -> str:
        """What token `id` adds in the middle of a text, special tokens included, for listings and logprobs.

        Bytes that are only a part of a character are written as escapes (`\\xe2\\x82`), and an id of the model's
        vocabulary that has no token as `<unused ID>`.
        """
        piece = self._piece(id)
        if piece is None:
            return f"<unused {id}>"
        if (lone := _lone_bytes(piece, self._stages)) is not None:
            return lone.decode("utf-8", "backslashreplace")
        middle = _Pipeline(self._stages)
        middle.push("x")  # whatever the decoder does at the start of a text is now behind us
        return middle.push(piece) + middle.flush()

    def token_shown(self, id: int) -> str:
        """`token_text` in quotes, for listings; bytes that are no whole characters are shown as `b'\\xe2\\x82'`.

        The b tells the lone byte A0 from the character U+00A0, which has the same escape.
        """
        piece = self._piece(id)
        lone = None if piece is None else _lone_bytes(piece, self._stages)
        try:
            (lone or b"").decode()
        except UnicodeDecodeError:
            return repr(lone)
        return repr(self.token_text(id))

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """The ids of `messages` in the model's chat template; `options` go to `chat_template.render`.

        The template alone decides about BOS, as in transformers, so there are never two. With `tools`, a folder's
        separate `tool_use` template is used where there is one. Raises TokenizerError as `render` does, and when the
        model has no template.
        """
        source = self.chat_template
        if tools:
            source = self._chat_templates.get("tool_use", source)
        if source is None:
            named = f" named 'default' (only {', '.join(self._chat_templates)})" if self._chat_templates else ""
            raise TokenizerError(
                f"the model has no chat template{named}: use generate with a plain prompt, "
                "or put a chat_template.jinja into the model folder"
            )
        variables = {"tools": tools, **self._special_tokens, **options}
        return self.encode(chat_template.render(source, messages, **variables), bos=False)

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        if token is None:
            return None
        id = self._backend.token_to_id(token)
        if id is None:
            raise TokenizerError(f"{name} {token!r} is not in the vocabulary of tokenizer.json")
        return id

    def _piece(self, id: int) -> str | None:
        """The vocabulary's own spelling of `id` (`Ġthe`, `▁the`, `<0x0A>`), or None if it has no token."""
        try:
            return self._pieces[id]
        except KeyError:
            piece = self._backend.id_to_token(id) if id >= 0 else None
            self._pieces[id] = piece
            return piece


class Detokenizer:
    """Turns ids into text one at a time, and never takes back or repeats a character.

    The pushes and the flush together are exactly `tokenizer.decode(ids)`, for any ids. After `context` (the prompt),
    they are what decode(context + ids) adds to decode(context), so the continuation of a sentencepiece prompt
    keeps its leading space; if the ids complete a character that the context left incomplete, that character is given.

    It runs the decoder of tokenizer.json as a chain of stages that each hold back only what a later token can still
    change: an incomplete UTF-8 character (byte-level), or a run of `<0xXX>` tokens, which decodes as a whole or
    not at all (byte fallback). The held-back part is therefore at most 3 bytes in the one case and the current run
    in the other, and a push costs the same however long the text is. `tokenizers.DecodeStream` instead guesses from
    U+FFFD in decoded text: it shows `A` for <0x41>, then fails on <0xFF>, and has no flush.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special: bool = True) -> None:
        self._piece = tokenizer._piece
        self._hidden = tokenizer.special_ids if skip_special else frozenset[int]()
        self._pipeline = _Pipeline(tokenizer._stages)
        self._seen = ""  # of the text still held back, what the context's own decoding already shows
        if context:
            for id in context:
                self.push(id)
            self._seen = copy.deepcopy(self._pipeline).flush()

    def push(self, id: int) -> str:
        """The text that is certain now that token `id` has come; "" while a character is incomplete."""
        piece = None if id in self._hidden else self._piece(id)
        return "" if piece is None else self._unseen(self._pipeline.push(piece))

    def flush(self) -> str:
        """The rest, at the end: incomplete bytes become U+FFFD. Nothing may be pushed after it."""
        return self._unseen(self._pipeline.flush())

    def _unseen(self, text: str) -> str:
        # What a stage holds back it gives in one piece, so the first text to come contains all of `_seen` or differs.
        if self._seen and text:
            text, self._seen = text.removeprefix(self._seen), ""
        return text


class StopStrings:
    """Cuts streamed text at the first stop string, holding back only what may still become one.

    First means completed first, as if the text came character by character (of two that end together, the longer), so
    the shown text does not depend on how the text was split into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop strings must be a list of non-empty strings, not {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown now, whether a stop string was hit); after a hit there is no more text."""
        if self._hit:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._hit, self._held = True, ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# --- The decoder of tokenizer.json as a stream ----------------------------------------------------


class _Stage(Protocol):
    """One decoder: pieces in, pieces that are certain out. Semantics: `decode_chain` of the same name in tokenizers."""

    def push(self, pieces: list[str]) -> list[str]: ...

    def flush(self) -> list[str]: ...


class _Pipeline:
    def __init__(self, stages: Iterable[Callable[[], _Stage]]) -> None:
        self._stages = [make() for make in stages]

    def push(self, piece: str) -> str:
        pieces = [piece]
        for stage in self._stages:
            pieces = stage.push(pieces)
        return "".join(pieces)

    def flush(self) -> str:
        pieces: list[str] = []
        for stage in self._stages:
            pieces = stage.push(pieces) + stage.flush()
        return "".join(pieces)


class _Each:
    """A decoder that treats every piece alone; the first one may be special (a prefix space)."""

    def __init__(self, rest: Callable[[str], str], first: Callable[[str], str] | None = None) -> None:
        self._rest = rest
        self._first = first

    def push(self, pieces: list[str]) -> list[str]:
        if self._first is not None and pieces:
            first, self._first = self._first, None
            return [first(pieces[0]), *map(self._rest, pieces[1:])]
        return [self._rest(piece) for piece in pieces]

    def flush(self) -> list[str]:
        return []


class _ByteLevel:
    """GPT-2's byte alphabet: all pieces are bytes of one UTF-8 string, invalid ones U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, pieces: list[str]) -> list[str]:
        return [self._utf8.decode(_byte_level_bytes(piece)) for piece in pieces]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """Sentencepiece's `<0xXX>`: a whole run of them is UTF-8, or else every byte of the run is U+FFFD."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            byte = _BYTE_TOKEN.fullmatch(piece)
            if byte:
                self._run.append(int(byte[1], 16))
            else:
                out += [*self.flush(), piece]
        return out

    def flush(self) -> list[str]:
        run, self._run = self._run, bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _StripText:
    """Strip on the whole text: up to `start` leading occurrences of `char`."""

    def __init__(self, char: str, start: int) -> None:
        self._char = char
        self._start = start

    def push(self, pieces: list[str]) -> list[str]:
        text = "".join(pieces)
        while self._start and text:
            if text[0] != self._char:
                self._start = 0
                break
            self._start -= 1
            text = text[1:]
        return [text]

    def flush(self) -> list[str]:
        return []


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes for U+0100 onwards (GPT-2's encoder)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = count(0x100)
    return {chr(byte if byte in printable else next(stand_in)): byte for byte in range(256)}


_BYTE_OF = _byte_alphabet()


@lru_cache(maxsize=1 << 18)
def _byte_level_bytes(piece: str) -> bytes:
    # An added token may hold characters outside the alphabet; it then stands for itself.
    values = [_BYTE_OF.get(char) for char in piece]
    known = [value for value in values if value is not None]
    return bytes(known) if len(known) == len(values) else piece.encode()


def _lone_bytes(piece: str, stages: Sequence[Callable[[], _Stage]]) -> bytes | None:
    """The bytes of a piece that stands for bytes, or None for one that stands for characters."""
    if _ByteLevel in stages:
        return _byte_level_bytes(piece)
    if _ByteFallback in stages and (byte := _BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    return None


def _decoder_spec(backend: tokenizers.Tokenizer) -> dict[str, Any] | None:
    if backend.decoder is None:
        return None
    spec: dict[str, Any] = json.loads(backend.decoder.__getstate__())  # its part of tokenizer.json
    return spec


def _stages(spec: Mapping[str, Any] | None) -> list[Callable[[], _Stage]]:
    """A constructor for each stage of the decoder `spec`. Raises TokenizerError for one that cannot be streamed."""
    if spec is None:
        return [lambda: _Each(lambda piece: " " + piece, first=lambda piece: piece)]
    stages: list[Callable[[], _Stage]] = []
    fused = False  # from here on the pieces are parts of one string
    for part in _flat(spec):
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and part["stop"] == 0:
            stages.append(_strip_text(part) if fused else _each(_strip_piece(part)))
        elif kind == "Replace" and (not fused or len(part["pattern"].get("String", "")) == 1):
            stages.append(_each(_replace(part)))
        elif kind == "Metaspace" and not fused:
            stages.append(_metaspace(part))
        elif kind == "ByteFallback" and not fused:
            stages.append(_ByteFallback)
        elif kind == "ByteLevel" and not fused:
            stages.append(_ByteLevel)
            fused = True
        else:
            raise TokenizerError(
                f"tokenizer.json: decoder {json.dumps(part, ensure_ascii=False)}{' after Fuse' if fused else ''} "
                "is not supported; supported are ByteLevel, ByteFallback, Metaspace, Replace, Strip (at the start), "
                "Fuse, and a Sequence of them"
            )
    return stages


def _flat(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flat(inner)]


def _each(change: Callable[[str], str]) -> Callable[[], _Stage]:
    return lambda: _Each(change)


def _strip_text(part: Mapping[str, Any]) -> Callable[[], _Stage]:
    return lambda: _StripText(part["content"], part["start"])


def _strip_piece(part: Mapping[str, Any]) -> Callable[[str], str]:
    return lambda piece: _StripText(part["content"], part["start"]).push([piece])[0]


def _metaspace(part: Mapping[str, Any]) -> Callable[[], _Stage]:
    char = part["replacement"]
    # With a prefix scheme every replacement character of the first piece goes, not only the leading one.
    dropped = "" if part.get("prepend_scheme", "always") != "never" else " "
    return lambda: _Each(lambda piece: piece.replace(char, " "), first=lambda piece: piece.replace(char, dropped))


def _replace(part: Mapping[str, Any]) -> Callable[[str], str]:
    pattern, content = part["pattern"], part["content"]
    if "String" in pattern:
        return lambda piece: piece.replace(pattern["String"], content)
    import tokenizers
    from tokenizers import decoders

    # The regular expressions are Oniguruma's, which Python's `re` does not fully speak.
    decoder = decoders.Replace(tokenizers.Regex(pattern["Regex"]), content)
    return lambda piece: decoder.decode([piece])


# --- The files beside tokenizer.json --------------------------------------------------------------


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
    """Name -> source: chat_template.jinja before chat_template.json before tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return {"default": jinja.read_text(encoding="utf-8")}
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{jinja}: cannot be read: {error}") from error
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
