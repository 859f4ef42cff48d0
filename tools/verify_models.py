"""Whole models on a GPU: ``python -m tools.verify_models --out FOLDER [--stories FOLDER] [--big CONFIG]``.

- goldens: float32 logits and greedy tokens of every family against transformers; the KL of bf16 and fp16 runs beside
  that of transformers' own; plain steps, captured steps and a ragged batch (``golden_figures.py``).
- stories (a stories260K folder beside its expected.txt): the published text; sampled text equal on NumPy and CUDA.
- endurance: load, generate, close, many times over; many tokens: no memory may be lost.
- big (a folder with a config.json): random weights of that shape, written to a file, loaded and run.

Writes ``models.json`` and ``models.txt``; exit status 1 if a demand is not met.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.models.config import load_config
from cuplama.ops.signature import dim_value
from tools.golden_figures import Golden, figures_16_bit, figures_float32, met_16_bit, met_float32
from tools.verify import environment

__all__ = ["big", "endurance", "golden", "golden_line", "main", "stories"]

CASES = Path(__file__).resolve().parents[1] / "tests" / "golden" / "cases"


def golden(case: Path, device: str = "cuda") -> dict[str, Any]:
    """One golden model in three dtypes."""
    data = Golden(case)
    with data.load(device) as model:
        row: dict[str, Any] = {"case": case.name, **figures_float32(data, model)}
    row["ok"] = met_float32(row)
    for dtype in ("bfloat16", "float16"):
        with data.load(device, dtype) as model:
            row[dtype] = figures_16_bit(data, model, dtype)
        row["ok"] = row["ok"] and met_16_bit(row[dtype])
    return row


def golden_line(row: dict[str, Any]) -> str:
    """What ``golden`` found, for people."""
    same = row["alone"] and row["batch"] and row["plain"] and row["pieces"]
    logits = max(row[name] for name in ("logits", "steps", "chunks"))
    text = f"{row['case']:<22} logits {logits:.1e} {'tokens equal' if same else f'TOKENS DIFFER {row}'}"
    for dtype in ("bfloat16", "float16"):
        r = row[dtype]
        text += f" {dtype} KL {r['whole']:.1e}, by fused steps {r['steps']:.1e} (transformers {r['transformers']:.1e})"
        text += "" if r["compared"] == 1 else f" of {r['compared']:.0%} of the tokens"
        text += "" if met_16_bit(r) else " LARGER"
    return text


def stories(folder: Path) -> dict[str, Any]:
    """The published continuation, and the same samples on NumPy and CUDA."""
    expected = folder.with_name(f"{folder.name}.expected.txt").read_text(encoding="utf-8")
    sampled: dict[str, Any] = {"max_tokens": 100, "temperature": 1.0, "top_p": 0.95, "top_k": 40, "ignore_eos": True}
    texts: dict[str, list[list[int]]] = {}
    found: dict[str, Any] = {}
    for device in ("numpy", "cuda"):
        with cuplama.load(folder, device=device, dtype="float32") as model:
            found[f"greedy_{device}"] = model.generate("", max_tokens=200, temperature=0.0).text == expected
            texts[device] = [model.generate("Once upon a time", seed=s, **sampled).tokens for s in range(20)]
    found["equal_samples"] = sum(a == b for a, b in zip(*texts.values(), strict=True))
    found["ok"] = found["greedy_numpy"] and found["greedy_cuda"] and found["equal_samples"] == 20
    return found


def used() -> tuple[int, int]:
    """Bytes in use: of the GPU, by everybody; of anonymous host memory, by this process."""
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return total - free, int(line.split()[1]) * 1024
    return total - free, 0


def endurance(folder: Path, cycles: int, tokens: int) -> dict[str, Any]:
    """Memory after many loads and after many tokens, against memory after the first few."""

    def cycle() -> None:
        with cuplama.load(folder, device="cuda") as model:
            model.generate("Once upon a time" if (folder / "tokenizer.json").exists() else [1, 2], max_tokens=8, seed=1)

    for _ in range(5):
        cycle()
    gc.collect()
    device, host = used()
    began = time.perf_counter()
    for _ in range(cycles):
        cycle()
    gc.collect()
    after_device, after_host = used()
    found: dict[str, Any] = {
        "cycles": cycles,
        "seconds_per_cycle": round((time.perf_counter() - began) / cycles, 4),
        "device_bytes_lost": after_device - device,
        "host_bytes_lost": after_host - host,
    }
    with cuplama.load(folder, device="cuda") as model:
        prompt = model.encode("Once upon a time")
        each = model.context - len(prompt)
        model.generate(prompt, max_tokens=each, ignore_eos=True, seed=0)
        device, host = used()
        done = 0
        while done < tokens:
            done += len(model.generate(prompt, max_tokens=each, ignore_eos=True, seed=done).tokens)
        gc.collect()
        after_device, after_host = used()
    found |= {"tokens": done, "device_growth": after_device - device, "host_growth": after_host - host}
    # Host memory may move by what the allocator keeps; a leak of one small object per cycle or token would exceed this.
    found["ok"] = (
        found["device_bytes_lost"] <= 0
        and found["device_growth"] <= 0
        and found["host_bytes_lost"] < 64 << 20
        and found["host_growth"] < 16 << 20
    )
    return found


def write_random(config_folder: Path, folder: Path) -> int:
    """A checkpoint of that shape with random bf16 weights, one safetensors file per layer. Returns its bytes."""
    import cupy

    config = load_config(config_folder)
    shutil.copy(config_folder / "config.json", folder / "config.json")
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, recipe in config.recipes().items():
        if name == "lm_head" and config.raw.get("tie_word_embeddings"):
            continue
        dims = config.dims(name)
        for shape, tensor in recipe.parts:
            shard = f"model-{name.split('.')[0]}.safetensors"
            shards.setdefault(shard, []).append((tensor, tuple(dim_value(d, dims) for d in shape.split(","))))
    total = 0
    places: dict[str, str] = {}
    for shard, tensors in shards.items():
        header: dict[str, Any] = {}
        at = 0
        for tensor, sizes in tensors:
            size = 2 * math.prod(sizes)
            header[tensor] = {"dtype": "BF16", "shape": sizes, "data_offsets": [at, at + size]}
            at += size
            places[tensor] = shard
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / shard).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, sizes in tensors:
                count = math.prod(sizes)
                if len(sizes) == 1:
                    f.write(np.full(count, 0x3F80, np.uint16).tobytes())  # norms: 1.0
                    continue
                values = cupy.random.standard_normal(count, dtype=cupy.float32) * np.float32(0.02)
                f.write(cupy.asnumpy((values.view(cupy.uint32) >> 16).astype(cupy.uint16)).data)
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    cupy.get_default_memory_pool().free_all_blocks()
    return total


def big(config_folder: Path, out: dict[str, Any]) -> dict[str, Any]:
    """Load and generate with random weights of a large shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        size = write_random(config_folder, folder)
        out["write_seconds"] = round(time.perf_counter() - began, 2)
        peak = 0
        start = used()[1]

        def progress(done: int, total: int) -> None:
            nonlocal peak
            peak = max(peak, used()[1] - start)

        began = time.perf_counter()
        model = cuplama.load(folder, device="cuda", context=4096, progress=progress)
        model.backend.synchronize()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - began
        with model:
            prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 128).tolist()
            for captures in (False, True):
                model.backend.captures = captures
                model.generate(prompt, max_tokens=16, temperature=0.0, ignore_eos=True)
                c = model.generate(prompt, max_tokens=256 if captures else 32, temperature=0.0, ignore_eos=True)
                way = "captured" if captures else "plain"
                out[f"tokens_per_second_{way}"] = round(c.timings.decode_rate, 2)
                out[f"first_token_ms_{way}"] = round(c.timings.prompt_seconds * 1e3, 2)
        out |= {
            "bytes": size,
            "load_seconds": round(seconds, 2),
            "load_gb_per_s": round(size / seconds / 1e9, 2),
            "host_bytes_above_file": peak,
        }
    out["ok"] = peak < 2e9
    return out


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for models.json and models.txt")
    parser.add_argument("--stories", type=Path, help="folder of stories260K")
    parser.add_argument("--big", type=Path, help="folder with the config.json of a large model")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--skip-goldens", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(["python -m tools.verify_models", *sys.argv[1:]])}
    lines: list[str] = []

    def section(name: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            result[name] = work()
        except Exception as e:  # the other sections still say something
            result[name] = {"ok": False, "error": f"{type(e).__name__}: {e}"}
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)

    backend = CudaBackend("f32")
    result["environment"] = environment(backend)
    backend.close()
    if not args.skip_goldens:
        section("goldens", lambda: [golden(c) for c in sorted(CASES.iterdir())])
        if isinstance(result["goldens"], list):
            lines += map(golden_line, result["goldens"])
    if args.stories:
        section("stories", lambda: stories(args.stories))
        section("endurance", lambda: endurance(args.stories, args.cycles, args.tokens))
    if args.big:
        found: dict[str, Any] = {}
        section("big", lambda: big(args.big, found))
    lines += [f"{k}: {json.dumps(v)}" for k, v in result.items() if k != "goldens"]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "models.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.out / "models.txt").write_text(text, encoding="utf-8")
    sections = [v for k, v in result.items() if k not in ("command", "environment")]
    rows = [r for v in sections for r in (v if isinstance(v, list) else [v])]
    return int(not all(r["ok"] for r in rows))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    sys.exit(main())
