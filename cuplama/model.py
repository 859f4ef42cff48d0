"""A loaded model: generate, stream, chat, look at logits. ``load`` makes one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Unpack, overload

import numpy as np

from .arguments import checked, shown, type_of, whole_number
from .async_stream import AsyncStream
from .chat import ChatOptions, read_chat
from .completion import Completion, Delta, Stream
from .engine.calls import Progress
from .engine.engine import Engine
from .engine.sequence import SequenceState
from .errors import ClosedError, ContextError, CopyError, ParameterError, PromptError
from .generation import Generation
from .generation_config import Settings, params_over
from .models.config import ModelConfig
from .output_text import OutputText
from .prompts import PlainPrompt, Prompt, Prompts, TokenIds, plain_prompt, plain_prompts, prompt_of_batch, whole_ids
from .sampling_params import SamplingOptions, SamplingParams, given_options
from .structured import Grammars
from .text.tokenizer import Tokenizer

__all__ = ["Model"]

_DEVICES = {"numpy": "NumPy", "cuda": "CUDA"}  # a backend's name -> how people write it


class Model:
    """A loaded model. Use ``cuplama.load``; close it, or use it in a ``with`` block, to free what it holds.

    Several threads and tasks may generate at once: they share one batch, which each joins and leaves at any token.

    After close() everything that computes raises ClosedError; encode, decode and params go on.

    name, adapter: the folders or hub ids as they were given to ``load``; folder: where its files are; config:
    ModelConfig; backend: where it runs; context: tokens a sequence may have; num_parameters: numbers in its weights, an
    adapter and a head that is tied to the embedding not counted; defaults: the sampling parameters that its
    generation_config.json sets; stop_ids: token ids that end a text; bos: the id that an empty prompt becomes, or None.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        engine: Engine,
        settings: Settings,
        name: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.name, self.adapter = str(folder) if name is None else name, adapter
        self.folder, self.config, self.backend = folder, config, engine.backend
        self._tokenizer = tokenizer
        self._engine: Engine | None = engine
        self.context = engine.context
        self.defaults, self.stop_ids, self.bos = settings.defaults, settings.stop_ids, settings.bos
        self._grammars = Grammars(lambda: self.tokenizer, config.vocab_size, settings.stop_ids)
        own = replace(config, adapter=None).weight_shapes()
        shapes = {id(engine.runner.values[weight]): shape for weight, shape in own.items()}
        self.num_parameters = sum(map(math.prod, shapes.values()))

    def __repr__(self) -> str:
        name = Path(self.name).name or self.folder.resolve().name
        if self.closed:
            return f"<Model {name}: closed>"
        device = _DEVICES.get(self.backend.name, self.backend.name)
        return (
            f"<Model {name}: {self.config.architecture}, {_shortened(self.num_parameters)} parameters, "
            f"{self.backend.dtype.name} on {device}, context {self.context}>"
        )

    def __reduce__(self) -> NoReturn:
        raise CopyError(
            f"a model can be neither pickled nor copied: call cuplama.load({self.name!r}) in each process, "
            "or share the model among threads"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises TokenizerError if the folder has none."""
        if self._tokenizer is None:
            return Tokenizer.load(self.folder)  # raises, and says what is missing
        return self._tokenizer

    @property
    def engine(self) -> Engine:
        """The engine. Raises ClosedError after close()."""
        if self._engine is None:
            raise ClosedError("the model is closed; cuplama.load opens it again")
        return self._engine

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._engine is None

    def params(self, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """The parameters that generate uses for the same arguments. Raises ParameterError naming one.

        Without ``params``: the defaults of SamplingParams, those that the model's generation_config.json sets in place
        of them, and then ``options``. A SamplingParams is complete: the model's own defaults do not count beside it,
        only ``options`` take the place of its fields. A response_format is the parameter that it stands for. A schema,
        regex or grammar is compiled here, which may take a second; generate finds it then.
        """
        given = given_options(options)
        if params is None:
            params = params_over(self.defaults, given)
        elif not isinstance(params, SamplingParams):
            raise ParameterError(
                f"params = {shown(params)} is {type_of(params)}; it must be a SamplingParams, or None (give single"
                " parameters by name, as in max_tokens=64, and several prompts as one list)"
            )
        elif given:
            params = replace(params, **given)
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= self.config.vocab_size:
                    raise ParameterError(
                        f"{name}: token id {token} is out of range; the vocabulary has {self.config.vocab_size}"
                    )
        self._grammars.check(params)
        return params

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, text or ids, checked. An empty prompt becomes BOS. Raises PromptError."""
        return self._ids(plain_prompt(prompt))

    def _ids(self, plain: PlainPrompt) -> list[int]:
        ids = self.tokenizer.encode(plain) if isinstance(plain, str) else plain
        if not ids:
            if self.bos is None:
                raise PromptError("the prompt is empty and the model has no BOS token to start from")
            ids = [self.bos]
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            wrong = next(t for t in ids if not 0 <= t < self.config.vocab_size)
            raise PromptError(f"token id {wrong} is out of range; the vocabulary has {self.config.vocab_size} tokens")
        return ids

    def decode(self, ids: TokenIds, skip_special: bool = True) -> str:
        """The text of token ids, by default without special tokens. Ids without a token become nothing.

        Raises PromptError for what are no token ids, and TokenizerError if the folder has no tokenizer.
        """
        return self.tokenizer.decode(whole_ids(ids, "decode takes a list of token ids"), skip_special=skip_special)

    def _fit(self, ids: list[int], room: int) -> list[int]:
        """The ids, if the context has them and ``room`` tokens more. Raises ContextError."""
        if len(ids) + room > self.context:
            more = f"; the model allows {self.config.context} (--context)" if self.config.context > self.context else ""
            raise ContextError(
                f"the prompt has {len(ids)} tokens; the context has room for {self.context - room}{more}"
            )
        return ids

    # A str is also a sequence of strings; as a prompt it is one, which the first form says before the others can.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Prompt | Prompts,
        params: SamplingParams | None = None,
        *,
        n: int,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | Prompts,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Generate from a prompt (text or token ids), or from several as one batch.

        params, options: how, as SamplingParams or as its fields by name; ``Model.params`` says how they combine. In a
        batch every prompt has the same parameters and gives what it gives alone.
        n: choices for each prompt; the result is a list then, first those of the first prompt, and choice i of a prompt
        has the seed + i. Without n a single prompt gives its Completion, and a list of prompts a list.
        progress: called with (prompt tokens done, prompt tokens in all).

        Raises ParameterError for a parameter, PromptError for a prompt that cannot be used, ContextError for one that
        is too long, BusyError where too many sequences wait, and ClosedError after close(). Errors of a prompt in a
        list begin with its number, counted from 0.
        """
        generation = self._start(prompt, self.params(params, **options), n)
        for _ in self._deltas(generation, progress):
            pass
        done = generation.completions()
        return done[0] if generation.single else done

    def stream(
        self,
        prompt: Prompt | Prompts,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        progress: Progress | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Like generate, but yields a Delta per token as it is drawn. Closing the stream stops the generation.

        With n choices of each prompt a delta's index is prompt * n + choice. ``Stream.completion`` is what generate
        would have returned.
        """
        generation = self._start(prompt, self.params(params, **options), n)
        return Stream(self._deltas(generation, progress), generation.clock, generation.completions)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        n: None = None,
        progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        n: int,
        progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion | list[Completion]:
        """The assistant's answer to ``[{"role": "user", "content": "Hi"}, ...]``, by the model's own chat template.

        messages: dicts with a role and a content, text or a list of text parts. params, n, progress: as for generate.
        options: sampling parameters, and what reaches the template (tools, enable_thinking, ...); ChatOptions lists
        them. With continue_final_message the answer goes on from the last message, and its text is the continuation.

        Raises ParameterError for an option that neither is a sampling parameter nor is read by the template,
        TokenizerError if the model has no template or the template refuses the messages, and what generate raises.
        """
        ids, sampling = read_chat(self.tokenizer, messages, options)
        return self.generate(ids, params, n=n, progress=progress, **sampling)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """Like chat, but yields a Delta per token."""
        ids, sampling = read_chat(self.tokenizer, messages, options)
        return self.stream(ids, params, n=n, progress=progress, **sampling)

    async def agenerate(
        self,
        prompt: Prompt | Prompts,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """generate for asyncio: other tasks run meanwhile, and calls of many tasks share one batch.

        priority: lower ones are admitted first. A task that is cancelled frees its pages at once.
        """
        stream = self.astream(prompt, params, n=n, priority=priority, **options)
        async with stream:
            await stream.finish()
        return stream.result

    def astream(
        self,
        prompt: Prompt | Prompts,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """stream for asyncio; see ``agenerate``. The generation begins now.

        Raises BusyError where too many requests are waiting, and RuntimeError where no event loop is running.
        """
        return AsyncStream(self.engine, self._start(prompt, self.params(params, **options), n), priority)

    async def achat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        **options: Unpack[ChatOptions],
    ) -> Completion | list[Completion]:
        """chat for asyncio; see ``agenerate``."""
        ids, sampling = read_chat(self.tokenizer, messages, options)
        return await self.agenerate(ids, params, n=n, priority=priority, **sampling)

    def astream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """stream_chat for asyncio; see ``agenerate``."""
        ids, sampling = read_chat(self.tokenizer, messages, options)
        return self.astream(ids, params, n=n, priority=priority, **sampling)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> list[int]:
        """The token ids of the prompt that chat makes of the same options. Raises what chat raises for them."""
        return self.encode(read_chat(self.tokenizer, messages, options)[0])

    def logits(self, prompt: Prompt) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits after each token of one prompt, text or ids: [n, vocab_size] float32. An empty one is BOS alone.

        Raises PromptError for a prompt that cannot be used, ContextError for one that is too long.
        """
        engine = self.engine
        return np.concatenate(list(engine.logits(self._fit(self.encode(prompt), 0))))

    def _start(self, prompt: Prompt | Prompts, params: SamplingParams, n: int | None) -> Generation:
        """n sequences per prompt; raises before anything is computed."""
        _ = self.engine  # closed: raises
        prompts, single = plain_prompts(prompt)
        count = 1 if n is None else checked("n", n, whole_number(1), "a whole number >= 1, or None")
        if params.stop:
            _ = self.tokenizer  # stop strings need one
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        banned = {t for t, bias in params.logit_bias.items() if bias == -math.inf}
        if len(banned | stops if params.min_tokens else banned) == self.config.vocab_size:
            raise ParameterError("logit_bias (with min_tokens: and stop tokens) bans every token of the vocabulary")
        room = 0 if params.max_tokens == 0 else 1
        sequences: list[SequenceState] = []
        for number, plain in enumerate(prompts):
            with prompt_of_batch(None if single else number):
                ids = self._fit(self._ids(plain), room)
            for choice in params.choices(count):
                constraint = self._grammars.constraint(choice, stops)
                sequences.append(SequenceState(ids, choice, stops, constraint=constraint))
        outputs = [OutputText(i, s, self._tokenizer) for i, s in enumerate(sequences)]
        device, dtype = self.backend.name, self.backend.dtype.name
        settings = self.name, device, dtype, self.context, self.adapter
        return Generation(prompts, outputs, single and n is None, *settings)

    def _deltas(self, generation: Generation, progress: Progress | None) -> Generator[Delta]:
        """Run the sequences; one delta per token drawn, in the order in which they are drawn."""
        with contextlib.closing(self.engine.generate(generation.begin(), progress)) as steps:
            for drawn in steps:
                deltas = generation.push(drawn)
                if generation.ended:
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


def _shortened(count: int) -> str:
    """A number with two digits at least and its unit: "7.6 M", "1.24 B"."""
    for size, unit, digits in ((10**9, "B", 2), (10**6, "M", 1), (10**3, "K", 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return str(count)
