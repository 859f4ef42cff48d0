"""Where a model's time goes on a GPU, kernel by kernel: ``python -m benchmarks.profile_kernels [SHAPE ...]``.

For each shape, with random weights: tokens/s after a prompt of 128, and the GPU time of every kernel over 32 decode
steps; with ``--prompt N`` the same of passes of N tokens. CUPTI records it inside the captured graphs. Needs PyTorch,
for its profiler alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from cuplama.lab.dummy import dummy_model
from cuplama.model import Model

OPTIONS: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
PROMPT, STEPS = 128, 32
PASSES = 3  # of --prompt that are recorded, after as many that plan and capture


def _steps(model: Model, sequences: int) -> Callable[[], None]:
    """32 decode steps of so many sequences. Prints their speed over 128."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (sequences, PROMPT)).tolist()
    model.generate(prompts, max_tokens=16, **OPTIONS)
    timings = model.generate(prompts, max_tokens=128, **OPTIONS)[0].timings
    print(f"{sequences} sequences: {timings.decode_rate:.1f} tokens/s")

    def run() -> None:
        model.generate(prompts, max_tokens=STEPS + 1, **OPTIONS)

    return run


def _passes(model: Model, tokens: int) -> Callable[[], None]:
    """Passes over so many tokens. Prints their speed."""
    rng = np.random.default_rng(0)

    def run() -> None:
        for prompt in rng.integers(0, model.config.vocab_size, (PASSES, tokens)).tolist():
            seconds.append(model.generate(prompt, max_tokens=1, **OPTIONS).timings.prompt_seconds)

    seconds: list[float] = []
    run()
    run()
    print(f"prompt of {tokens}: {tokens / min(seconds):.0f} tokens/s")
    return run


def profile(run: Callable[[], None], rows: int) -> None:
    """Print the ``rows`` kernels that take most of the time of a run."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as trace:
        run()
    found: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name[:110], []).append(event.device_time)
    whole = sum(map(sum, found.values()))
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:rows]:
        share = sum(times) / whole
        print(f"{sum(times) / 1e3:9.3f} ms {share:5.1%} {len(times):6d} x {sum(times) / len(times):8.2f} us  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--weight-format", default="", help='such as "mxfp4 experts"; by default the dtype')
    parser.add_argument("--sequences", type=int, nargs="*", default=[1], help="that decode at a time")
    parser.add_argument("--prompt", type=int, nargs="*", default=[], help="tokens of prompts whose passes are recorded")
    parser.add_argument("--rows", type=int, default=22, help="kernels to show")
    args = parser.parse_args()
    room = 4096 + max([512 * n for n in args.sequences] + [2 * PASSES * n for n in args.prompt])
    for shape in args.shapes:
        with dummy_model(shape, "cuda", "bfloat16", 4096, room, args.weight_format) as model:
            print(shape, args.weight_format)
            for sequences in args.sequences:
                profile(_steps(model, sequences), args.rows)
            for tokens in args.prompt:
                profile(_passes(model, tokens), args.rows)


if __name__ == "__main__":
    main()
