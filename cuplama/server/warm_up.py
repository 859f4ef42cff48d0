"""What a server does before it is ready, so that no client waits for it."""

from __future__ import annotations

import itertools

from ..engine.graphs import STEP_SIZES
from ..model import Model

__all__ = ["warm_up"]

_PROMPT, _NEW = 128, 4  # tokens of a prompt, and tokens that are drawn after it
_BURST = 64  # requests at once, at most
_TWICE = 2  # the first pass of a size is run launch by launch, and the second is captured


def warm_up(model: Model) -> None:
    """Run one request, and then more and more at once, where passes and steps are captured: the kernels are compiled
    then, which takes seconds on a machine that never ran them, and the usual sizes captured, 10 to 60 ms each.

    Nothing is counted. Raises what the requests of clients would raise.
    """
    if not model.backend.captures:
        return
    others = itertools.count()  # a prompt that came before would be found in the prefix cache
    tokens = max(1, min(_PROMPT, model.context - _NEW))
    for count in [n for n in STEP_SIZES if n <= min(_BURST, model.engine.max_running)]:
        is_power = count & (count - 1) == 0  # as passes beside decode steps are
        for _ in range(_TWICE if is_power else 1):
            prompts = [[next(others) % model.config.vocab_size] * tokens for _ in range(count)]
            model.generate(prompts, temperature=1.0, max_tokens=_NEW, ignore_eos=True)
    model.engine.restart_counts()
