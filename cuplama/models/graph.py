"""A model as a plain list of nodes, from its config alone. This is the only place where a model's layers are written.

Values are names: weights ("3.qkv_proj"; lora.py has those of an adapter), inputs of a pass ("input_ids", "page_table",
...: engine/batch.py lists them), cache arrays ("3.cache.k") and activations. The tokens of all sequences in a batch are
concatenated: every activation is [n, ...] for n new tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ops.node import Node
from .config import ModelConfig

__all__ = ["HIDDEN", "LAST", "LOGITS", "Cut", "Graph", "decoder"]

HIDDEN = "hidden"  # [r, d] float32: the rows of the residual stream that the head takes
LOGITS = "logits"  # [r, vocab_size] float32

# An input of attention -> its name where attention is of the last tokens of some sequences, a row for each.
LAST = {name: f"last.{name}" for name in ("cu_seqlens", "seq_lens", "page_table")}


@dataclass(frozen=True)
class Cut:
    """A model cut behind the last layer's keys and values, the last that every token of a prompt needs.

    body: from token ids to those; rest: the nodes behind them, up to the residual stream; between: the values of the
    body that the rest reads, [n, ...]; last: from those to logits, for the rows that "logit_rows" names alone. Each
    such row is the last token of a sequence, which ``LAST`` describes.
    """

    body: Sequence[Node]
    rest: Sequence[Node]
    between: tuple[str, ...]
    last: Sequence[Node]


@dataclass(frozen=True)
class Graph:
    """A model in two parts. A pass that ends in the middle of a prompt runs the body alone, which fills the cache.

    body: from token ids to the residual stream; out: the name of that, [n, d] float32; head: the last norm and the
    product with lm_head, from ``HIDDEN`` to ``LOGITS``.
    """

    body: Sequence[Node]
    head: Sequence[Node]
    out: str

    def selected_rows(self) -> list[Node]:
        """The head on the rows of the body that the input "logit_rows" names."""
        return [Node("select_rows", (HIDDEN,), (self.out, "logit_rows")), *self.head]

    def every_row(self) -> list[Node]:
        """The head on every row of the body, as a decode step needs it."""
        return [
            replace(node, ins=tuple(self.out if name == HIDDEN else name for name in node.ins)) for node in self.head
        ]

    def cut(self) -> Cut:
        """The model in the two parts of a pass over prompts. Only a graph with a cache can be cut."""
        body, rest, needed = list[Node](), list[Node](), set[str]()
        for node in reversed(self.body):
            part = body if node.op == "kv_append" or needed & set(node.outs) else rest
            part.insert(0, node)
            needed.update(node.ins if part is body else ())
        made = {name for node in body for name in node.outs if name not in node.ins}
        between = tuple(dict.fromkeys(name for node in rest for name in node.ins if name in made))
        names = LAST | {name: f"last.{name}" for name in between}
        rows = [Node("select_rows", (names[name],), (name, "logit_rows")) for name in between]
        behind = [replace(n, ins=tuple(names.get(name, name) for name in n.ins)) for n in (*rest, *self.every_row())]
        return Cut(body, rest, between, [*rows, *behind])


def decoder(config: ModelConfig, cached: bool = True, dropout: float = 0.0) -> Graph:
    """The graph of a decoder-only model.

    cached: keys and values go to the paged cache, and attention reads them there; otherwise, as in training, the tokens
    of a batch are whole sequences, which attend to themselves. dropout: the share of each sublayer's result that is
    left out, drawn by the input "dropout.seed".
    """
    nodes = _Nodes(config, cached, dropout)
    learned = ("positions",) if "position_table" in nodes.weights else ()
    tables = ("embed_tokens", *nodes.present("position_table"))
    x = nodes.dropped(nodes.emit(config.family.embed, "x", "input_ids", *learned, *tables))
    for i in range(config.num_layers):
        x = nodes.feed_forward(i, nodes.attention(i, x))
    body = tuple(nodes.found)
    nodes.found.clear()
    nodes.linear(nodes.norm(HIDDEN, "norm"), "lm_head", U="f32", out=LOGITS)
    return Graph(body, tuple(nodes.found), x)


class _Nodes:
    """Collects nodes. A method appends the nodes of a part of the model and returns the name of their result."""

    def __init__(self, config: ModelConfig, cached: bool, dropout: float) -> None:
        self.config, self.weights = config, config.weight_shapes()
        self.cached, self.dropout, self.streams = cached, dropout, itertools.count()
        self.found: list[Node] = []

    def emit(self, op: str, out: str, *ins: str, **attrs: Any) -> str:
        self.found.append(Node(op, (out,), ins, attrs))
        return out

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of the weights that the model has."""
        return tuple(name for name in names if name in self.weights)

    def dropped(self, x: str) -> str:
        """A part of x left out, where the model is trained so; every place draws numbers of its own."""
        if not self.dropout:
            return x
        return self.emit("dropout", f"{x}.kept", x, "dropout.seed", p=self.dropout, stream=next(self.streams))

    def norm(self, x: str, weight: str) -> str:
        bias = self.present(f"{weight}.bias")
        return self.emit(self.config.family.norm, f"{weight}.out", x, weight, *bias, eps=self.config.eps)

    def linear(self, x: str, weight: str, U: str, out: str = "") -> str:
        """A product with a weight, and with what an adapter adds to it."""
        added, out, bias = self.config.low_ranks.get(weight), out or f"{weight}.out", self.present(f"{weight}.bias")
        base = self.emit("linear", f"{weight}.base" if added else out, x, weight, *bias, U=U)
        if added is None:
            return base
        h = self.emit("linear", f"{weight}.lora", x, f"{weight}.lora_a", U="T")
        ins, attrs = (f"{weight}.lora_b", f"{weight}.lora_part"), {"scale": added.scale, "U": U}
        return self.emit("lora_add", out, base, h, *ins, q=self.weights[f"{weight}.lora_a"][0], **attrs)

    def attention(self, i: int, x: str) -> str:
        """Layer i's attention, and its sum with x."""
        config = self.config
        heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
        h = self.linear(self.norm(x, f"{i}.attn_norm"), f"{i}.qkv_proj", U="T")
        if f"{i}.q_norm" in self.weights:
            h = self.emit("qk_norm", f"{i}.normed", h, f"{i}.q_norm", f"{i}.k_norm", **heads, eps=config.eps)
        if (rope := config.rope_name(i)) is not None:
            tables = ("rope.rows", f"{rope}.cos", f"{rope}.sin")
            h = self.emit("rope", f"{i}.rotated", h, *tables, **heads, D=config.head_dim)
        h = self.attend(i, h)
        return self.emit("add", f"{i}.x", x, self.dropped(self.linear(h, f"{i}.o_proj", U="f32")))

    def attend(self, i: int, h: str) -> str:
        """Layer i's attention itself, of rows of queries, keys and values."""
        config, out = self.config, f"{i}.attended"
        settings = {"num_heads": config.num_heads, "window": config.layers[i].window, "scale": config.head_dim**-0.5}
        if not self.cached:
            sizes = {"H": config.num_kv_heads, "D": config.head_dim}
            self.found.append(Node("self_attention", (out, f"{i}.lse"), (h, "cu_seqlens"), {**settings, **sizes}))
            return out
        cache = (f"{i}.cache.k", f"{i}.cache.v")
        self.found.append(Node("kv_append", cache, (h, "slot_mapping", *cache)))
        return self.emit("attention", out, h, *cache, "cu_seqlens", "seq_lens", "page_table", **settings)

    def feed_forward(self, i: int, x: str) -> str:
        """Layer i's MLP, and its sum with x. A gated MLP has its two first matrices stacked in one."""
        (up,) = self.present(f"{i}.gate_up_proj", f"{i}.up_proj")
        h = self.linear(self.norm(x, f"{i}.mlp_norm"), up, U="T")
        h = self.emit(self.config.activation, f"{i}.act", h)
        return self.emit("add", f"{i + 1}.x0", x, self.dropped(self.linear(h, f"{i}.down_proj", U="f32")))
