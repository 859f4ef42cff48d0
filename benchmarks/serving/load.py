"""Loads on a server: as fast as it can, at a rate of its own, one conversation; and what was measured of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from benchmarks.serving.client import Answer, Client
from benchmarks.serving.lengths import Ask, arrivals

__all__ = ["FailedError", "at_once", "capacity", "conversation", "open_loop"]

PERCENTILES = (50, 95, 99)
MOST_IN_FLIGHT = 4000  # requests of an open loop; with more the server does not keep up, and the run ends


class FailedError(Exception):
    """Requests failed, so the figures would be of something else."""


async def at_once(client: Client, model: str, asks: Sequence[Ask], clients: int, stream: bool = True) -> list[Answer]:
    """Closed loop: ``clients`` of them, each of which sends its next request when its last answer has ended."""
    waiting, answers = list(reversed(asks)), list[Answer]()

    async def one() -> None:
        while waiting:
            answers.append(await client.complete(model, waiting.pop(), time.perf_counter(), stream))

    await asyncio.gather(*(one() for _ in range(min(clients, len(asks)))))
    _check(answers)
    return answers


async def capacity(client: Client, model: str, asks: Sequence[Ask], clients: int) -> dict[str, Any]:
    """What the server does with ``clients`` requests at any time: from when a tenth of them has ended until nine tenths
    have, so that neither the beginning counts, when all prompts come together, nor the end, when the last ones run
    alone."""
    answers = sorted(await at_once(client, model, asks, clients), key=lambda a: a.ended)
    first, last = len(answers) // 10, max(1, 9 * len(answers) // 10)
    seconds = answers[last - 1].ended - (answers[first - 1].ended if first else min(a.sent for a in answers))
    inside = answers[first:last]
    return {
        "clients": clients,
        "requests": len(answers),
        "seconds": round(max(a.ended for a in answers) - min(a.sent for a in answers), 3),
        "requests_per_second": round(len(inside) / seconds, 4),
        "output_tokens_per_second": round(sum(a.tokens for a in inside) / seconds, 1),
    }


async def open_loop(
    client: Client, model: str, asks: Sequence[Ask], rate: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Each request is sent when it is due, whatever became of those before; ``rate`` of them a second.

    Times count from when a request was due. Raises FailedError if one fails, or if more run than MOST_IN_FLIGHT.
    """
    client.most_in_flight, began, tasks = 0, time.perf_counter(), list[asyncio.Task[Answer]]()
    for ask, due in zip(asks, arrivals(rng, len(asks), rate), strict=True):
        if (wait := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if client.in_flight >= MOST_IN_FLIGHT:
            raise FailedError(f"{MOST_IN_FLIGHT} requests run at a time: {rate:.2f} a second are too many")
        tasks.append(asyncio.create_task(client.complete(model, ask, began + due)))
    answers = await asyncio.gather(*tasks)
    _check(answers)
    return {"requests_per_second": round(rate, 4), **summary(answers), "most_in_flight": client.most_in_flight}


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Milliseconds at ``PERCENTILES`` of: from due to the first text, between two texts that came, from due to the end;
    and of each request's mean time for a token after the first."""
    many = [a for a in answers if a.tokens > 1 and len(a.texts) > 1]
    seconds = max(a.ended for a in answers) - min(a.due for a in answers)
    return {
        "requests": len(answers),
        "seconds": round(seconds, 3),
        "output_tokens_per_second": round(sum(a.tokens for a in answers) / seconds, 1),
        "first_token_ms": _percentiles(a.texts[0] - a.due for a in answers if a.texts),
        "between_tokens_ms": _percentiles(after - before for a in answers for before, after in pairwise(a.texts)),
        "token_of_request_ms": _percentiles((a.ended - a.texts[0]) / (a.tokens - 1) for a in many),
        "whole_ms": _percentiles(a.ended - a.due for a in answers),
        "sent_late_ms": _percentiles(a.sent - a.due for a in answers),
    }


async def conversation(
    client: Client, model: str, ask: Callable[[int], list[int]], tokens: int, more: int, repeats: int
) -> dict[str, Any]:
    """Two turns, alone on the server: a prompt of ``tokens`` tokens, and then the same with ``more`` behind it, which
    stand for the answer and the next question. ask: makes so many random tokens. The first conversation warms up."""
    first, second, cached = list[float](), list[float](), 0
    for _ in range(repeats + 1):
        prompt = ask(tokens)
        answers = []
        for turn in (prompt, [*prompt, *ask(more)]):
            answers.append(await client.complete(model, Ask(turn, 16), time.perf_counter()))
            _check(answers)
        first.append(answers[0].texts[0] - answers[0].sent)
        second.append(answers[1].texts[0] - answers[1].sent)
        cached = answers[1].cached
    turns = median(first[1:]), median(second[1:])
    return {
        "prompt_tokens": tokens,
        "second_turn_tokens": more,
        "repeats": repeats,
        "first_turn_ms": round(1e3 * turns[0], 2),
        "second_turn_ms": round(1e3 * turns[1], 2),
        "sooner": round(turns[0] / turns[1], 2),
        "cached_tokens": cached,
    }


def _check(answers: Iterable[Answer]) -> None:
    wrong = [a.error for a in answers if a.error]
    if wrong:
        raise FailedError(f"{len(wrong)} requests failed, the first with: {wrong[0]}")


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    values = 1e3 * np.array(list(seconds))
    return {f"p{p}": round(float(np.percentile(values, p)), 3) if len(values) else 0.0 for p in PERCENTILES}
