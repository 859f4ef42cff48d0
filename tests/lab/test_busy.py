"""What other processes use of the machine: their share of what Linux counts, and when it is worth a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuplama.lab import busy
from cuplama.lab.busy import Others, remark


def test_what_others_use_is_all_but_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, clock, own = tmp_path / "stat", [100.0], [7.0]
    monkeypatch.setattr(busy, "_STAT", stat)
    monkeypatch.setattr("cuplama.lab.busy.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("cuplama.lab.busy.time.process_time", lambda: own[0])
    monkeypatch.setattr("cuplama.lab.busy.os.sysconf", lambda name: 100)
    stat.write_text("cpu  1000 0 500 90000 80 10 10 0 0 0\ncpu0 1 2 3\n")
    others = Others()
    clock[0], own[0] = 110.0, 12.0
    stat.write_text("cpu  2200 100 700 99999 99 20 20 80 0 0\ncpu0 1 2 3\n")  # 16 s more, without idle and waiting
    assert others.cores() == pytest.approx((16 - 5) / 10)
    own[0] = 99.0  # clocks of two kinds never agree to the tick
    assert others.cores() == 0


@pytest.mark.parametrize("text", [None, "", "cpu a b", "cpu 1 2"])
def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    monkeypatch.setattr(busy, "_STAT", tmp_path / "stat")
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert Others().cores() is None


def test_only_what_matters_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.lab.busy.os.cpu_count", lambda: 4)
    assert [remark(cores) for cores in (None, 0.0, 0.09)] == [None] * 3
    assert remark(1.26) == "the machine was busy: other processes used 1.3 of 4 cores meanwhile"
