"""The story model in PyTorch: a small Llama with a tied head, and the mean of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tools.story_model.data import Ids
from tools.story_model.runs import Run
from tools.story_model.tokenizer import END_OF_STORY_ID

__all__ = ["NORM_EPS", "ROPE_THETA", "Story", "ensemble", "load_model"]

NORM_EPS = 1e-5
ROPE_THETA = 10000.0


def rope_tables(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, 1, head_dim / 2], float32, of Llama's rotary embedding."""
    inverse = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.arange(length, device=device).float()[:, None] * inverse
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., tokens, heads, head_dim], the two halves of a head as in Llama."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):  # type: ignore[misc]
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, float32 inside and out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, NORM_EPS)


class Attention(nn.Module):  # type: ignore[misc]
    """Causal attention over [b, t, hidden] with shared KV heads and rotary embedding."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.dim = run.hidden // run.heads
        self.q_proj = nn.Linear(run.hidden, run.hidden, bias=False)
        self.k_proj = nn.Linear(run.hidden, run.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(run.hidden, run.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(run.hidden, run.hidden, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, t, heads, dim] and k, v [b, t, kv_heads, dim] of x [b, t, hidden]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x, cos, sin)
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):  # type: ignore[misc]
    """The gated block of Llama, SwiGLU, on [b, t, hidden]."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(run.hidden, run.mlp, bias=False)
        self.up_proj = nn.Linear(run.hidden, run.mlp, bias=False)
        self.down_proj = nn.Linear(run.mlp, run.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):  # type: ignore[misc]
    """One block of Llama: attention and MLP, each behind its norm, with dropout on what they add."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.dropout = run.dropout
        self.input_layernorm = RMSNorm(run.hidden)
        self.self_attn = Attention(run)
        self.post_attention_layernorm = RMSNorm(run.hidden)
        self.mlp = MLP(run)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Story(nn.Module):  # type: ignore[misc]
    """Llama with a tied head; its parameters have the names of the Hugging Face layout after `model.`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.embed_tokens = nn.Embedding(run.vocab, run.hidden)
        self.layers = nn.ModuleList(Layer(run) for _ in range(run.layers))
        self.norm = RMSNorm(run.hidden)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * run.layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [b, t, vocab] of ids [b, t]."""
        cos, sin = rope_tables(ids.shape[1], self.run.hidden // self.run.heads, ids.device)
        x = F.dropout(self.embed_tokens(ids), self.run.dropout, self.training)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def write(self, count: int, length: int, generator: torch.Generator) -> list[Ids]:
        """Sample `count` stories at temperature 1; those that do not end within `length` tokens are dropped."""
        run, device = self.run, self.embed_tokens.weight.device
        dim, dtype = run.hidden // run.heads, torch.bfloat16 if device.type == "cuda" else torch.float32
        cos, sin = rope_tables(length, dim, device)
        cache = torch.zeros(run.layers, 2, count, length, run.kv_heads, dim, device=device, dtype=dtype)
        ids = torch.full((count, length + 1), END_OF_STORY_ID, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        for t in range(length):
            x = self.embed_tokens(ids[:, t : t + 1])
            for layer, (keys, values) in zip(self.layers, cache, strict=True):
                q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cos[t : t + 1], sin[t : t + 1])
                keys[:, t], values[:, t] = k[:, 0], v[:, 0]
                q = q.view(count, run.kv_heads, -1, dim).to(dtype)
                score = torch.einsum("bkgd,btkd->bkgt", q, keys[:, : t + 1]) / math.sqrt(dim)
                mix = torch.einsum("bkgt,btkd->bkgd", score.float().softmax(-1).to(dtype), values[:, : t + 1])
                x = x + layer.self_attn.o_proj(mix.reshape(count, 1, -1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            logits = F.linear(self.norm(x[:, 0]), self.embed_tokens.weight).float()
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            ids[:, t + 1] = torch.where(done, END_OF_STORY_ID, drawn)
            done |= drawn == END_OF_STORY_ID
            if t % 32 == 31 and bool(done.all()):
                break
        rows = ids[done, 1:].cpu().numpy().astype(np.uint16)
        return [row[: int(np.argmax(row == END_OF_STORY_ID)) + 1] for row in rows]


def ensemble(models: Sequence[Story]) -> Callable[[Tensor], Tensor]:
    """ids [b, t] -> log of the mean of the models' probabilities [b, t, vocab], float32."""

    def log_mean(ids: Tensor) -> Tensor:
        total = models[0](ids).float().softmax(-1)
        for model in models[1:]:
            total += model(ids).float().softmax(-1)
        return (total / len(models)).clamp_min_(1e-9).log_()

    return log_mean


def load_model(path: Path, device: torch.device) -> Story:
    """The model of a NAME.pt that `train` wrote, without dropout."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model: Story = Story(replace(Run(**saved["run"]), dropout=0.0)).to(device).eval()
    model.load_state_dict(saved["state"])
    return model
