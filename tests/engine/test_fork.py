"""A process that forks while a model is at work: a child can use the model, and neither of them hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from cuplama import Model
from cuplama.errors import DeviceError
from tests.tiny import CHARS, load

if not hasattr(os, "fork"):
    pytest.skip("this system does not fork", allow_module_level=True)

_SECONDS = 60

# The bundled model: its products are large enough for a team. The prompt is as long as its cache allows.
_BUSY = """
import os, sys, threading
import cuplama

model = cuplama.load(device="numpy")
prompt = [1 + i % 100 for i in range(300)]

def generate():
    return model.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True).tokens

wanted = generate()
"""

_FORKS = """
stop = threading.Event()

def work():
    while not stop.is_set():
        for delta in model.stream(prompt, max_tokens=6, temperature=0, ignore_eos=True):
            pass

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for i in range(5):
        child = os.fork()
        if child == 0:
            ok = generate() == wanted and model.engine.cache.free == model.engine.cache.pages
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0, "the child got something else"
finally:
    stop.set()
for thread in threads:
    thread.join()
assert generate() == wanted
"""

_POOL = """
import multiprocessing

def answer(i):
    return generate()

thread = threading.Thread(target=lambda: [generate() for _ in range(3)])
thread.start()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(answer, range(4)) == [wanted] * 4
thread.join()
"""

_TEXT = """
wanted = model.generate("Once upon a time", max_tokens=4, temperature=0).text
child = os.fork()
if child == 0:
    sys.exit(model.generate("Once upon a time", max_tokens=4, temperature=0).text != wanted)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(_FORKS, id="while threads generate"),
        pytest.param(_POOL, id="pool", marks=pytest.mark.slow),
        pytest.param(_TEXT, id="text"),
    ],
)
def test_a_child_generates(code: str) -> None:
    """And nobody complains on stderr, as tokenizers does where its threads were at work."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _BUSY + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")


def _in_child(call: Any) -> int:
    """The exit status of a child that is forked here and calls it."""
    child = os.fork()
    if child == 0:
        try:
            status = call()
        except BaseException:
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_stream_goes_on_in_the_child_and_in_the_parent(chars: Model) -> None:
    """It is the forking thread's own; the model's other runs are not there."""
    wanted = chars.generate("First", max_tokens=20, temperature=0).text
    with chars.stream("First", max_tokens=20, temperature=0) as stream:
        first = "".join(next(stream).text for _ in range(5))

        def go_on() -> int:
            same = first + "".join(d.text for d in stream) == wanted
            return 0 if same and chars.engine.cache.free == chars.engine.cache.pages else 1

        assert _in_child(go_on) == 0
        assert first + "".join(d.text for d in stream) == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_on_a_gpu_is_refused_in_the_child_by_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(CHARS) as model:
        monkeypatch.setattr(model.backend, "forks", False, raising=False)

        def use() -> int:
            for call in (lambda: model.generate("First"), lambda: model.logits([1]), lambda: next(model.stream("F"))):
                with pytest.raises(DeviceError, match=r'^a model on numpy cannot be used in a child .* by "spawn"$'):
                    call()
            monkeypatch.setattr(model.engine.runner, "close", lambda: os._exit(2))  # would touch the parent's GPU
            model.close()
            return 0

        assert _in_child(use) == 0
        assert len(model.generate("First", max_tokens=3).tokens) == 3
