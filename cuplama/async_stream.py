"""The same stream of deltas for asyncio: ``Model.astream`` makes it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, NoReturn

from .completion import Completion, Delta, Timings, only
from .engine.calls import Call
from .engine.engine import Engine
from .errors import CopyError
from .generation import Generation

if TYPE_CHECKING:
    import asyncio

__all__ = ["AsyncStream"]


class _Mailbox:
    """Tells the streams of one event loop that there is something to read: once for all that a step brings.

    Waking a loop from another thread costs a system call, and a step may have something for a hundred streams.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        # Weak: a message that a closed loop never delivers must not keep the stream, which knows its loop.
        self._waiting: deque[weakref.ref[AsyncStream]] = deque()
        # Reentrant: the garbage collector may end a forgotten stream in here, and so wake another.
        self._lock, self._woken = threading.RLock(), False

    def post(self, stream: weakref.ref[AsyncStream]) -> None:
        """Tell a stream of the loop; called from any thread."""
        self._waiting.append(stream)
        with self._lock:
            woken, self._woken = self._woken, True
        loop = self._loop()
        if not woken and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            self._woken = False
        while self._waiting:
            if (stream := self._waiting.popleft()()) is not None:
                stream._come()


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


class AsyncStream:
    """An asynchronous iterator over the deltas of a generation. aclose(), or leaving ``async with``, stops it.

    The generation begins when the stream is made. When the task that reads it is cancelled, or the stream forgotten,
    the pages of its sequences are free at once. Text is made of tokens in the event loop's thread, beside the engine.
    """

    def __init__(self, engine: Engine, generation: Generation, priority: int) -> None:
        """Raises BusyError or ClosedError, and RuntimeError where no event loop is running."""
        import asyncio  # 24 ms, a fifth of what the package's own modules take; who runs a loop has imported it

        loop = asyncio.get_running_loop()
        mailbox = _mailboxes.setdefault(loop, _Mailbox(loop))
        self._engine, self._generation = engine, generation
        self._deltas: deque[Delta] = deque()
        self._ready, self._is_read, self._rests = asyncio.Event(), True, False
        own = weakref.ref(self)  # the engine must not keep a stream that everybody else has forgotten
        self._call: Call | None = engine.submit(generation.begin(), priority, lambda: mailbox.post(own))

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        try:
            while not self._deltas:
                call = self._call
                if call is None:
                    raise StopAsyncIteration
                self._ready.clear()
                ended = call.ended  # asked before reading: the last tokens may come between the two
                drawn = call.read()
                if isinstance(drawn, list):
                    self._deltas.extend(self._generation.push(drawn))
                    if self._generation.ended:
                        self._leave()
                elif ended:
                    self._leave()
                else:
                    await self._ready.wait()
            return self._deltas.popleft()
        except BaseException:
            self._leave()
            raise

    def _come(self) -> None:
        """There is something new. Where nobody looks at single deltas, it is taken in at once, and the end is told."""
        if self._rests and self._call is not None and not self._call.ended:
            return
        if not self._is_read:
            try:
                self.ready()
            except Exception:  # the reader gets it
                self._ready.set()
                return
        if self._is_read or self._call is None or self._call.ended:
            self._ready.set()

    async def finish(self) -> None:
        """Wait for the end of the generation, whose text is in the completions then; its deltas are left out.

        Cheaper than reading them: the task is not woken for every token.
        """
        self._is_read = False
        async for _ in self:
            pass

    async def rest(self, seconds: float) -> None:
        """Wait for so many seconds, or for the end: of a reader who would rather take in many deltas at once."""
        import asyncio

        if self._call is None or self._call.ended:
            return
        self._ready.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._ready.set)
        self._rests = True
        try:
            await self._ready.wait()
        finally:
            self._rests = False
            timer.cancel()

    def ready(self) -> list[Delta]:
        """The deltas that are there already, without waiting: what a step brought for several sequences."""
        found = list(self._deltas)
        self._deltas.clear()
        while self._call is not None and self._call.has_results:
            drawn = self._call.read()
            assert isinstance(drawn, list)
            found += self._generation.push(drawn)
            if self._generation.ended:
                self._leave()
        return found

    @property
    def ended(self) -> bool:
        """Whether every delta has been read."""
        return self._call is None and not self._deltas

    def _leave(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._engine.leave(call)

    async def aclose(self) -> None:
        """Stop generating and give the cache pages back. Closing twice is fine."""
        self._deltas.clear()
        self._leave()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_call", None) is not None:
            self._leave()

    def __reduce__(self) -> NoReturn:
        raise CopyError("a stream can be neither pickled nor copied; its completions can, once it was read")

    @property
    def completions(self) -> list[Completion]:
        """One Completion per sequence; see ``Stream.completions``."""
        return self._generation.completions()

    @property
    def completion(self) -> Completion:
        """The Completion of a stream of one sequence; see ``Stream.completion``."""
        return only(self.completions)

    @property
    def result(self) -> Completion | list[Completion]:
        """What ``Model.generate`` would have returned: a Completion, or a list of them."""
        found = self.completions
        return found[0] if self._generation.single else found

    @property
    def timings(self) -> Timings:
        """Where the time went until now."""
        return self._generation.clock.timings()
