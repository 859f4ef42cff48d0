"""Steps of long work are announced, with an estimate as soon as there can be one."""

from __future__ import annotations

import pytest

from cuplama.lab.steps import announced


def test_steps_are_announced_with_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr("cuplama.lab.steps.time.perf_counter", lambda: now[0])
    seen = []
    for item, seconds in zip(announced([7, 8, 9], str, said.append), (10.0, 200.0, 0.0), strict=True):
        seen.append(item)
        now[0] += seconds
    assert seen == [7, 8, 9]
    assert said == ["1/3: 7", "2/3: 8 (about 20 s left)", "3/3: 9 (about 2 min left)"]
    assert list(announced([], str, said.append)) == []
    assert len(said) == 3
