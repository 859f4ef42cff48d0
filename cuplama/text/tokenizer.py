"""Text to token ids and back, for a whole text at once; ``detokenizer`` does it token by token.

`tokenizers` reads tokenizer.json, which is the whole truth about encoding and decoding: normalizer, model,
post-processor (the BOS and EOS around a text) and decoder. One known difference: transformers 5 replaces the normalizer
of its Llama class, so that text right after a special token inside a prompt gets no `▁`; here, as in `tokenizers`
itself, the file decides.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..arguments import checked, flag
from ..errors import CuplamaError, PromptError, TokenizerError
from ..files import is_missing
from ..gguf import is_gguf, open_gguf
from .chat_prompt import ChatTemplates, chat_messages, chat_values, check_names, harmless_chats, prompt_text
from .chat_template import ChatTemplate
from .control_tokens import ControlTokens
from .encoding import encoding
from .token_decoder import Pipeline, decoder_stages, lone_bytes
from .tokenizer_files import read_file, read_folder

if TYPE_CHECKING:
    import tokenizers

    from .answer_form import AnswerForm

__all__ = ["Tokenizer"]

_log = logging.getLogger("cuplama")


class Tokenizer:
    """A model folder's tokenizer; build one with `Tokenizer.load`.

    `vocab_size` counts added tokens too (largest id + 1). `bos` and `eos` are the ids that the folder names, or None.
    `chat_template` is the jinja2 source of the default template, or None. `special_ids` are the ids that
    `decode(skip_special=True)` leaves out. `kind` is what `tokenizers` calls the model ("BPE"). `stages` are
    constructors of the decoder's stages, for a `Pipeline`.
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
        self._templates = ChatTemplates(dict(chat_templates or {}))
        self._control: dict[str, ControlTokens] = {}  # by the source of the chat template
        self._answer_form: AnswerForm | None = None
        self._warned: set[str] = set()  # names of what a template was given and does not read
        self.stages = decoder_stages(backend)
        self._pieces: dict[int, str | None] = {}
        self.kind: str = type(backend.model).__name__
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        self.bos: int | None = self._named_id("bos_token")
        self.eos: int | None = self._named_id("eos_token")
        self.chat_template: str | None = self._templates.default

    @classmethod
    def find(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a folder or a GGUF file as of `load`, or None if it has none."""
        if is_gguf(folder):
            from .gguf_tokenizer import has_tokenizer

            has = has_tokenizer(open_gguf(folder))
        else:
            has = not is_missing(folder / "tokenizer.json")
        return cls.load(folder) if has else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and the optional files beside it from `folder`, or the metadata of a GGUF file.

        `folder` may also be the tokenizer.json itself, or such a file under another name, which then is all there is.
        Raises TokenizerError, naming the file, if there is none or any of the files is unusable.
        """
        folder = Path(folder)
        if is_gguf(folder):
            from .gguf_tokenizer import read_gguf

            files = read_gguf(open_gguf(folder))
        else:
            files = read_file(folder) if folder.is_file() else read_folder(folder)
        try:
            return cls(files.backend, files.special_tokens, files.chat_templates)
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from error

    def __repr__(self) -> str:
        chat = "no chat template" if self.chat_template is None else "a chat template"
        return f"<Tokenizer of {self.vocab_size} tokens: BOS {self.bos}, EOS {self.eos}, {chat}>"

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in the text become their ids.

        With `bos`, the model's post-processor puts its tokens (BOS, for the models that have one) around the text,
        but never a second BOS before a text that already starts with it. Without, the ids are those of the text
        alone. Raises PromptError for text that is not valid Unicode, or that the vocabulary cannot spell.
        """
        with _encodable(text):
            found = encoding(self._backend, text, special=bos)
        ids: list[int] = found.ids
        # The mask is 1 only for what the post-processor added, so text that itself doubles a token is left alone.
        doubled = found.special_tokens_mask[:2] == [1, 0] and ids[0] == ids[1]
        return ids[1:] if doubled else ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text alone, as of ``encode`` without ``bos``, made on all cores. Raises PromptError."""
        with _encodable("".join(texts)):
            return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids without a token become nothing."""
        known = [id for id in ids if 0 <= id < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=skip_special)

    def piece(self, id: int) -> str | None:
        """The vocabulary's own spelling of `id` (`Ġthe`, `▁the`, `<0x0A>`), or None if it has no token."""
        try:
            return self._pieces[id]
        except KeyError:
            piece = self._backend.id_to_token(id) if 0 <= id < self.vocab_size else None
            self._pieces[id] = piece
            return piece

    def token_text(self, id: int) -> str:
        """What token `id` adds in the middle of a text, special tokens included, for listings and logprobs.

        Bytes that are only a part of a character are written as escapes (`\\xe2\\x82`), and an id of the model's
        vocabulary that has no token as `<unused ID>`.
        """
        piece = self.piece(id)
        if piece is None:
            return f"<unused {id}>"
        if (lone := lone_bytes(piece, self.stages)) is not None:
            return lone.decode("utf-8", "backslashreplace")
        middle = Pipeline(self.stages)
        middle.push("x")  # whatever the decoder does at the start of a text is now behind us
        return middle.push(piece) + middle.flush()

    def token_bytes(self, id: int) -> bytes:
        """The bytes of ``token_text``, which may be only a part of a character; none for an id without a token."""
        piece = self.piece(id)
        lone = None if piece is None else lone_bytes(piece, self.stages)
        return lone if lone is not None else b"" if piece is None else self.token_text(id).encode()

    def token_shown(self, id: int) -> str:
        """`token_text` in quotes, for listings; bytes that are no whole characters are shown as `b'\\xe2\\x82'`.

        The b tells the lone byte A0 from the character U+00A0, which has the same escape.
        """
        piece = self.piece(id)
        lone = None if piece is None else lone_bytes(piece, self.stages)
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
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        special_text: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of `messages` in the model's chat template.

        messages: dicts with a role and a content, a string or a list of `{"type": "text", "text": ...}`; further
        fields are the template's business. tools, documents, and `variables` (enable_thinking, ...) reach the
        template. add_generation_prompt: begin the assistant's answer; None: unless `continue_final_message`, which
        ends the prompt inside the last message. special_text: a special token that is spelled in a message becomes
        that token; otherwise it is text, and special tokens come from the template alone. chat_template: the name of
        one of the folder's templates; None: `tool_use` where there are tools and it exists, or the default.

        The template alone decides about BOS, as in transformers, so there are never two. Raises ParameterError for a
        variable that the template does not read, and TokenizerError for messages that are not of that form, for what
        the template refuses or runs into, and if the model has no such template.
        """
        template = self._templates.choose(chat_template, tools=bool(tools))
        given = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        values = chat_values(template, {**given, **variables})
        self._warn_of_unread(template, values)
        spoken = chat_messages(template, messages)
        control, hidden = self._control_tokens(template), None
        if not checked("special_text", special_text, flag, "True or False"):
            hidden = control.disguise(spoken, values, template.source)
        if hidden is None:
            return self.encode(prompt_text(template, spoken, {**self._special_tokens, **values}), bos=False)
        text = prompt_text(template, hidden.messages, {**self._special_tokens, **hidden.values})
        with _encodable(text):
            return control.encode(text, hidden)

    def _warn_of_unread(self, template: ChatTemplate, values: Mapping[str, Any]) -> None:
        """Log, once for a tokenizer, that the template does not read what it was given."""
        for name in ("tools", "documents"):
            if values[name] is not None and name not in template.reading.variables | self._warned:
                self._warned.add(name)
                _log.warning("the chat template does not read %s: the model will not see them", name)

    def _control_tokens(self, template: ChatTemplate) -> ControlTokens:
        found = self._control.get(template.source)
        if found is None:
            turns = harmless_chats(template, self._special_tokens)
            found = ControlTokens(self._backend, self._special_tokens.values(), *turns)
            self._control[template.source] = found
        return found

    @property
    def answer_form(self) -> AnswerForm:
        """How the model writes reasoning and tool calls, as its default template and its added tokens tell."""
        if self._answer_form is None:
            self.choose_form()
        assert self._answer_form is not None
        return self._answer_form

    def choose_form(self, *, reasoning: str | None = None, tools: str | None = None) -> None:
        """Make ``answer_form`` one with these formats, named as in text/reasoning.py and text/tool_calls/formats.py.

        "none": reasoning, or calls, are not told from content; None: what the template tells. Raises ParameterError.
        """
        from .answer_form import find_form  # only chats with tools or reasoning need it

        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        self._answer_form = find_form(self.chat_template, added, reasoning=reasoning, tools=tools)

    @cached_property
    def special_texts(self) -> Mapping[str, int]:
        """Text of each special token -> its id."""
        pieces = ((self.piece(id), id) for id in sorted(self.special_ids))
        return {piece: id for piece, id in pieces if piece}

    def special_in(self, texts: Iterable[str]) -> list[int]:
        """The ids of the special tokens that are spelled in one of the texts."""
        texts = list(texts)
        return [id for piece, id in self.special_texts.items() if any(piece in text for text in texts)]

    def spells_special(self, text: str) -> bool:
        """Whether a token that `decode(skip_special=True)` leaves out is spelled somewhere in `text`."""
        return any(piece in text for id in self.special_ids if (piece := self.piece(id)))

    def check_variables(
        self,
        names: Collection[str],
        *,
        tools: bool = False,
        chat_template: str | None = None,
        others: Collection[str] = (),
    ) -> None:
        """Raises ParameterError for a name that is neither a variable of the chat template nor one of `others`.

        tools, chat_template: which template, as for `apply_chat`. Raises TokenizerError if there is none.
        """
        check_names(names, self._templates.choose(chat_template, tools=tools), others)

    def fingerprint(self) -> str:
        """A SHA-256 of all that decides which ids a text or a chat has."""
        said = (self._backend.to_str(), sorted(self._special_tokens.items()), sorted(self._templates.sources.items()))
        return hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def template_variables(self) -> frozenset[str]:
        """Names of the variables that the default chat template reads; empty if there is no template."""
        return frozenset() if self.chat_template is None else self._templates.choose().reading.variables

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens that the folder names: bos_token, eos_token, ... -> their text."""
        return MappingProxyType(self._special_tokens)

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        if token is None:
            return None
        id = self._backend.token_to_id(token)
        if id is None:
            raise TokenizerError(f"{name} {token!r} is not in the vocabulary of tokenizer.json")
        return id


@contextmanager
def _encodable(text: str) -> Iterator[None]:
    """Raises PromptError for text that is not valid Unicode, and for what goes wrong in a block that encodes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        char = text[error.start]
        raise PromptError(f"the text is not valid Unicode: {char!r} at character {error.start}") from None
    try:
        yield
    except CuplamaError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower: a character that has no token, and no <unk>
        raise PromptError(f"the tokenizer has no ids for the text: {' '.join(str(error).split())}") from error
