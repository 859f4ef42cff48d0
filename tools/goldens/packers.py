"""Matrices of golden models in the layouts of quantised checkpoints, by each layout's own library where it runs here.

compressed-tensors, bitsandbytes and transformers (fp8) pack and unpack themselves. AutoAWQ and GPTQModel need a GPU to
install or run: what they write is written here after their sources, element by element, apart from cuplama's readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

__all__ = ["pack_awq", "pack_bitsandbytes", "pack_compressed", "pack_fp8", "pack_gptq", "pack_mxfp4"]

Settings = Mapping[str, Any]
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


# ---- compressed-tensors ----------------------------------------------------------------------------------------------
def scheme_of(module: str, settings: Settings) -> tuple[QuantizationScheme, str]:
    """The config_group of a module and its format."""
    groups = [QuantizationScheme.model_validate(g) for g in settings["config_groups"].values()]
    kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
    by_name = [g for g in groups if any(t.startswith("re:") and re.match(t[3:], module) for t in g.targets)]
    scheme = [*by_name, *(g for g in groups if kind in g.targets)][0]
    return scheme, scheme.format or settings["format"]


def extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number of what shares a scale, in the shape of scales."""
    m, k = weight.shape
    if args.strategy == "block":
        height, width = args.block_structure
        filled = torch.nn.functional.pad(weight, (0, -k % width, 0, -m % height))
        parts = filled.reshape(-(-m // height), height, -1, width)
        return parts.amin((1, 3)), parts.amax((1, 3))
    if args.strategy == "tensor":
        return weight.min()[None], weight.max()[None]
    parts = weight.reshape(m, -1, args.group_size if args.strategy == "group" else k)
    return parts.amin(-1), parts.amax(-1)


def pack_compressed(module: str, weight: torch.Tensor, settings: Settings) -> Packed:
    """The library's own compressor; scales are in the weight's dtype, bfloat16."""
    scheme, form = scheme_of(module, settings)
    args = scheme.weights
    state = {"weight": weight.bfloat16()}
    source = state["weight"]
    if args.actorder == "group":
        k = weight.shape[1]
        order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        state["weight_g_idx"] = torch.empty(k, dtype=torch.int32)
        state["weight_g_idx"][order] = torch.arange(k, dtype=torch.int32) // args.group_size
        source = source[:, torch.argsort(state["weight_g_idx"], stable=True)]
    state["weight_scale"], state["weight_zero_point"] = calculate_qparams(*extremes(source, args), args)
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        state["input_scale"] = torch.tensor([0.02], dtype=torch.bfloat16)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    exact = {**stored, "weight_scale": stored["weight_scale"].float()}
    if args.strategy == "block":  # the compressor takes blocks of one column for channels
        numbers = dequantize(stored["weight"], exact["weight_scale"], args=args, dtype=torch.float32)
    else:
        numbers = compressor.decompress(exact, scheme)["weight"].float()
    return {f".{end}": t for end, t in stored.items()}, numbers


# ---- fp8 -------------------------------------------------------------------------------------------------------------
def pack_fp8(module: str, weight: torch.Tensor, settings: Settings) -> Packed:
    """transformers' own operations. They refuse sizes that 128 does not divide: those are filled up, then cut."""
    block = settings["weight_block_size"]
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt="float"))
    m, k = weight.shape
    filled = weight if block is None else torch.nn.functional.pad(weight, (0, -k % block[1], 0, -m % block[0]))
    found = Fp8Quantize(quantizer).convert({"x.weight": filled})
    values, scale = found["x.weight"], found["x.weight_scale_inv"]
    numbers = Fp8Dequantize(quantizer).convert({"weight": values, "weight_scale_inv": scale})["weight"]
    stored = {".weight": values[:m, :k].contiguous(), ".weight_scale_inv": scale}
    if block is None:
        stored |= {".weight_scale_inv": scale.reshape(()), ".activation_scale": torch.tensor(0.02)}
    return stored, numbers[:m, :k].float()


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------
def pack_bitsandbytes(module: str, weight: torch.Tensor, settings: Settings) -> Packed:
    """The library's own functions, on the CPU."""
    if settings["load_in_8bit"]:
        codes, largest, _ = bnb.int8_vectorwise_quant(weight.half())
        stored = {".weight": codes, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
        return stored, bnb.int8_vectorwise_dequant(codes, largest).float()
    nested = settings["bnb_4bit_use_double_quant"]
    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    stored = {".weight": codes, **{f".weight.{end}": t for end, t in state.as_dict(packed=True).items()}}
    state.dtype = torch.float32
    return stored, bnb.dequantize_4bit(codes, state).float()


# ---- AWQ and GPTQ ----------------------------------------------------------------------------------------------------
def quantised(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zero points [in / group, out] and scales float16 [in / group, out], rounded to nearest."""
    w = weight.numpy().T.astype(np.float32)
    parts = w.reshape(-1, group, w.shape[1])
    low, high, top = np.minimum(parts.min(1), 0), np.maximum(parts.max(1), 0), (1 << bits) - 1
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = ((high - low) / top).astype(np.float16)
    zero = np.full(scale.shape, 1 << (bits - 1)) if symmetric else np.clip(np.round(-low / scale), 0, top).astype(int)
    spread_scale, spread_zero = (np.repeat(x, group, 0).astype(np.float32) for x in (scale, zero))
    return np.clip(np.round(w / spread_scale) + spread_zero, 0, top).astype(np.int64), zero, scale


def words(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.uint32)


def pack_awq(module: str, weight: torch.Tensor, settings: Settings) -> Packed:
    """As WQLinear_GEMM.from_linear of AutoAWQ, awq/modules/linear/gemm.py."""
    group = settings["group_size"]
    codes, zero, scale = quantised(weight, 4, group, symmetric=False)
    packed = []
    for numbers in (codes, zero):
        out = words((len(numbers), numbers.shape[1] // 8))
        for column in range(out.shape[1]):
            for i, place in enumerate(AWQ_COLUMNS):
                out[:, column] |= numbers[:, column * 8 + place].astype(np.uint32) << np.uint32(i * 4)
        packed.append(torch.from_numpy(out.view(np.int32)))
    numbers = (codes - np.repeat(zero, group, 0)) * np.repeat(scale, group, 0).astype(np.float32)
    stored = {".qweight": packed[0], ".qzeros": packed[1], ".scales": torch.from_numpy(scale)}
    return stored, torch.from_numpy(np.ascontiguousarray(numbers.T.astype(np.float32)))


def pack_gptq(module: str, weight: torch.Tensor, settings: Settings) -> Packed:
    """As QuantLinear.pack of GPTQModel, gptqmodel/nn_modules/qlinear/__init__.py."""
    bits, k = settings["bits"], weight.shape[1]
    group = k if settings["group_size"] == -1 else settings["group_size"]
    order = np.random.default_rng(k).permutation(k) if settings["desc_act"] else np.arange(k)
    g_idx = np.empty(k, np.int32)
    g_idx[order] = np.arange(k) // group
    sorted_codes, zero, scale = quantised(weight[:, torch.from_numpy(order)], bits, group, settings["sym"])
    codes = np.empty_like(sorted_codes)
    codes[order] = sorted_codes
    each = 32 // bits
    qweight = words((k // each, codes.shape[1]))
    for row in range(k):
        qweight[row // each] |= codes[row].astype(np.uint32) << np.uint32(bits * (row % each))
    less = 1 if settings.get("checkpoint_format", "gptq") == "gptq" else 0
    kept = (zero - less) & ((1 << bits) - 1)
    qzeros = words((len(zero), zero.shape[1] // each))
    for column in range(zero.shape[1]):
        qzeros[:, column // each] |= kept[:, column].astype(np.uint32) << np.uint32(bits * (column % each))
    numbers = (codes - zero[g_idx]) * scale.astype(np.float32)[g_idx]
    stored = {
        ".qweight": torch.from_numpy(qweight.view(np.int32)),
        ".qzeros": torch.from_numpy(qzeros.view(np.int32)),
        ".scales": torch.from_numpy(scale),
        ".g_idx": torch.from_numpy(g_idx),
    }
    return stored, torch.from_numpy(np.ascontiguousarray(numbers.T.astype(np.float32)))


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pack_mxfp4(module: str, weight: torch.Tensor, settings: Settings) -> Packed:
    """Of all experts, weight [E, out, in]: the nearest codes, and powers of two under which the largest becomes 4 to 8.
    The numbers are those that transformers makes of them."""
    experts, m, k = weight.shape
    groups = weight.reshape(experts, m, k // 32, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    ratios = groups / 2.0 ** exponents[..., None]
    codes = (ratios.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (ratios < 0)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = (exponents + 127).to(torch.uint8)
    numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"_blocks": blocks, "_scales": scales}, numbers.transpose(1, 2)
