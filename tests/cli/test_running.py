"""What the commands say of a run: whether its text was cut, and by what."""

from __future__ import annotations

from cuplama.cli.running import cut_notice


def test_a_cut_names_the_option_that_cut() -> None:
    assert cut_notice("length", 7, 7, 80) == "the answer was cut at 7 tokens (-n 7)"
    assert cut_notice("length", 1, 1, 80) == "the answer was cut at 1 token (-n 1)"
    assert cut_notice("length", 7, 8, 80) == "the answer was cut: the context of 80 tokens is full (-c)"
    assert cut_notice("length", 7, None, 80) == "the answer was cut: the context of 80 tokens is full (-c)"


def test_what_ended_by_itself_was_not_cut() -> None:
    assert cut_notice("stop", 7, 7, 80) is None
    assert cut_notice(None, 7, 7, 80) is None  # interrupted
    assert cut_notice("length", 0, 0, 80) is None  # nothing was asked for
