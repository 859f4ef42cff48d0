"""Train the story model of `weights/`: a small Llama on TinyStories, with PyTorch (needed here and nowhere else).

The corpus is small (4 million tokens), so the limit is overfitting, not compute. The recipe therefore is:

1. `prepare`  trains the tokenizer and encodes the corpora; the last 2 % of the stories are held out.
2. `search`   trains several models at once on one GPU: teachers, larger than what fits in `weights/`, and, for
              the record, models of the final size on the text alone.
3. `distill`  lets the best teachers write new stories and trains the final size to predict what the ensemble
              of teachers predicts, on the corpus and on the new stories (Hinton et al. 2015; Kim & Rush 2016).
4. `export`   writes the model with the least held-out loss in the Hugging Face layout.

Runs end at a wall-clock limit: the schedule follows the larger of the fraction of steps and that of the time.
Hidden matrices are trained with Muon (Jordan et al. 2024), the embedding and the norms with AdamW.
"""

import argparse
import contextlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from tools.story_tokenizer import (
    END_OF_STORY_ID,
    encode,
    read_stories,
    restore_case,
    save_tokenizer,
    train_tokenizer,
    usual_case,
)
from tokenizers import Tokenizer
from torch import Tensor, nn

Ids = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]
NORM_EPS = 1e-5
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Run:
    """One training run: architecture, data and optimisation. Sizes in tokens, channels and stories."""

    name: str
    vocab: int = 4096
    hidden: int = 256
    layers: int = 9
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 704
    context: int = 1024
    batch: int = 32768  # tokens per step
    epochs: float = 12.0
    optimizer: str = "muon"
    lr: float = 0.02  # of the matrices under Muon
    adam_lr: float = 0.004  # of embedding and norms; of everything under AdamW
    weight_decay: float = 0.1
    dropout: float = 0.1
    bpe_dropout: float = 0.0  # half of the stories of an epoch are re-encoded with this merge dropout
    extra: bool = True  # the lower-cased corpus with its case restored
    tales: bool = False  # the other corpora
    teachers: tuple[str, ...] = ()
    written: float = 0.0  # share of batches from stories that the teachers wrote
    text_loss: float = 0.15  # weight of the plain loss beside the teachers', on batches of the corpus
    seed: int = 0


_BIG: Mapping[str, Any] = {"hidden": 512, "layers": 6, "kv_heads": 4, "mlp": 1408, "epochs": 16.0}

# What `search` trains, all at once.
SEARCH: tuple[Run, ...] = (
    Run("teacher-512x6", **_BIG, dropout=0.15, weight_decay=0.1),
    Run("teacher-512x6-reg", **_BIG, dropout=0.2, weight_decay=0.3, seed=1),
    Run("teacher-512x6-tales", **_BIG, dropout=0.15, weight_decay=0.2, tales=True, seed=2),
    Run("teacher-512x6-bpedrop", **_BIG, dropout=0.15, weight_decay=0.2, bpe_dropout=0.1, seed=3),
    Run("small-256x9", epochs=6),
    Run("small-256x9-noextra", epochs=6, extra=False),
    Run("small-256x9-adamw", epochs=6, optimizer="adamw", adam_lr=0.003),
    Run("small-256x9-nodrop", epochs=6, dropout=0.0),
    Run("small-256x9-vocab2048", epochs=6, vocab=2048),
    Run("small-384x4", epochs=6, hidden=384, layers=4, heads=6, kv_heads=2, mlp=960),
)
TEACHERS = 3  # the best this many form the ensemble

# What `distill` trains, all at once.
STUDENTS: tuple[Run, ...] = (
    Run("student-256x9", written=0.5, dropout=0.0, weight_decay=0.05, epochs=60),
    Run("student-384x4", written=0.5, dropout=0.0, weight_decay=0.05, epochs=60, hidden=384, layers=4, heads=6,
        kv_heads=2, mlp=960),
)  # fmt: skip

ALL_RUNS = {run.name: run for run in SEARCH + STUDENTS}


# --- model ------------------------------------------------------------------------------------------------


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
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, NORM_EPS)


class Attention(nn.Module):  # type: ignore[misc]
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
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(run.hidden, run.mlp, bias=False)
        self.up_proj = nn.Linear(run.hidden, run.mlp, bias=False)
        self.down_proj = nn.Linear(run.mlp, run.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):  # type: ignore[misc]
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


# --- optimisers -------------------------------------------------------------------------------------------


def orthogonalize(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of g [n, rows, cols], roughly: Newton-Schulz steps of Muon, in bf16."""
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum, orthogonalised per matrix (Jordan et al. 2024), with decoupled weight decay."""

    def __init__(self, params: Sequence[nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        shapes = dict.fromkeys(p.shape for p in params)
        self.groups = [[p for p in params if p.shape == shape] for shape in shapes]
        self.moments = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, lr: float) -> None:
        for group, moment in zip(self.groups, self.moments, strict=True):
            grad = torch.stack([p.grad for p in group])
            moment.lerp_(grad, 1 - self.momentum)
            update = orthogonalize(grad.lerp(moment, self.momentum))
            rows, cols = update.shape[-2:]
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * math.sqrt(max(1.0, rows / cols)))


class Optimizer:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all; one schedule scales both."""

    def __init__(self, model: Story, run: Run) -> None:
        self.run = run
        hidden = [p for p in model.layers.parameters() if p.ndim == 2] if run.optimizer == "muon" else []
        taken = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in taken]
        self.muon = Muon(hidden, run.weight_decay)
        groups = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": run.weight_decay},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=run.adam_lr, betas=(0.9, 0.98), fused=rest[0].is_cuda)

    def step(self, scale: float) -> None:
        self.muon.step(self.run.lr * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.run.adam_lr * scale
        self.adam.step()
        for p in [*(p for g in self.muon.groups for p in g), *(q for h in self.adam.param_groups for q in h["params"])]:
            p.grad = None


def schedule(progress: float) -> float:
    """Warm-up over 2 %, constant to 30 %, then linear to zero."""
    return max(0.0, min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / 0.7))


# --- data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What `prepare` wrote for one vocabulary: parts `main`, `extra`, `tales`, `held`, `val` as (ids, offsets)."""

    parts: Mapping[str, tuple[Ids, Offsets]]
    bytes: Mapping[str, int]
    tokenizer: Tokenizer
    main_text: Sequence[str]

    @classmethod
    def load(cls, folder: Path, vocab: int) -> "Data":
        at = folder / f"vocab{vocab}"
        arrays = np.load(at / "data.npz")
        names = sorted({n.split("_")[0] for n in arrays.files})
        parts = {n: (arrays[f"{n}_ids"], arrays[f"{n}_offsets"]) for n in names}
        text = json.loads((folder / "main.json").read_text())
        tokenizer = Tokenizer.from_file(str(at / "tokenizer.json"))
        return cls(parts, json.loads((folder / "bytes.json").read_text()), tokenizer, text)

    def train(self, run: Run) -> tuple[Ids, Offsets]:
        names = ["main", *(["extra"] if run.extra else []), *(["tales"] if run.tales else [])]
        return join([self.parts[n] for n in names])


def join(parts: Sequence[tuple[Ids, Offsets]]) -> tuple[Ids, Offsets]:
    lengths = np.concatenate([np.diff(o) for _, o in parts])
    return np.concatenate([i for i, _ in parts]), np.concatenate([[0], np.cumsum(lengths)])


def rows(ids: Ids, offsets: Offsets, length: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """One epoch [n, length + 1]: the stories in a new order, cut into rows that begin anywhere.

    Every second row is moved to the next beginning of a story, so that its first token is the separator: the
    model sees both what generation gives it and what a window inside a long text gives it.
    """
    order = rng.permutation(len(offsets) - 1)
    stream = np.concatenate([[END_OF_STORY_ID], *(ids[offsets[i] : offsets[i + 1]] for i in order)]).astype(np.int32)
    starts = np.arange(rng.integers(length), len(stream) - 2 * length - 1, length)
    separators = np.flatnonzero(stream == END_OF_STORY_ID)
    moved = separators[np.searchsorted(separators, starts[::2])]
    starts[::2] = np.minimum(moved, len(stream) - length - 1)
    return stream[rng.permutation(starts)[:, None] + np.arange(length + 1)]


def batches(data: Data, run: Run, parts: tuple[Ids, Offsets]) -> Iterator[npt.NDArray[np.int32]]:
    """Endless batches [batch / context, context + 1]; under BPE dropout, half of the main stories are re-encoded."""
    rng = np.random.default_rng(run.seed)
    tokenizer = Tokenizer.from_str(data.tokenizer.to_str())
    if run.bpe_dropout:
        tokenizer.model.dropout = run.bpe_dropout
    n = run.batch // run.context

    def epoch() -> npt.NDArray[np.int32]:
        ids, offsets = parts
        if run.bpe_dropout:
            noisy = rng.permutation(len(data.main_text))[: len(data.main_text) // 2]
            keep = np.setdiff1d(np.arange(len(offsets) - 1), noisy)
            lengths = np.diff(offsets)[keep]
            kept = np.concatenate([ids[offsets[i] : offsets[i + 1]] for i in keep])
            again = encode(tokenizer, [data.main_text[i] for i in noisy])
            ids, offsets = join([(kept, np.concatenate([[0], np.cumsum(lengths)])), again])
        return rows(ids, offsets, run.context, rng)

    with ThreadPoolExecutor(1) as pool:  # the next epoch is made while this one trains
        coming: Future[npt.NDArray[np.int32]] = pool.submit(epoch)
        while True:
            now, coming = coming.result(), pool.submit(epoch)
            for i in range(0, len(now) - n + 1, n):
                yield now[i : i + n]


def windows(total: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored) over `total` tokens: each but the first is scored once, after up to `context`."""
    scored, begin = 1, 0
    while scored < total:
        end = min(begin + context, total)
        yield begin, end, scored
        scored, begin = end, max(begin, end - context + stride)


@torch.no_grad()  # type: ignore[untyped-decorator]
def nats(logits_of: Callable[[Tensor], Tensor], texts: Sequence[Ids], context: int, device: torch.device) -> float:
    """Sum of -ln p of every token but the first of each text, in windows of at most `context` tokens."""
    spans = [(t[b:e], s - b) for t in texts for b, e, s in windows(len(t), context, context // 2)]
    spans.sort(key=lambda s: len(s[0]))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(0, len(spans), 32):
        group = spans[i : i + 32]
        ids = np.zeros((len(group), max(len(s) for s, _ in group)), np.int64)
        wanted = np.full_like(ids, -100)
        for row, want, (span, first) in zip(ids, wanted, group, strict=True):
            row[: len(span)] = span
            want[first - 1 : len(span) - 1] = span[first:]
        logits = logits_of(torch.from_numpy(ids).to(device)).float()
        goal = torch.from_numpy(wanted).to(device)
        total += F.cross_entropy(logits.flatten(0, 1), goal.flatten(), ignore_index=-100, reduction="sum").double()
    return float(total)


def story_texts(part: tuple[Ids, Offsets]) -> list[Ids]:
    ids, offsets = part
    start = np.array([END_OF_STORY_ID], np.uint16)
    return [np.concatenate([start, ids[a:b]]) for a, b in itertools.pairwise(offsets)]


# --- training ---------------------------------------------------------------------------------------------


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    context: contextlib.AbstractContextManager[Any] = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda"
    )
    return context


def ensemble(models: Sequence[Story]) -> Callable[[Tensor], Tensor]:
    """ids [b, t] -> log of the mean of the models' probabilities [b, t, vocab], float32."""

    def log_mean(ids: Tensor) -> Tensor:
        total = models[0](ids).float().softmax(-1)
        for model in models[1:]:
            total += model(ids).float().softmax(-1)
        return (total / len(models)).clamp_min_(1e-9).log_()

    return log_mean


def load_model(path: Path, device: torch.device) -> Story:
    saved = torch.load(path, map_location=device, weights_only=True)
    model: Story = Story(replace(Run(**saved["run"]), dropout=0.0)).to(device).eval()
    model.load_state_dict(saved["state"])
    return model


def train(run: Run, data_folder: Path, out: Path, seconds: float, compile_layers: bool, max_steps: int) -> None:
    """Train `run`; write out/NAME.pt (the state with the least held-out loss) and out/NAME.json (the log)."""
    began = time.monotonic()
    device = device_of()
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    data = Data.load(data_folder, run.vocab)
    texts = {name: story_texts(data.parts[name]) for name in ("held", "val")}
    corpus = data.train(run)
    model = Story(run).to(device)
    scorer = Story(replace(run, dropout=0.0)).to(device).eval()
    scorer.load_state_dict(model.state_dict(), assign=True)  # the same weights; never compiled, for its many shapes
    teachers = [load_model(out / f"{name}.pt", device) for name in run.teachers]
    if compile_layers:
        # One layer at a time: quick to compile, and it fuses all that is between the matrix products.
        torch._dynamo.config.suppress_errors = True
        for layer in [layer for m in (model, *teachers) for layer in m.layers]:
            layer.compile(dynamic=False)
    optimizer = Optimizer(model, run)
    sources = [batches(data, run, corpus)]
    if run.written:
        arrays = np.load(out / "written.npz")
        sources.append(batches(data, replace(run, bpe_dropout=0.0), (arrays["ids"], arrays["offsets"])))
    steps = min(max_steps, int(run.epochs * len(corpus[0]) / run.batch))
    choose = np.random.default_rng(run.seed + 1)
    history: list[dict[str, float]] = []
    best, state, losses, origin = math.inf, {}, [], 0.0
    teach = ensemble(teachers)

    def bits(name: str) -> float:
        with autocast(device):
            total: float = nats(scorer, texts[name], run.context, device)
        return total / math.log(2) / data.bytes[name]

    step, progress, next_eval = 0, 0.0, 0.06
    while progress < 1:
        corpus_batch = not run.written or choose.random() >= run.written
        rows_now = torch.from_numpy(next(sources[0 if corpus_batch else 1])).to(device, torch.int64)
        ids, goal = rows_now[:, :-1], rows_now[:, 1:].flatten()
        with autocast(device):
            logp = model(ids).flatten(0, 1).float().log_softmax(-1)
            loss = F.nll_loss(logp, goal)
            if teachers:
                with torch.no_grad():
                    taught = teach(ids).flatten(0, 1).exp_()
                soft = -(taught * logp).sum(-1).mean()
                share = run.text_loss if corpus_batch else 0.0
                objective = share * loss + (1 - share) * soft
            else:
                objective = loss
        objective.backward()
        optimizer.step(schedule(progress))
        step += 1
        losses.append(loss.detach())
        if step == 3 or step % 10 == 0:  # also bounds how far the host runs ahead
            losses[-1].item()
            origin = origin or time.monotonic()
        limit = began + seconds
        spent = (time.monotonic() - origin) / max(limit - origin, 1e-3) if origin else 0.0
        progress = max(step / steps, spent)
        if progress >= min(next_eval, 1):
            held = bits("held")
            history.append({
                "step": step,
                "tokens": step * run.batch,
                "seconds": round(time.monotonic() - began, 1),
                "train_nats": round(float(torch.stack(losses).mean()), 4),
                "held_bits": round(held, 5),
            })  # fmt: skip
            losses, next_eval = [], next_eval + 0.06
            if held < best:
                best, state = held, {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    result = {
        "run": asdict(run),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_bits_per_byte": round(best, 5),
        "val_bits_per_byte": round(bits("val"), 5),
        "epochs": round(step * run.batch / len(corpus[0]), 2),
        "history": history,
    }
    torch.save({"run": asdict(run), "state": state}, out / f"{run.name}.pt")
    (out / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result), flush=True)


def summary(result: Mapping[str, Any]) -> str:
    last = result["history"][-1]
    return (
        f"{result['run']['name']:24} {result['parameters'] / 1e6:6.2f} M  held {result['held_bits_per_byte']:.4f}"
        f"  val {result['val_bits_per_byte']:.4f}  last {last['held_bits']:.4f}  train {last['train_nats']:.3f} nats"
        f"  epochs {result['epochs']:5.1f}  {last['seconds']:.0f} s"
    )


def train_together(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Each run in its own process on the one GPU; a run that fails prints its last lines and is left out."""
    children = []
    for run in runs:
        command = [sys.executable, __file__, "train", "--data", args.data, "--out", args.out]
        command += [
            "--run",
            json.dumps(asdict(run)),
            "--seconds",
            str(args.seconds),
            "--max-steps",
            str(args.max_steps),
        ]
        log = (Path(args.out) / f"{run.name}.log").open("w")
        children.append(
            (run, subprocess.Popen([*command, *(["--compile"] if args.compile else [])], stdout=log, stderr=log))
        )
    for run, child in children:
        code = child.wait()
        lines = (Path(args.out) / f"{run.name}.log").read_text().splitlines()
        print("\n".join(lines[-1:] if code == 0 else [f"{run.name} FAILED ({code})", *lines[-8:]]), flush=True)


# --- commands ---------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    out = Path(args.data)
    main = read_stories(Path(args.corpus), repair=True)
    held_count = max(1, len(main) // 50)
    main, held = main[:-held_count], main[-held_count:]
    usual = usual_case(main)
    texts = {
        "main": main,
        "held": held,
        "val": read_stories(Path(args.val)),
        "extra": [restore_case(s, usual) for p in args.lowercased for s in read_stories(Path(p), repair=True)],
        "tales": [s for p in args.tales for s in read_stories(Path(p), repair=True)],
    }
    for vocab in args.vocab:
        tokenizer = train_tokenizer(main, vocab)
        save_tokenizer(tokenizer, out / f"vocab{vocab}", Run("").context)
        parts = {name: encode(tokenizer, stories) for name, stories in texts.items() if stories}
        arrays: dict[str, Any] = {
            f"{n}_{k}": v for n, part in parts.items() for k, v in zip(("ids", "offsets"), part, strict=True)
        }
        np.savez(out / f"vocab{vocab}" / "data.npz", **arrays)
        print(vocab, {name: len(ids) for name, (ids, _) in parts.items()})
    (out / "main.json").write_text(json.dumps(main, ensure_ascii=False))
    (out / "bytes.json").write_text(json.dumps({n: sum(len(s.encode()) for s in t) for n, t in texts.items()}))


def train_one(args: argparse.Namespace) -> None:
    run = Run(**json.loads(args.run))
    train(run, Path(args.data), Path(args.out), args.seconds, args.compile, args.max_steps)


def search(args: argparse.Namespace) -> None:
    Path(args.out).mkdir(parents=True, exist_ok=True)
    train_together([run for run in SEARCH if not args.only or run.name in args.only], args)


def best_teachers(out: Path) -> list[str]:
    results = [json.loads(p.read_text()) for p in out.glob("teacher-*.json")]
    results.sort(key=lambda r: float(r["held_bits_per_byte"]))
    return [r["run"]["name"] for r in results[:TEACHERS]]


def distill(args: argparse.Namespace) -> None:
    began, out, device = time.monotonic(), Path(args.out), device_of()
    names = best_teachers(out)
    if not names:
        raise SystemExit(f"{out}: no teacher-*.json there; run search first")
    models = [load_model(out / f"{name}.pt", device) for name in names]
    data = Data.load(Path(args.data), models[0].run.vocab)
    generator = torch.Generator(device).manual_seed(1)
    written: list[Ids] = []
    with autocast(device):
        for part in ("held", "val"):
            score = nats(ensemble(models), story_texts(data.parts[part]), models[0].run.context, device)
            print(f"ensemble of {', '.join(names)}: {part} {score / math.log(2) / data.bytes[part]:.4f}", flush=True)
        for _ in range(args.rounds):
            for model in models:
                written += model.write(args.stories, args.story_length, generator)
    lengths = np.array([len(w) for w in written])
    print(f"{len(written)} stories written, {lengths.sum()} tokens, {time.monotonic() - began:.0f} s", flush=True)
    np.savez(out / "written.npz", ids=np.concatenate(written), offsets=np.concatenate([[0], np.cumsum(lengths)]))
    for story in written[:2]:
        print("|", data.tokenizer.decode(story.tolist())[:600].replace("\n", " / "))
    del models
    torch.cuda.empty_cache()
    args.seconds -= time.monotonic() - began
    train_together([replace(run, teachers=tuple(names)) for run in STUDENTS], args)


def llama_config(run: Run) -> dict[str, Any]:
    """config.json of a run, in the Hugging Face names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": run.vocab,
        "hidden_size": run.hidden,
        "intermediate_size": run.mlp,
        "num_hidden_layers": run.layers,
        "num_attention_heads": run.heads,
        "num_key_value_heads": run.kv_heads,
        "head_dim": run.hidden // run.heads,
        "hidden_act": "silu",
        "max_position_embeddings": run.context,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_STORY_ID,
        "eos_token_id": END_OF_STORY_ID,
        "torch_dtype": "bfloat16",
    }


def export(args: argparse.Namespace) -> None:
    """Write the model folder: config, generation config, bf16 safetensors and the tokenizer."""
    from safetensors.torch import save_file

    out, to = Path(args.out), Path(args.to)
    saved = torch.load(out / f"{args.name}.pt", map_location="cpu", weights_only=True)
    run = Run(**saved["run"])
    to.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": t.to(torch.bfloat16).contiguous() for name, t in saved["state"].items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": END_OF_STORY_ID,
        "eos_token_id": END_OF_STORY_ID,
        "pad_token_id": END_OF_STORY_ID,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    (to / "config.json").write_text(json.dumps(llama_config(run), indent=2) + "\n")
    (to / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer = Tokenizer.from_file(str(Path(args.data) / f"vocab{run.vocab}" / "tokenizer.json"))
    save_tokenizer(tokenizer, to, run.context)


def report(args: argparse.Namespace) -> None:
    """Gather the logs of all runs into one JSON file and draw their held-out loss."""
    import matplotlib.pyplot as plt

    results = [json.loads((Path(args.out) / f"{name}.json").read_text()) for name in ALL_RUNS if
               (Path(args.out) / f"{name}.json").exists()]  # fmt: skip
    Path(args.runs).write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for result in results:
        name = result["run"]["name"]
        style = next(v for k, v in {"teacher": "--", "small": ":", "student": "-"}.items() if name.startswith(k))
        history = result["history"]
        axes.plot([h["tokens"] / 1e6 for h in history], [h["held_bits"] for h in history], style, label=name)
    axes.set(xlabel="tokens seen, millions", ylabel="held-out bits per byte", ylim=(0.55, 0.9))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(args.picture, dpi=90)
    for result in results:
        print(summary(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("--data", required=True, metavar="FOLDER", help="the folder that prepare fills")
        return sub

    sub = command("prepare", prepare, "train the tokenizers and encode the corpora")
    sub.add_argument("--corpus", required=True, metavar="FILE", help="stories separated by <|endoftext|>")
    sub.add_argument("--val", required=True, metavar="FILE", help="stories that are only ever scored")
    sub.add_argument("--lowercased", action="append", default=[], metavar="FILE", help="lower-cased stories")
    sub.add_argument("--tales", action="append", default=[], metavar="FILE", help="other texts")
    sub.add_argument("--vocab", action="append", type=int, default=[], metavar="N", help="tokenizer sizes to make")
    timed = [
        command("search", search, "train the teachers and the small models at once"),
        command("distill", distill, "train the final size on what the best teachers predict and write"),
        command("train", train_one, "train one run"),
    ]
    for sub in timed:
        sub.add_argument("--out", required=True, metavar="FOLDER", help="checkpoints and logs")
        sub.add_argument("--seconds", type=float, default=1e6, help="wall-clock limit; the schedule adapts to it")
        sub.add_argument("--max-steps", type=int, default=10**9, metavar="N")
        sub.add_argument("--compile", action="store_true", help="torch.compile each layer")
    timed[0].add_argument("--only", action="append", default=[], metavar="NAME", help="only these runs")
    timed[1].add_argument("--rounds", type=int, default=2, help="batches of stories per teacher")
    timed[1].add_argument("--stories", type=int, default=3072, help="stories in a batch")
    timed[1].add_argument("--story-length", type=int, default=512, metavar="N", help="tokens; longer ones are dropped")
    timed[2].add_argument("--run", required=True, metavar="JSON", help="the fields of the run; name is required")
    sub = command("export", export, "write a trained run in the Hugging Face layout")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where its checkpoint is")
    sub.add_argument("--name", required=True, help="the run")
    sub.add_argument("--to", required=True, metavar="FOLDER")
    sub = command("report", report, "gather the logs of all runs and draw the loss curves")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where the logs are")
    sub.add_argument("--runs", required=True, metavar="FILE", help="JSON of all logs, to write")
    sub.add_argument("--picture", required=True, metavar="FILE", help="PNG, to write")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
