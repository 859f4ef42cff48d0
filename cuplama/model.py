"""A loaded model: generate, stream, chat, look at logits. ``load`` makes one."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack, overload

import numpy as np

from .chat import ChatOptions, read_chat
from .completion import Clock, Completion, Delta, Stream, Timings
from .engine.engine import Engine
from .engine.scheduler import Progress
from .engine.sequence import SequenceState
from .errors import ConfigError, ContextError, ParameterError, PromptError
from .models.config import ModelConfig, token_ids
from .output_text import OutputText
from .prompts import Prompt, prompt_list, whole_ids
from .sampling_params import PARAMETERS, SamplingParams, sampling_defaults, unsupported_settings
from .text.tokenizer import Tokenizer

__all__ = ["Model", "Settings", "stop_tokens"]

_log = logging.getLogger("cuplama")


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
                _log.warning("%s: %s is not supported and is left out", where, setting)
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

    folder: where its files are; config: ModelConfig; backend: where it runs; context: tokens a sequence may have;
    defaults: the sampling parameters that its generation_config.json sets; stop_ids: token ids that end a text;
    bos: the id that an empty prompt becomes, or None.
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
        """The model's own sampling defaults with some replaced. Raises ParameterError naming one."""
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
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else whole_ids(prompt)
        if not ids:
            if self.bos is None:
                raise PromptError("the prompt is empty and the model has no BOS token to start from")
            ids = [self.bos]
        for t in ids:
            if not 0 <= t < self.config.vocab_size:
                raise PromptError(f"token id {t} is out of range; the vocabulary has {self.config.vocab_size} tokens")
        return ids

    def _fit(self, ids: list[int], room: int) -> list[int]:
        """The ids, if the context has them and ``room`` tokens more. Raises ContextError."""
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
        Raises ParameterError for a parameter, PromptError for a prompt that cannot be used, and ContextError for one
        that is too long.
        """
        prompts, single = prompt_list(prompt)
        clock = Clock()
        texts = self._start(prompts, params)
        for _ in self._deltas(texts, progress, clock):
            pass
        done = [_completion(t, clock.timings()) for t in texts]
        return done[0] if single else done

    def stream(self, prompt: Prompt | Sequence[Prompt], *, progress: Progress | None = None, **params: Any) -> Stream:
        """Like generate, but yields a Delta per token as it is drawn. Closing the stream stops the generation."""
        clock = Clock()
        return Stream(self._deltas(self._start(prompt_list(prompt)[0], params), progress, clock), clock)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """The assistant's answer to ``[{"role": "user", "content": "Hi"}, ...]``, by the model's own chat template.

        messages: dicts with a role and a content, text or a list of text parts. params, n, progress: as for
        ``generate``. options: sampling parameters, and what reaches the template (tools, enable_thinking, ...), as
        ChatOptions lists them. With continue_final_message the answer goes on from the last message, and its text is
        the continuation alone.

        Raises ParameterError for an option that neither is a sampling parameter nor is read by the template,
        TokenizerError if the model has no template or the template refuses the messages, and what ``generate`` raises.
        """
        ids, sampling = read_chat(self.tokenizer, messages, options)
        return self.generate(ids, progress=progress, **sampling)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """Like chat, but yields a Delta per token."""
        ids, sampling = read_chat(self.tokenizer, messages, options)
        return self.stream(ids, progress=progress, **sampling)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> list[int]:
        """The token ids of the prompt that chat makes of the same arguments. Raises what chat raises for them."""
        return self.encode(read_chat(self.tokenizer, messages, options)[0])

    def logits(self, token_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits after each token: [n, vocab] float32; no token is BOS alone. Raises PromptError."""
        return np.concatenate(list(self.engine.logits(self._fit(self.encode(whole_ids(token_ids)), 0))))

    def _start(self, prompts: Sequence[Prompt], overrides: Mapping[str, Any]) -> list[OutputText]:
        """A sequence per prompt, all with the same parameters; raises before anything is computed."""
        params = self.params(**overrides)
        if params.stop:
            _ = self.tokenizer  # stop strings need one
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        banned = {t for t, bias in params.logit_bias.items() if bias == -math.inf}
        if len(banned | stops if params.min_tokens else banned) == self.config.vocab_size:
            raise ParameterError("logit_bias (with min_tokens: and stop tokens) bans every token of the vocabulary")
        room = 0 if params.max_tokens == 0 else 1
        sequences = [SequenceState(self._fit(self.encode(p), room), params, stops) for p in prompts]
        return [OutputText(i, s, self._tokenizer) for i, s in enumerate(sequences)]

    def _deltas(self, texts: list[OutputText], progress: Progress | None, clock: Clock) -> Generator[Delta]:
        """Run the sequences; one delta per token drawn, in the order in which they are drawn."""
        sequences = [t.sequence for t in texts]
        text_of = {id(s): t for s, t in zip(sequences, texts, strict=True)}
        clock.begin(sum(len(s.prompt) for s in sequences))
        with contextlib.closing(self.engine.generate(sequences, progress)) as steps:
            for drawn in steps:
                clock.step(len(drawn), any(sequence.generated == 1 for sequence, _ in drawn))
                deltas = [text_of[id(sequence)].push(token) for sequence, token in drawn]
                if all(s.finish_reason is not None for s in sequences):
                    steps.close()  # the cache is free again before the last delta is delivered
                for delta in deltas:
                    yield delta
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


def _completion(output: OutputText, timings: Timings) -> Completion:
    """All of a sequence that has ended. timings: those of the run."""
    return Completion(
        output.text,
        [t.id for t in output.tokens],
        output.sequence.finish_reason or "length",
        output.tokens if output.sequence.params.logprobs is not None else None,
        timings,
    )
