"""Text to tokens without keeping other threads from running."""

from __future__ import annotations

import threading
import time

from cuplama.hub import find_model
from cuplama.text.encoding import encoding
from cuplama.text.tokenizer import Tokenizer

LONG = "Once upon a time there was a little girl. " * 8000  # 0.1 s


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer = Tokenizer.load(find_model(None, True))
    pauses, over = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    tokenizer.encode(LONG)
    took = time.perf_counter() - begin
    over.set()
    thread.join()
    assert max(pauses) < took / 2


def test_a_long_text_has_the_tokens_that_it_has_otherwise() -> None:
    backend = Tokenizer.load(find_model(None, True))._backend
    for special in (False, True):
        here, plain = encoding(backend, LONG, special=special), backend.encode(LONG, add_special_tokens=special)
        assert (here.ids, here.offsets) == (plain.ids, plain.offsets)
        assert here.special_tokens_mask == plain.special_tokens_mask
