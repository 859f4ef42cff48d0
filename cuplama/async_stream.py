"""The same stream of deltas for asyncio: ``Model.astream`` makes it."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from .completion import Completion, Delta, Stream, Timings
from .errors import CopyError

__all__ = ["AsyncStream"]


class AsyncStream:
    """An asynchronous iterator over the deltas of a generation. aclose(), or leaving ``async with``, stops it.

    The generation begins when the stream is made. When the task that reads it is cancelled, the pages of its sequences
    are free at once. completions, completion, timings: as of ``Stream``.
    """

    def __init__(self, stream: Stream, single: bool) -> None:
        self._stream, self._single = stream, single

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        delta = await asyncio.to_thread(next, self._stream, None)
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Stop generating and give the cache pages back. Closing twice is fine."""
        self._stream.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __reduce__(self) -> NoReturn:
        raise CopyError("a stream can be neither pickled nor copied; its completions can, once it was read")

    @property
    def completions(self) -> list[Completion]:
        """One Completion per sequence; see ``Stream.completions``."""
        return self._stream.completions

    @property
    def completion(self) -> Completion:
        """The Completion of a stream of one sequence; see ``Stream.completion``."""
        return self._stream.completion

    @property
    def result(self) -> Completion | list[Completion]:
        """What ``Model.generate`` would have returned: a Completion, or a list of them."""
        return self.completion if self._single else self.completions

    @property
    def timings(self) -> Timings:
        """Where the time went until now."""
        return self._stream.timings
