"""The library's face: load a model folder, generate, stream, chat, look at logits."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast, overload

import numpy as np

from .backends import Backend
from .checkpoint import Weight, load_weights
from .config import ModelConfig, load_config, read_json, token_ids
from .engine import Engine, Generation, Progress, Token
from .errors import ConfigError, ContextError, DeviceError, ParameterError, PromptError
from .kernel import data_folder
from .op import DTYPES, Array
from .sampling import PARAMETERS, SamplingParams, sampling_defaults, unsupported_settings
from .tokenizer import Detokenizer, StopStrings, Tokenizer

__all__ = ["Completion", "Model", "Piece", "Stream", "Timings", "find_model", "load"]

Prompt = str | Sequence[int]
LoadProgress = Callable[[int, int], None]  # (bytes loaded, bytes in all)

DEFAULT_CONTEXT = 8192  # of a model that allows more: bounds the cache until --context asks for more
log = logging.getLogger("cuplama")


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens. The prompt's time ends with the first token drawn; decode is of the tokens after it.

    In a batch that the cache cannot hold at once, the prompts read later count as prompts too.
    """

    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """What was generated. tokens: ids, a stop token that ended the text included; text: without it and the prompt.

    finish_reason: "stop" (stop token or stop string) or "length" (max_tokens, or the context is full).
    logprobs: one engine Token per generated token if they were asked for. In a batch, the timings are the batch's.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[Token] | None
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """A step of a stream. text may be empty while a character or a stop string is incomplete.

    finish_reason is set on the last piece. index is the prompt's place in a batch.
    """

    text: str
    token: Token
    finish_reason: str | None = None
    index: int = 0


class Stream:
    """An iterator over the pieces of a generation. close(), or leaving a ``with`` block, stops it.

    ``timings`` is right at any moment.
    """

    def __init__(self, pieces: Generator[Piece], clock: _Clock) -> None:
        self._pieces, self._clock = pieces, clock

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating and give the cache pages back."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def timings(self) -> Timings:
        return self._clock.timings()


class _Text:
    """The text side of one generation: detokenises, watches for stop strings, and ends the sequence at one."""

    def __init__(self, index: int, generation: Generation, tokenizer: Tokenizer | None) -> None:
        self.index, self.generation = index, generation
        self._detokenizer = Detokenizer(tokenizer, context=generation.prompt) if tokenizer else None
        self._stops = StopStrings(generation.params.stop)
        self.text = ""
        self.tokens: list[Token] = []

    def push(self, token: Token) -> Piece:
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
        return Piece(text, token, g.finish_reason, self.index)


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
            bos if bos is not None and bos < config.vocab else None,
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
    return frozenset(t for t in stops if t < config.vocab)


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
                if token >= self.config.vocab:
                    raise ParameterError(
                        f"{name}: token id {token} is out of range; the vocabulary has {self.config.vocab}"
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
            if not 0 <= t < self.config.vocab:
                raise PromptError(f"token id {t} is out of range; the vocabulary has {self.config.vocab} tokens")
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
        """Like generate, but yields a Piece per token as it is drawn. Closing the stream stops the generation."""
        clock = _Clock()
        return Stream(self._pieces(self._start(_prompts(prompt)[0], params), progress, clock), clock)

    def chat(self, messages: Sequence[Mapping[str, Any]], **params: Any) -> Completion:
        """The assistant's answer to ``[{"role": "user", "content": "Hi"}, ...]``, by the model's own chat template.

        Raises TokenizerError if the model has no template or the template refuses the messages.
        """
        return self.generate(self.tokenizer.apply_chat(messages), **params)

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **params: Any) -> Stream:
        """Like chat, but yields a Piece per token."""
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
        if len(banned | stops if params.min_tokens else banned) == self.config.vocab:
            raise ParameterError("logit_bias (with min_tokens: and stop tokens) bans every token of the vocabulary")
        room = 0 if params.max_tokens == 0 else 1
        sequences = [Generation(self._fit(self.encode(p), room), params, stops) for p in prompts]
        return [_Text(i, s, self._tokenizer) for i, s in enumerate(sequences)]

    def _pieces(self, texts: list[_Text], progress: Progress | None, clock: _Clock) -> Generator[Piece]:
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


@dataclass
class _Clock:
    """Where the time of a run went. Sequences that wait for room in the cache are read between the others' tokens."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    last: float = 0.0

    def begin(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.last = prompt_tokens, time.perf_counter()

    def step(self, tokens: int, first: bool) -> None:
        """A step has drawn that many tokens; first: those that come right after prompts."""
        now = time.perf_counter()
        if first:
            self.prompt_seconds += now - self.last
        else:
            self.decode_tokens += tokens
            self.decode_seconds += now - self.last
        self.last = now

    def timings(self) -> Timings:
        return Timings(self.prompt_tokens, self.prompt_seconds, self.decode_tokens, self.decode_seconds)


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


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    cache_tokens: int | None = None,
    offline: bool = False,
    progress: LoadProgress | None = None,
) -> Model:
    """Load a model.

    model: a folder in Hugging Face layout, a hub id ("org/name"), or None for the bundled story model.
    device: "cuda", "numpy", or "auto": CUDA where it works, else NumPy with a notice on the ``cuplama`` logger.
    dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's on CUDA, float32 on NumPy.
    context: tokens a sequence may have; by default the model's own limit, at most 8192.
    cache_tokens: tokens that all sequences of a batch may have together in the KV cache; by default ``context``.
    offline: never ask the hub; use what was downloaded before (as HF_HUB_OFFLINE=1).
    progress: called with (bytes loaded, bytes in all).

    Raises ConfigError, CheckpointError, TokenizerError or DeviceError, each naming the culprit.
    """
    if dtype not in _DTYPE_NAMES:
        raise ParameterError(f"dtype = {dtype!r} is not supported; supported: {', '.join(_DTYPE_NAMES)}")
    folder = find_model(model, offline)
    config = load_config(folder)
    length = _context(config, context)
    tokens = _cache_tokens(length, cache_tokens)
    if length > config.context and config.rope is not None and config.rope.type != "dynamic":
        log.warning("a context of %d tokens is more than the %d that the model was made for", length, config.context)
    path = folder / "generation_config.json"
    generation_config = read_json(path) if path.exists() else {}
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    settings = Settings.read(folder, config, tokenizer, generation_config)
    weights = load_weights(folder, config)
    engine = start_engine(config, weights, device, dtype, length, tokens, progress)
    return Model(folder, config, tokenizer, engine, settings)


def start_engine(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    device: str,
    dtype: str,
    context: int,
    cache_tokens: int,
    progress: LoadProgress | None = None,
) -> Engine:
    """Load the weights onto a device, with a cache of ``cache_tokens`` tokens. The arguments are those of ``load``.

    Raises DeviceError, CheckpointError.
    """
    backend = _backend(device, _DTYPE_NAMES[dtype], config, weights, context, cache_tokens)
    try:
        if backend.name == "numpy":
            _check_cache(config, backend, cache_tokens)
        return Engine(backend, config, _upload(backend, weights, progress), context, cache_tokens)
    except BaseException:
        backend.close()
        raise


_DTYPE_NAMES = {
    "auto": "auto",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp32": "f32",
    "fp16": "f16",
    "bf16": "bf16",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")


def find_model(model: str | os.PathLike[str] | None, offline: bool = False) -> Path:
    """The folder of a model: the bundled one, a local folder, or the local copy of a hub repository."""
    if model is None:
        return data_folder("weights")
    try:
        path = Path(model or "?").expanduser()  # an empty name must not mean the current folder
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as e:  # no permission, a name too long, no such home folder
        raise ConfigError(f"cannot open {model!s:.80}: {getattr(e, 'strerror', None) or e}") from None
    if exists:
        raise ConfigError(f"{path} is a file; give the folder that holds config.json and the weights")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{str(model)!r:.200} does not exist, and is not a hub id of the form org/name")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = offline or constants.HF_HUB_OFFLINE

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES), local_files_only=offline))
    except LocalEntryNotFoundError:
        why = (
            "it is not in the local cache, and the hub is off limits (offline)"
            if offline
            else "the hub cannot be reached"
        )
        raise ConfigError(f"{model}: no such folder, and as a hub id: {why}") from None
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise ConfigError(f"{model}: no such folder, and the hub says: {str(e).splitlines()[0]}") from None


_POSITIONS = 2**30  # positions are int32, with room for a page more


def _context(config: ModelConfig, asked: int | None) -> int:
    if asked is None:
        return min(config.context, DEFAULT_CONTEXT)
    asked = _tokens("context", asked)
    if config.rope is None and asked > config.context:
        raise ConfigError(f"context {asked} is more than the {config.context} positions that the model learned")
    return asked


def _tokens(name: str, value: Any) -> int:
    """A whole number of tokens. Raises ParameterError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= _POSITIONS:
        raise ParameterError(f"{name} = {value!r:.80} is out of range; it must be a number from 1 to {_POSITIONS}")
    return int(value)


def _cache_tokens(context: int, asked: int | None) -> int:
    return context if asked is None else max(context, _tokens("cache_tokens", asked))


def _backend(
    device: str, dtype: str, config: ModelConfig, weights: Mapping[str, Weight], context: int, tokens: int
) -> Backend:
    if device not in ("auto", "cuda", "numpy"):
        raise ParameterError(f"device = {device!r} is not supported; supported: auto, cuda, numpy")
    if device != "numpy":
        from .backends.driver import cuda_available

        works, reason = cuda_available()
        if works:
            from .backends.cuda import CudaBackend

            return CudaBackend.open(config, weights, dtype, context, tokens)
        if device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {reason}")
        log.warning("running on NumPy: %s", reason)
    from .backends.numpy import NumPyBackend

    chosen = "f32" if dtype == "auto" else dtype
    size = (
        sum(int(np.prod(w.shape)) for w in {w.source: w for w in weights.values()}.values()) * DTYPES[chosen].itemsize
    )
    fits = size < 0.7 * _free_memory()
    if not fits:
        log.warning(
            "the weights take %.1f GB as %s and do not fit; they stay in the file, which is slow", size / 1e9, chosen
        )
    return NumPyBackend(chosen, convert=fits)


def _check_cache(config: ModelConfig, backend: Backend, tokens: int) -> None:
    """Refuse a cache that host memory cannot hold, before the system runs out of it."""
    from .memory import cache_bytes  # it brings the compiler, which importing cuplama need not pay for

    tables = 8 * config.rope.dim * tokens if config.rope else 0  # cos and sin, and as much again while they are made
    need, free = cache_bytes(config, backend.dtype, tokens) + tables, _free_memory()
    if need > free:
        raise DeviceError(
            f"a cache of {tokens} tokens takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free;"
            " ask for a shorter context"
        )


def _free_memory() -> float:
    """Bytes of host memory that can be had, or infinity where the system does not say."""
    with contextlib.suppress(OSError, ValueError):  # Linux: the file cache can be given up, so "free" alone is too low
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def _upload(backend: Backend, weights: Mapping[str, Weight], progress: LoadProgress | None) -> dict[str, Array]:
    """Load every weight; one that goes by two names (a tied head) is loaded once."""
    unique = {w.source: w for w in weights.values()}
    total, done = sum(w.nbytes for w in unique.values()), 0
    loaded: dict[tuple[str, ...], Array] = {}
    for source, weight in unique.items():
        loaded[source] = backend.load_weight(weight)
        done += weight.nbytes
        if progress is not None:
            progress(done, total)
    backend.end_loading()
    return {name: loaded[w.source] for name, w in weights.items()}
