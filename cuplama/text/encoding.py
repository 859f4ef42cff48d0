"""The one call that turns text into tokens, which lets other threads run meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

__all__ = ["encoding"]

_LONG = 4096  # characters that take about 1 ms


def encoding(backend: tokenizers.Tokenizer, text: str, *, special: bool = False) -> tokenizers.Encoding:
    """What ``tokenizers`` makes of a text; with ``special`` its post-processor adds BOS and the like.

    ``encode`` keeps Python's lock while it works, a second for two megabytes of text, ``encode_batch`` does not: a
    server can go on answering. For short texts the batch's threads are not worth it.
    """
    if len(text) < _LONG:
        return backend.encode(text, add_special_tokens=special)
    return backend.encode_batch([text], add_special_tokens=special)[0]
