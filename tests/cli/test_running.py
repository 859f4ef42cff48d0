"""What the commands say of a run: whether its text was cut, and by what."""

from __future__ import annotations

import pytest

from cuplama import Completion, SamplingParams, Timings
from cuplama.cli.running import say_if_cut


def said(reason: str | None, count: int, limit: int | None, capfd: pytest.CaptureFixture[str]) -> str:
    """What is said of an answer of that many tokens in a context of 80."""
    params, timings = SamplingParams(max_tokens=limit), Timings(1, 1.0, count, 1.0)
    say_if_cut(Completion("", [0] * count, reason, None, timings, params=params, context=80))
    out, err = capfd.readouterr()
    assert out == ""
    return err


def test_a_cut_names_the_option_that_cut(capfd: pytest.CaptureFixture[str]) -> None:
    assert said("length", 7, 7, capfd) == "cuplama: the answer was cut at 7 tokens (-n 7)\n"
    assert said("length", 1, 1, capfd) == "cuplama: the answer was cut at 1 token (-n 1)\n"
    for limit in (8, None):
        assert said("length", 7, limit, capfd) == "cuplama: the answer was cut: the context of 80 tokens is full (-c)\n"


def test_what_ended_by_itself_was_not_cut(capfd: pytest.CaptureFixture[str]) -> None:
    assert said("stop", 7, 7, capfd) == ""
    assert said(None, 7, 7, capfd) == ""  # interrupted
    assert said("length", 0, 0, capfd) == ""  # nothing was asked for
