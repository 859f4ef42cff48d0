"""What structured output costs the host: ``python -m benchmarks.masks FOLDER [--out FILE]``.

FOLDER has a tokenizer.json. Seconds to read the vocabulary, once a model; to compile a schema that is new, and one that
was compiled; microseconds of a mask, while a text is written that draws among what each mask allows: for a schema of a
few properties, a regular expression, and a format that is slow (email). One thread, the median and the most.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.engine.constraint import mask_words
from cuplama.sampling_params import SamplingParams
from cuplama.structured import Grammars
from cuplama.text.tokenizer import Tokenizer

_TAGS = {"type": "array", "items": {"type": "string"}}
_PERSON = {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": _TAGS}
FORMS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": {"type": "object", "properties": _PERSON, "required": ["name", "age"]}},
    "regex": {"regex": r"[A-Z][a-z]{2,20}( [A-Z][a-z]{2,20}){1,3}, \d{1,3}"},
    "email": {"json_schema": {"type": "string", "format": "email"}},
}


def measure(grammars: Grammars, vocab_size: int, form: dict[str, Any], texts: int) -> dict[str, float]:
    """Compile a form twice, and write that many texts of at most 64 tokens with it."""
    params, times = SamplingParams(**form), list[float]()
    began = time.perf_counter()
    grammars.constraint(params, ())
    new = time.perf_counter() - began
    began = time.perf_counter()
    grammars.constraint(params, ())
    known = time.perf_counter() - began
    rng, row = np.random.default_rng(0), np.zeros(mask_words(vocab_size), np.int32)
    for _ in range(texts):
        constraint = grammars.constraint(params, ())
        assert constraint is not None
        for _ in range(64):
            began = time.perf_counter()
            constraint.fill_mask(row)
            times.append(time.perf_counter() - began)
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab_size])
            constraint.accept(int(rng.choice(allowed)))
            if constraint.finished:
                break
    us = [1e6 * t for t in times]
    return {
        "compile_ms": 1e3 * new, "known_us": 1e6 * known, "masks": len(us), "mask_us_median": statistics.median(us),
        "mask_us_p99": float(np.percentile(us, 99)), "mask_us_most": max(us),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.folder)
    size = tokenizer.vocab_size
    grammars = Grammars(lambda: tokenizer, size, frozenset(() if tokenizer.eos is None else (tokenizer.eos,)))
    began = time.perf_counter()
    grammars.constraint(SamplingParams(regex="a"), ())
    found: dict[str, Any] = {
        "tokenizer": args.folder.name, "vocabulary": size, "python": platform.python_version(),
        "machine": platform.machine(), "vocabulary_seconds": time.perf_counter() - began,
    }  # fmt: skip
    found |= {name: measure(grammars, size, form, args.texts) for name, form in FORMS.items()}
    text = json.dumps(found, indent=1, default=lambda x: round(x, 3))
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
