"""The library's face: load a model folder, generate, stream, chat, look at logits."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast, overload

import numpy as np

from .completion import Completion, Delta, Stream, _Clock
from .engine.engine import Engine, Progress
from .engine.sequence import SequenceState, Token
from .errors import ConfigError, ContextError, ParameterError, PromptError
from .models.config import ModelConfig, token_ids
from .sampling_params import PARAMETERS, SamplingParams, sampling_defaults, unsupported_settings
from .text.detokenizer import Detokenizer
from .text.stop_strings import StopStrings
from .text.tokenizer import Tokenizer

__all__ = ["Model", "Prompt", "Settings", "stop_tokens"]

Prompt = str | Sequence[int]
log = logging.getLogger("cuplama")


class _Text:
    """The text side of one generation: detokenises, watches for stop strings, and ends the sequence at one."""

    def __init__(self, index: int, generation: SequenceState, tokenizer: Tokenizer | None) -> None:
        self.index, self.generation = index, generation
        self._detokenizer = Detokenizer(tokenizer, context=generation.prompt) if tokenizer else None
        self._stops = StopStrings(generation.params.stop)
        self.text = ""
        self.tokens: list[Token] = []

    def push(self, token: Token) -> Delta:
        self.tokens.append(token)
        g, text, stopped = self.generation, "", False
        if self._detokenizer is not None:
            if token.id not in g.stop_ids:
                text, stopped = self._stops.push(self._detokenizer.push(token.id))
            if g.finish_reason is not None and not stopped:
                tail, stopped = self._stops.push(self._detokenizer.flush())
                text += tail if stopped else tail + self._stops.flush()
        if stopped:
            g.finish_reason = "stop"
        self.text += text
        return Delta(text, token, g.finish_reason, self.index)


@dataclass(frozen=True)
class Settings:
    """What a model brings for generating: sampling defaults, the ids that end a text, and BOS if it has one."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    bos: int | None = None

    @classmethod
    def read(
        cls, folder: Path, config: ModelConfig, tokenizer: Tokenizer | None, generation_config: Mapping[str, Any]
    ) -> Settings:
        """From what the folder's files say. Raises ConfigError; logs a warning for what is not supported."""
        where = folder / "generation_config.json"
        try:
            defaults = sampling_defaults(generation_config)
            for setting in unsupported_settings(generation_config):
                log.warning("%s: %s is not supported and is left out", where, setting)
        except ParameterError as e:
            raise ConfigError(f"{where}: {e}") from None
        bos = tokenizer.bos if tokenizer is not None and tokenizer.bos is not None else config.bos
        return cls(
            defaults,
            stop_tokens(config, generation_config, tokenizer, where),
            bos if bos is not None and bos < config.vocab_size else None,
        )


def stop_tokens(
    config: ModelConfig, generation_config: Mapping[str, Any], tokenizer: Tokenizer | None, where: Path
) -> frozenset[int]:
    """The ids that end a text: the union of what config, generation_config and tokenizer name.

    where: the generation_config's path, for errors. Raises ConfigError.
    """
    eos = token_ids(generation_config.get("eos_token_id"), f"{where}: eos_token_id")
    own = tokenizer.eos if tokenizer else None
    stops = {*config.eos, *eos, *([] if own is None else [own])}
    # Ids beyond the vocabulary, left over from a larger one, can be neither drawn nor fed.
    return frozenset(t for t in stops if t < config.vocab_size)


class Model:
    """A loaded model. Use ``cuplama.load``; close it, or use it in a ``with`` block, to free what it holds.

    Several threads may generate at once: their runs take turns, step by step.

    config: ModelConfig; tokenizer: Tokenizer or None; context: tokens a sequence may have; stop_ids: token ids that end
    a text.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        engine: Engine,
        settings: Settings,
    ) -> None:
        self.folder, self.config, self.backend = folder, config, engine.backend
        self._tokenizer = tokenizer
        self._engine: Engine | None = engine
        self.context = engine.context
        self.defaults, self.stop_ids, self.bos = settings.defaults, settings.stop_ids, settings.bos

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError if the folder has none."""
        if self._tokenizer is None:
            return Tokenizer.load(self.folder)  # raises, and says what is missing
        return self._tokenizer

    @property
    def engine(self) -> Engine:
        """The engine. Raises RuntimeError after close()."""
        if self._engine is None:
            raise RuntimeError("the model is closed")
        return self._engine

    def params(self, **overrides: Any) -> SamplingParams:
        """The model's own sampling defaults with some replaced. Raises ValueError naming a parameter."""
        for name in overrides.keys() - set(PARAMETERS):
            raise ParameterError(f"{name} is not a sampling parameter; there are: {', '.join(PARAMETERS)}")
        params = SamplingParams(**{**self.defaults, **overrides})
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= self.config.vocab_size:
                    raise ParameterError(
                        f"{name}: token id {token} is out of range; the vocabulary has {self.config.vocab_size}"
                    )
        return params

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked. An empty prompt becomes BOS. Raises PromptError."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _ids(prompt)
        if not ids:
            if self.bos is None:
                raise PromptError("the prompt is empty and the model has no BOS token to start from")
            ids = [self.bos]
        for t in ids:
            if not 0 <= t < self.config.vocab_size:
                raise PromptError(f"token id {t} is out of range; the vocabulary has {self.config.vocab_size} tokens")
        return ids

    def _fit(self, ids: list[int], room: int) -> list[int]:
        if len(ids) + room > self.context:
            more = f"; the model allows {self.config.context} (--context)" if self.config.context > self.context else ""
            raise ContextError(
                f"the prompt has {len(ids)} tokens; the context has room for {self.context - room}{more}"
            )
        return ids

    @overload
    def generate(self, prompt: Prompt, *, progress: Progress | None = None, **params: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], *, progress: Progress | None = None, **params: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, progress: Progress | None = None, **params: Any
    ) -> Completion | list[Completion]:
        """Generate from a prompt (text or token ids), or from several as one batch.

        params: the fields of SamplingParams; what is left out comes from the model's generation_config. In a batch
        every prompt has the same parameters and gives what it gives alone.
        Raises ValueError for a parameter and PromptError for a prompt that cannot be used.
        """
        prompts, single = _prompts(prompt)
        clock = _Clock()
        texts = self._start(prompts, params)
        for _ in self._pieces(texts, progress, clock):
            pass
        done = [_completion(t, clock) for t in texts]
        return done[0] if single else done

    def stream(self, prompt: Prompt | Sequence[Prompt], *, progress: Progress | None = None, **params: Any) -> Stream:
        """Like generate, but yields a Delta per token as it is drawn. Closing the stream stops the generation."""
        clock = _Clock()
        return Stream(self._pieces(self._start(_prompts(prompt)[0], params), progress, clock), clock)

    def chat(self, messages: Sequence[Mapping[str, Any]], **params: Any) -> Completion:
        """The assistant's answer to ``[{"role": "user", "content": "Hi"}, ...]``, by the model's own chat template.

        Raises TokenizerError if the model has no template or the template refuses the messages.
        """
        return self.generate(self.tokenizer.apply_chat(messages), **params)

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **params: Any) -> Stream:
        """Like chat, but yields a Delta per token."""
        return self.stream(self.tokenizer.apply_chat(messages), **params)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits after each token: [n, vocab] float32; no token is BOS alone. Raises PromptError."""
        return np.concatenate(list(self.engine.logits(self._fit(self.encode(_ids(token_ids)), 0))))

    def _start(self, prompts: Sequence[Prompt], overrides: Mapping[str, Any]) -> list[_Text]:
        params = self.params(**overrides)
        if params.stop:
            _ = self.tokenizer  # stop strings need one
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        banned = {t for t, bias in params.logit_bias.items() if bias == -math.inf}
        if len(banned | stops if params.min_tokens else banned) == self.config.vocab_size:
            raise ParameterError("logit_bias (with min_tokens: and stop tokens) bans every token of the vocabulary")
        room = 0 if params.max_tokens == 0 else 1
        sequences = [SequenceState(self._fit(self.encode(p), room), params, stops) for p in prompts]
        return [_Text(i, s, self._tokenizer) for i, s in enumerate(sequences)]

    def _pieces(self, texts: list[_Text], progress: Progress | None, clock: _Clock) -> Generator[Delta]:
        by_id = {id(t.generation): t for t in texts}
        clock.begin(sum(len(t.generation.prompt) for t in texts))
        with contextlib.closing(self.engine.generate([t.generation for t in texts], progress)) as steps:
            for step in steps:
                clock.step(len(step), any(generation.generated == 1 for generation, _ in step))
                pieces = [by_id[id(generation)].push(token) for generation, token in step]
                if all(t.generation.finish_reason is not None for t in texts):
                    steps.close()  # the cache is free again before the last piece is delivered
                for piece in pieces:
                    yield piece
                    _ = self.engine  # closed while the stream was open: raises

    def close(self) -> None:
        """Free weights, cache and device memory. The model cannot be used afterwards; closing twice is fine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _completion(text: _Text, clock: _Clock) -> Completion:
    g = text.generation
    return Completion(
        text.text,
        [t.id for t in text.tokens],
        g.finish_reason or "length",
        text.tokens if g.params.logprobs is not None else None,
        clock.timings(),
    )


def _prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """A list of prompts, and whether it was a single one. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt], True
    several = isinstance(prompt, Iterable) and not isinstance(prompt, bytes)
    items = list(prompt) if several else [prompt]
    if several and items and all(isinstance(i, (int, np.integer)) for i in items):
        return [cast("list[int]", items)], True
    for i in items:
        if isinstance(i, bytes) or not isinstance(i, (Sequence, np.ndarray)):
            raise PromptError(f"a prompt is text or a list of token ids, not {type(i).__name__}")
    return cast("list[Prompt]", items), False


def _ids(prompt: Sequence[Any]) -> list[int]:
    """Plain ints from whole numbers of any kind."""
    try:
        return [operator.index(t) for t in prompt]
    except TypeError:
        raise PromptError(f"a token id is a whole number; the prompt is {prompt!r:.60}") from None
