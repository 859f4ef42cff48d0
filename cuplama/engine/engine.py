"""The engine: sequences of token ids in, tokens of each out, for callers from any thread, in one batch.

It knows neither text nor files. Who waits for tokens makes the steps, for everybody: one thread at a time, until it has
what it waits for; then one of those that wait goes on. So a single caller has no thread between itself and the device,
and many share every step. For callers of asyncio a thread of the engine's makes them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from ..errors import BusyError, ClosedError, CuplamaError, DeviceError
from ..models.config import ModelConfig
from ..sampling_params import SamplingParams
from .calls import Call, Drawn, Progress
from .kv_cache import PagedCache, pages_for
from .pipeline import News, Pipeline
from .runner import Runner
from .scheduler import Scheduler
from .sequence import SequenceState
from .state_cache import SPARE_SLOTS
from .stats import EngineStats

__all__ = ["MAX_RUNNING", "Engine"]

MAX_RUNNING = 256  # sequences that have pages at a time, by default
_LOOK_AGAIN = 0.05  # seconds after which one that waits looks whether it has been forgotten
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _start_again() -> None:
    for engine in list(_engines):
        engine.start_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again)


class Engine:
    """Runs one model on one backend.

    weights: canonical name -> device array; context: tokens a sequence may have; cache_tokens: tokens that all
    sequences together may have in the cache; kv_cache_dtype: what that holds, one of ``KV_CACHE_DTYPES``; max_running:
    sequences that run at a time; max_waiting: that may wait beside them, None for any number; prefix_cache: whether
    sequences that begin alike share the pages of their beginnings; slots: for states of sequences, by default for all
    that run and ``SPARE_SLOTS`` more. Where there are fewer, fewer run at a time.

    failure: what the last step failed with; None after one that did not.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        weights: Mapping[str, Array],
        context: int,
        cache_tokens: int,
        kv_cache_dtype: str = "auto",
        max_running: int = MAX_RUNNING,
        max_waiting: int | None = None,
        prefix_cache: bool = True,
        slots: int | None = None,
    ) -> None:
        self.backend, self.config, self.context = backend, config, context
        slots = max_running + SPARE_SLOTS if slots is None else slots
        if config.delta_layers:
            max_running = min(max_running, slots - min(SPARE_SLOTS, slots // 4))
        self.max_running, self.max_waiting = max_running, max_waiting
        self.cache = PagedCache(backend, config, pages_for(max(cache_tokens, context)), kv_cache_dtype, slots)
        self.runner = Runner(backend, config, weights, self.cache, context)
        self.scheduler = Scheduler(self.cache, context, max_running, config.ropes.values(), prefix_cache)
        self.pipeline = Pipeline(self.runner, self.scheduler)
        self.failure: BaseException | None = None
        self._closed: Callable[[], CuplamaError] | None = None
        self._arrivals = 0
        self._fresh_locks()
        backend.when_short_of_memory(self.runner.drop_graphs)
        _engines.add(self)

    def _fresh_locks(self) -> None:
        self._turn = threading.Lock()  # held by the thread that makes a step
        self._lock = threading.Lock()  # of the calls; held for moments
        self._work = threading.Condition(self._lock)  # that the engine's own thread waits for
        self._calls: dict[int, Call] = {}  # by the id of each of its sequences
        self._arriving, self._leaving = deque[SequenceState](), deque[Call]()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Engine {self.config.architecture} on {self.backend.name}, cache of {self.cache.pages} pages>"

    @property
    def stats(self) -> EngineStats:
        """What it has done so far, and is doing now."""
        scheduler, pipeline, prefixes = self.scheduler, self.pipeline, self.scheduler.prefixes
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arriving),
            pages=self.cache.pages,
            pages_used=self.cache.pages - self.cache.free,
            steps=pipeline.steps,
            prompt_tokens=pipeline.prompt_tokens,
            generated_tokens=pipeline.generated,
            prefix_queries=prefixes.queries,
            prefix_hits=prefixes.hits,
            preemptions=scheduler.preemptions,
        )

    def restart_counts(self) -> None:
        """Count from here on: what ran so far was nobody's request."""
        scheduler, pipeline, prefixes = self.scheduler, self.pipeline, self.scheduler.prefixes
        pipeline.steps = pipeline.prompt_tokens = pipeline.generated = 0
        prefixes.queries = prefixes.hits = scheduler.preemptions = 0

    # -- calls

    def generate(self, sequences: Sequence[SequenceState], progress: Progress | None = None) -> Generator[Drawn]:
        """Draw tokens until every sequence has a finish_reason; yields the tokens of each step.

        Raises DeviceError if the model computes no logits to draw from, BusyError if too many wait, and ClosedError if
        the model is closed meanwhile.
        """
        return self._results(sequences, progress)

    def logits(self, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
        """The logits after each token, float32 [rows, vocab_size], an array for each pass, in order."""
        sequence = SequenceState(tokens, SamplingParams(max_tokens=0), frozenset(), every_logit=True)
        return self._results([sequence], None)

    def _results(self, sequences: Sequence[SequenceState], progress: Progress | None) -> Generator[Any]:
        """The results of a call, as they come; this thread makes steps while nobody else does."""
        call = self.submit(sequences)
        call.asks_for_progress = progress is not None
        try:
            while True:
                ended = call.ended  # asked before reading: the last result may come between the two
                result = call.read()
                told, call.progress = call.progress, None
                if progress is not None and told is not None:
                    progress(*told)
                if result is not None:
                    yield result
                elif ended:
                    return
                elif not self._waited(call):
                    try:
                        with self._turn:  # in no other way does Ctrl-C find the turn taken and nobody who gives it back
                            while not call.is_new:
                                self._step()
                    finally:
                        self._let_go()
                        self._hand_over()
        finally:
            self.leave(call)

    def submit(
        self,
        sequences: Sequence[SequenceState],
        priority: int = 0,
        tell: Callable[[], None] | None = None,
    ) -> Call:
        """Let sequences wait for their turn; ``leave`` ends the call. Raises BusyError, ClosedError or DeviceError.

        priority: those with a lower one are admitted first. tell: called, from any thread, when the call has something
        new; the engine's own thread makes the steps then.
        """
        with self._lock:
            self._check_open()
            scheduler = self.scheduler
            total = len(scheduler.running) + len(scheduler.waiting) + len(self._arriving) + len(sequences)
            if self.max_waiting is not None and total > self.max_running + self.max_waiting:
                raise BusyError(
                    f"{total - len(sequences)} sequences run or wait already; {self.max_running} may run and"
                    f" {self.max_waiting} wait"
                )
            for s in sequences:
                s.order = (priority, self._arrivals)
                self._arrivals += 1
                scheduler.measure(s)
            call = Call(sequences, tell)
            going = [s for s in sequences if s.finish_reason is None]
            self._calls.update((id(s), call) for s in going)
            self._arriving.extend(going)
            if tell is not None:
                self._start_thread()
                self._work.notify()
        return call

    def leave(self, call: Call) -> None:
        """The caller wants nothing more: what its sequences hold is free at once.

        It never waits for a step: if another thread makes one, that one frees the pages behind it. For it may be the
        garbage collector that ends a forgotten stream, in any thread and between any two lines.
        """
        self._leaving.append(call)
        self._let_go()
        self._hand_over()

    def _let_go(self) -> None:
        """Drop the sequences of calls that were left, unless another thread has the turn; it does so then."""
        while self._leaving and self._turn.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._turn.release()

    # -- steps

    def _waited(self, call: Call) -> bool:
        """Whether another thread makes steps; then this one has waited for it, else it is to make them for its call."""
        call.thread, call.waits = threading.get_ident(), True
        busy = self._turn.locked()
        if busy:
            call.wait(_LOOK_AGAIN)
        call.waits = False
        return busy

    def _hand_over(self) -> None:
        """Wake one of those that wait for steps, so that it makes them; the engine's own thread takes its turn itself.

        A stream that nobody reads now is none of them.
        """
        if not self._turn.locked():
            for other in list(self._calls.values()):
                if other.waits and not other.is_new:
                    other.wake()
                    return

    def _step(self) -> None:
        """One step for everybody. The turn is held. What it raises was told to the calls that it concerns."""
        self._settle()
        pipeline = self.pipeline
        if self._closed is not None:
            self._fail_all(self._closed())
            return
        try:
            pipeline.queue()
            news = pipeline.read()
            if news:  # a step with nothing to do tells nothing of the device
                self.failure = None
        except Exception as e:
            self._fail(e)
            return
        except BaseException:  # Ctrl-C in the middle of anything: the others begin again
            pipeline.abandon()
            raise
        self._publish(news)

    def _settle(self) -> None:
        """Take in what has arrived, and drop what was left."""
        while self._arriving:
            s = self._arriving.popleft()
            if id(s) in self._calls:
                self.scheduler.add(s)
        while self._leaving:
            call = self._leaving.popleft()
            for s in call.sequences:
                if self._calls.pop(id(s), None) is not None:
                    self.pipeline.drop(s)

    def _fail(self, error: Exception) -> None:
        """A step has failed: those who ran learn of it, and the others begin again."""
        self.failure = error
        running = list(self.scheduler.running) or list(self.scheduler.waiting)
        calls = {id(c): c for s in running if (c := self._calls.get(id(s))) is not None}
        gone = [s for call in calls.values() for s in call.sequences]
        self.pipeline.abandon(gone)
        for call in calls.values():
            call.fail(error)
            call.wake()

    def _fail_all(self, error: CuplamaError) -> None:
        for call in {id(c): c for c in self._calls.values()}.values():
            call.fail(error)
            call.wake()

    def _publish(self, news: News) -> None:
        """Give everybody what is theirs."""
        told = dict[int, Call]()
        drawn = dict[int, Drawn]()
        for s, token in news.drawn:
            call = self._calls.get(id(s))
            if call is not None:
                drawn.setdefault(id(call), []).append((s, token))
                told[id(call)] = call
        for key, tokens in drawn.items():
            told[key].add(tokens)
        for s, rows in news.logits:
            if (call := self._calls.get(id(s))) is not None:
                call.add(rows)
                told[id(call)] = call
        for s, _ in news.fed:
            if (call := self._calls.get(id(s))) is not None and call.asks_for_progress:
                told[id(call)] = call
        for s in news.ended:
            if (call := self._calls.pop(id(s), None)) is not None:
                call.end()
                if s.error is not None:
                    call.fail(s.error)
                told[id(call)] = call
        for call in told.values():
            call.tell_progress()
            call.wake()

    # -- the engine's own thread

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="cuplama engine", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        """Make steps while there are calls that make none themselves."""
        while True:
            with self._work:
                while not self._own_work() and self._closed is None:
                    self._work.wait()
                if self._closed is not None:
                    return
            with self._turn:
                self._step()

    def _own_work(self) -> bool:
        return bool(self._arriving or self._leaving or self.scheduler.running or self.scheduler.waiting)

    # -- the end

    def close(self) -> None:
        """Give back graphs, weights and cache. A call that has not ended gets ClosedError."""
        with self._lock:
            if self._closed is not None:
                return
            self._closed = partial(ClosedError, "the model is closed")
            self._work.notify_all()
        with self._turn:
            self._settle()
            self._fail_all(self._closed())
            self.pipeline.abandon(list(self.scheduler.running) + list(self.scheduler.waiting))
            self.runner.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed()

    def start_again(self) -> None:
        """In a child that was forked: of the parent's calls only those of the forking thread go on.

        Others may have been in the middle of anything. The parent's GPU is not there.
        """
        own, calls = threading.get_ident(), list(self._calls.values())
        self._fresh_locks()
        kept = {id(c): c for c in calls if c.thread == own}
        self._calls = {id(s): c for c in kept.values() for s in c.sequences if s.finish_reason is None}
        if self.backend.forks:
            self.pipeline.abandon(s for c in calls if id(c) not in kept for s in c.sequences)
            return
        self._closed = partial(
            DeviceError,
            f"a model on {self.backend.name} cannot be used in a child that was forked after it was loaded;"
            ' load it in the child, or start processes by "spawn"',
        )
