"""Seconds from a folder to a model: ``python -m benchmarks.load_folder FOLDER [--runs 3] [--out FILE]``.

Writes a checkpoint of the shape of Llama-3.1-8B in AutoAWQ's layout to FOLDER, of random bytes, unless it is there: 4
bits in groups of 128, 5.7 GB, embedding and head in float16. Each run is a process of its own that loads it, its pages
in memory, and draws a token; ``load`` is the time of ``cuplama.load`` until the weights are on the device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.record import record
from cuplama.models.presets import find_shape

LAYERS_A_SHARD = 8
QUANTIZATION = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
RUN = """
import json, sys, time
began = time.perf_counter()
import cuplama
imported = time.perf_counter()
model = cuplama.load(sys.argv[1], device="cuda", context=512)
model.backend.synchronize()
loaded = time.perf_counter()
text = model.generate([1, 2, 3], max_tokens=1, temperature=0)
print(json.dumps({"import": imported - began, "load": loaded - imported, "token": time.perf_counter() - loaded}))
"""


def write(folder: Path) -> None:
    """The checkpoint. Scales are positive and small; zero points and codes are any."""
    _, config = find_shape("llama-3.1-8b")
    rng, d, f, kv = np.random.default_rng(0), config.hidden_size, config.intermediate_size, 1024
    noise = rng.integers(0, 1 << 32, 1 << 26, dtype=np.uint32).view(np.int32)  # repeated: the values do not matter

    def bits(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return np.resize(noise, (rows, columns))

    def linear(name: str, k: int, m: int) -> dict[str, np.ndarray[Any, Any]]:
        scales = np.full((k // 128, m), 0.002, np.float16)
        return {
            f"{name}.qweight": bits(k, m // 8), f"{name}.qzeros": bits(k // 128, m // 8), f"{name}.scales": scales,
        }  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, np.ndarray[Any, Any]]] = {"ends": {}}
    table = (rng.standard_normal((1 << 24,), np.float32) * 0.02).astype(np.float16)
    shards["ends"]["model.embed_tokens.weight"] = np.resize(table, (config.vocab_size, d))
    shards["ends"]["lm_head.weight"] = np.resize(table, (config.vocab_size, d))
    shards["ends"]["model.norm.weight"] = np.ones(d, np.float16)
    for i in range(config.num_layers):
        at, layer = shards.setdefault(f"layers-{i // LAYERS_A_SHARD}", {}), f"model.layers.{i}"
        for name, k, m in (
            ("self_attn.q_proj", d, d), ("self_attn.k_proj", d, kv), ("self_attn.v_proj", d, kv),
            ("self_attn.o_proj", d, d), ("mlp.gate_proj", d, f), ("mlp.up_proj", d, f), ("mlp.down_proj", f, d),
        ):  # fmt: skip
            at |= linear(f"{layer}.{name}", k, m)
        at |= {
            f"{layer}.{name}.weight": np.ones(d, np.float16) for name in ("input_layernorm", "post_attention_layernorm")
        }
    where: dict[str, str] = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"model-{shard}.safetensors")
        where |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    raw = {**config.raw, "torch_dtype": "float16", "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        write(args.folder)
    size = sum(p.stat().st_size for p in args.folder.glob("*.safetensors")) / 1e9
    rows = []
    for _ in range(args.runs):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(args.folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append({"gigabytes": size, **json.loads(done.stdout)})
        print(json.dumps(rows[-1]), flush=True)
    record(rows, args.out)


if __name__ == "__main__":
    main()
