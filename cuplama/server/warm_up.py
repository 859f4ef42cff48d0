"""What a server does before it is ready, so that no client waits for it."""

from __future__ import annotations

from ..model import Model

__all__ = ["warm_up"]

_BURST, _PROMPT, _NEW = 64, 128, 4  # requests at once, tokens of each prompt, and tokens that each draws


def warm_up(model: Model) -> None:
    """Run one request, and then many at once, where passes and steps are captured: the kernels are compiled then, which
    takes seconds on a machine that never ran them, and the usual sizes captured, 10 to 60 ms each.

    Nothing is counted. Raises what the requests of clients would raise.
    """
    if not model.backend.captures:
        return
    tokens = max(1, min(_PROMPT, model.context - _NEW))
    for count in (1, min(_BURST, model.engine.max_running)):
        prompts = [[i % model.config.vocab_size] * tokens for i in range(count)]
        model.generate(prompts, temperature=1.0, max_tokens=_NEW, ignore_eos=True)
    model.engine.restart_counts()
