"""A stream for asyncio, and an engine that goes on meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from cuplama.async_stream import AsyncStream
from cuplama.engine.calls import Call
from cuplama.engine.sequence import SequenceState, Token
from cuplama.generation import Generation
from cuplama.output_text import OutputText
from cuplama.sampling_params import SamplingParams

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class LateCall(Call):
    """The last token comes, and the call ends, right after the caller has looked in vain."""

    late = True

    def read(self) -> Any:
        if self.late:
            self.late = False
            sequence = self.sequences[0]
            sequence.tokens.append(7)
            sequence.finish_reason = "length"
            self.add([(sequence, Token(7))])
            self.end()
            self.wake()
            return None
        return super().read()


class Engine:
    def submit(self, sequences: Any, priority: int, tell: Any) -> Call:
        return LateCall(sequences, tell)

    def leave(self, call: Call) -> None:
        pass


async def test_a_token_that_comes_between_two_looks_is_not_lost() -> None:
    sequence = SequenceState([1], SamplingParams(max_tokens=1), frozenset())
    generation = Generation(["x"], [OutputText(0, sequence, None)], True, "m", "numpy", "float32", 8)
    engine: Any = Engine()
    stream = AsyncStream(engine, generation, 0)
    assert [delta.token.id async for delta in stream] == [7]
    assert stream.completion.tokens == [7]
