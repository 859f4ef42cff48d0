"""Where a decode step spends its time: ``python -m benchmarks.profile_decode [SHAPE ...]``.

For each shape, with random weights: tokens/s over 128 tokens after a prompt of 128, and the GPU time of every kernel
over 32 steps as CUPTI records it, inside the captured graph. Needs PyTorch, for its profiler alone.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from cuplama.lab.dummy import dummy_model

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def profile(shape: str, rows: int) -> None:
    """Print the speed of a shape, and the ``rows`` kernels that take most of the time."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with dummy_model(shape, "cuda", "bfloat16", 4096, 4096) as model:
        prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 128).tolist()
        model.generate(prompt, max_tokens=16, **GREEDY)
        timings = model.generate(prompt, max_tokens=128, **GREEDY).timings
        print(f"{shape} tok/s {timings.decode_rate} ttft ms {timings.prompt_seconds * 1e3}")
        with record(activities=[ProfilerActivity.CUDA]) as trace:
            model.generate(prompt, max_tokens=33, **GREEDY)
    found: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name[:90], []).append(event.device_time)
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"{sum(times) / 1e3:9.3f} ms {len(times):6d} x {sum(times) / len(times):8.2f} us  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--rows", type=int, default=22, help="kernels to show")
    args = parser.parse_args()
    for shape in args.shapes:
        profile(shape, args.rows)


if __name__ == "__main__":
    main()
