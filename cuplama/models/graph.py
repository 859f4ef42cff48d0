"""A model as a plain list of nodes, from its config alone. This is the only place where a model's layers are written.

Values are names: weights ("3.qkv_proj"; lora.py has those of an adapter), inputs of a pass ("input_ids", "page_table",
...: engine/batch.py lists them), cache arrays ("3.cache.k", "2.cache.state") and activations. The tokens of all
sequences in a batch are concatenated: every activation is [n, ...] for n new tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ParameterError
from ..ops.node import Node
from .config import ModelConfig

__all__ = ["HIDDEN", "LAST", "LOGITS", "Cut", "Graph", "decoder"]

HIDDEN = "hidden"  # [r, d] float32: the rows of the residual stream that the head takes
LOGITS = "logits"  # [r, vocab_size] float32

# An input of a pass -> its name where the pass is of the last tokens of some sequences, a row for each.
LAST = {name: f"last.{name}" for name in ("input_ids", "rope.rows", "cu_seqlens", "seq_lens", "page_table")}

_LAYER_INPUTS = "layer_inputs"
# The constants of xIELU, whose other two numbers are weights.
_XIELU = {"beta": 0.5, "eps": -1e-6}


@dataclass(frozen=True)
class Cut:
    """A model cut behind the last node that writes to the cache, the last that every token of a prompt needs: in the
    last layer, or in an earlier one where layers behind it share keys and values.

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

    body: from token ids to the residual stream; head: the last norm and the product with lm_head, from ``HIDDEN`` to
    ``LOGITS``; streams: the names of the residual stream, [n, d] float32, before each layer and behind the last.
    """

    body: Sequence[Node]
    head: Sequence[Node]
    streams: Sequence[str]

    @property
    def out(self) -> str:
        """The residual stream that the body ends with."""
        return self.streams[-1]

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
            part = body if set(node.ins) & set(node.outs) or needed & set(node.outs) else rest
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
    left out, drawn by the input "dropout.seed". Raises ParameterError for a model that needs a cache.
    """
    if config.delta_layers and not cached:
        raise ParameterError(f"{config.architecture} cannot be trained: gated delta layers have no gradient yet")
    nodes = _Nodes(config, cached, dropout)
    streams = [nodes.embedding()]
    for i in range(config.num_layers):
        streams.append(nodes.layer(i, streams[-1]))
    body = tuple(nodes.found)
    nodes.found.clear()
    nodes.logits()
    return Graph(body, tuple(nodes.found), streams)


class _Nodes:
    """Collects nodes. A method appends the nodes of a part of the model and returns the name of their result.

    What a layer adds may be multiplied by the config's residual_scale. The residual stream is kept divided by that, so
    the sums stay plain: the embedding is divided by it, and a norm of the stream, which is the same for all multiples,
    has an eps that is divided by its square.
    """

    def __init__(self, config: ModelConfig, cached: bool, dropout: float) -> None:
        self.config, self.weights = config, config.weight_shapes()
        self.cached, self.dropout, self.streams = cached, dropout, itertools.count()
        offset = config.family.norm_offset
        self.norms = {"eps": config.eps, **({"offset": offset} if offset else {})}
        self.found: list[Node] = []

    def emit(self, op: str, out: str, *ins: str, **attrs: Any) -> str:
        self.found.append(Node(op, (out,), ins, attrs))
        return out

    def heads(self, i: int) -> dict[str, int]:
        """How many heads of each kind a row of layer i has: one that shares keys and values has queries alone."""
        own = self.config.caches.get(i, (0, 0))
        return {"num_heads": self.config.num_heads, "num_kv_heads": own[0]}

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of the weights that the model has."""
        return tuple(name for name in names if name in self.weights)

    def dropped(self, x: str) -> str:
        """A part of x left out, where the model is trained so; every place draws numbers of its own."""
        if not self.dropout:
            return x
        return self.emit("dropout", f"{x}.kept", x, "dropout.seed", p=self.dropout, stream=next(self.streams))

    def scaled(self, x: str, factor: float) -> str:
        return x if factor == 1 else self.emit("scale", f"{x}.scaled", x, factor=factor)

    def linear(self, x: str, weight: str, U: str) -> str:
        """A product with a weight, and with what an adapter adds to it."""
        added, out, bias = self.config.low_ranks.get(weight), f"{weight}.out", self.present(f"{weight}.bias")
        base = self.emit("linear", f"{weight}.base" if added else out, x, weight, *bias, U=U)
        if added is None:
            return base
        h = self.emit("linear", f"{weight}.lora", x, f"{weight}.lora_a", U="T")
        ins, attrs = (f"{weight}.lora_b", f"{weight}.lora_part"), {"scale": added.scale, "U": U}
        return self.emit("lora_add", out, base, h, *ins, q=self.weights[f"{weight}.lora_a"][0], **attrs)

    # -- from token ids to the residual stream, and from that to logits

    def embedding(self) -> str:
        config = self.config
        learned = ("positions",) if "position_table" in self.weights else ()
        tables = ("embed_tokens", *self.present("position_table"))
        x = self.emit(config.family.embed, "x", "input_ids", *learned, *tables)
        if config.per_layer_size:
            self.layer_inputs(x)
        return self.dropped(self.scaled(x, config.embedding_scale / config.residual_scale))

    def layer_inputs(self, x: str) -> None:
        """What layers are given of a token beside the residual stream, ``_LAYER_INPUTS`` [n, layers * size] float32,
        as in Gemma 3n: an embedding of its own, and one made of its embedding x, with an equal share."""
        size = self.config.per_layer_size
        given = self.emit("embedding", "given", "input_ids", "embed_tokens_per_layer")
        made = self.linear(self.emit("cast", "x.cast", x, U="T"), "layer_inputs_proj", U="f32")
        given = self.scaled(given, math.sqrt(size))
        both = self.emit("rms_norm_add", "given.both", made, "layer_inputs_norm", given, **self.norms)
        self.emit("scale", _LAYER_INPUTS, both, factor=math.sqrt(0.5))

    def logits(self) -> None:
        config = self.config
        x = self.scaled(self.linear(self.read(HIDDEN, "norm"), "lm_head", U="f32"), config.logits_scale)
        if config.logits_cap:
            self.emit("softcap", f"{x}.capped", x, cap=config.logits_cap)
        self.found.append(replace(self.found.pop(), outs=(LOGITS,)))

    # -- a layer

    def layer(self, i: int, x: str) -> str:
        """Layer i. Its MLP reads the sum of x and attention, or what attention reads where the two are parallel."""
        parallel = "parallel" in self.config.flags
        h = self.read(x, f"{i}.attn_norm")
        mixed = self.delta(i, h) if i in self.config.delta_layers else self.attention(i, h)
        y = self.added(x, mixed, f"{i}.attn_post_norm", f"{i}.x")
        if not parallel or f"{i}.mlp_norm" in self.weights:
            h = self.read(x if parallel else y, f"{i}.mlp_norm")
        out, more, scalar = f"{i + 1}.x0", self.config.per_layer_size > 0, self.present(f"{i}.layer_scalar")
        z = self.added(y, self.feed_forward(i, h, y), f"{i}.mlp_post_norm", *((f"{i}.z",) if more else (out, *scalar)))
        return self.added(z, self.layer_input(i, z), f"{i}.layer_input_norm", out, *scalar) if more else z

    def read(self, x: str, weight: str) -> str:
        """The residual stream in the model's dtype: normalised, or as it is where the model has no such norm."""
        config = self.config
        if weight not in self.weights:
            return self.emit("cast", f"{x}.cast", self.scaled(x, config.residual_scale), U="T")
        attrs = {**self.norms, "eps": config.eps / config.residual_scale**2}
        return self.emit(config.family.norm, f"{weight}.out", x, weight, *self.present(f"{weight}.bias"), **attrs)

    def added(self, x: str, y: str, weight: str, out: str, *scalar: str) -> str:
        """x and what a sublayer gives, y, which is normalised first where the model has such a norm. scalar: a stored
        number that the sum is multiplied by, if the model has that beside such a norm."""
        y = self.dropped(y)
        if weight in self.weights:
            return self.emit(f"{self.config.family.norm}_add", out, y, weight, x, *scalar, **self.norms)
        return self.emit("add", out, x, y)

    def attention(self, i: int, h: str) -> str:
        """Layer i's attention, of what its norm gives. Where its output has a gate, that opens by the same."""
        config, normed = self.config, h
        h = self.linear(h, f"{i}.qkv_proj", U="T")
        after = "qk_norm_after_rope" in config.flags
        for part in (self.rotated, self.normed) if after else (self.normed, self.rotated):
            h = part(i, h)
        if config.query_temperature:
            attrs = {"temperature": config.query_temperature, "context": int(config.query_context)}
            h = self.emit("scale_queries", f"{i}.tempered", h, "positions", **self.heads(i), **attrs)
        h = self.attend(i, h)
        for gate in self.present(f"{i}.attn_gate_proj"):
            h = self.emit("sigmoid_mul", f"{i}.attn_gated", h, self.linear(normed, gate, U="T"))
        return self.linear(h, f"{i}.o_proj", U="f32")

    def delta(self, i: int, h: str) -> str:
        """Layer i's gated delta rule, of what its norm gives: queries, keys and values are convolved with those of the
        tokens before, and read and write the state of their sequence, a matrix for each head."""
        sequences = ("cu_seqlens", "seq_lens", "state_slots")
        conv, state = f"{i}.cache.conv", f"{i}.cache.state"
        # One product gives what is convolved, and behind it in each row the gates z of heads, b and a of the rule.
        convolved, values = self.weights[f"{i}.delta_conv"][0], self.weights[f"{i}.delta_out_proj"][1]
        x = self.linear(h, f"{i}.delta_in_proj", U="T")
        self.found.append(Node("causal_conv", (f"{i}.convolved", conv), (x, f"{i}.delta_conv", "", conv, *sequences)))
        ins = (f"{i}.convolved", x, f"{i}.delta_A_log", f"{i}.delta_dt_bias", state, *sequences)
        self.found.append(Node("gated_delta", (f"{i}.delta", state), ins, {"start": convolved + values}))
        attrs = {"eps": self.config.eps, "start": convolved}
        h = self.emit("gated_norm", f"{i}.delta_normed", f"{i}.delta", f"{i}.delta_norm", x, **attrs)
        return self.linear(h, f"{i}.delta_out_proj", U="f32")

    def normed(self, i: int, h: str) -> str:
        """Queries and keys normalised, where the model has such norms: each head, or all heads of a row together."""
        norms = self.present(f"{i}.q_norm", f"{i}.k_norm")
        if not norms:
            return h
        op = "qk_norm" if self.weights[norms[0]] == (self.config.dims(f"{i}.")["D"],) else "qk_norm_wide"
        values = {"v_norm": 1} if "v_norm" in self.config.flags and i in self.config.caches else {}
        # Queries alone have no norm of keys, and the op, which has no keys then either, takes any.
        return self.emit(op, f"{i}.normed", h, norms[0], norms[-1], **self.heads(i), **self.norms, **values)

    def rotated(self, i: int, h: str) -> str:
        """Queries and keys rotated by their positions, in a layer that does so. All tables have the same rows."""
        if (rope := self.config.rope_name(i)) is None:
            return h
        tables = ("rope.rows", f"{rope}.cos", f"{rope}.sin")
        D = self.config.dims(f"{i}.")["D"]
        return self.emit(self.config.family.rope, f"{i}.rotated", h, *tables, **self.heads(i), D=D)

    def attend(self, i: int, h: str) -> str:
        """Layer i's attention itself, of rows of queries, keys and values, or of queries where it shares the others."""
        config, out, dims, layer = self.config, f"{i}.attended", self.config.dims(f"{i}."), self.config.layers[i]
        scale, cap = config.attention_scale or dims["D"] ** -0.5, config.attention_cap
        settings: dict[str, Any] = {"num_heads": config.num_heads, "window": layer.window, "scale": scale}
        settings |= {"softcap": cap} if cap else {}
        sinks = self.present(f"{i}.sinks")
        if not self.cached:
            settings |= {"H": dims["num_kv_heads"], "D": dims["D"]}
            self.found.append(Node("self_attention", (out, f"{i}.lse"), (h, "cu_seqlens", *sinks), settings))
            return out
        source = i if layer.kv_layer is None else layer.kv_layer
        cache = (f"{source}.cache.k", f"{source}.cache.v")
        if source == i:
            self.found.append(Node("kv_append", cache, (h, "slot_mapping", *cache)))
        return self.emit("attention", out, h, *cache, "cu_seqlens", "seq_lens", "page_table", *sinks, **settings)

    def layer_input(self, i: int, x: str) -> str:
        """What layer i makes of its own part of ``_LAYER_INPUTS``, through a gate that the residual stream x opens."""
        size = self.config.per_layer_size
        h = self.linear(self.emit("cast", f"{i}.gate_in", x, U="T"), f"{i}.layer_input_gate", U="T")
        h = self.emit(f"{self.config.activation}_part", f"{i}.gated", h, _LAYER_INPUTS, first=i * size)
        return self.linear(h, f"{i}.layer_input_proj", U="f32")

    def feed_forward(self, i: int, h: str, x: str) -> str:
        """Layer i's MLP, of what its norm gives, h, or its experts, or both side by side. x: the residual stream."""
        if f"{i}.router" not in self.weights:
            return self.mlp(f"{i}.", h)
        return self.side_by_side(i, h, x) if f"{i}.experts_norm" in self.weights else self.mixture(i, h)

    def mlp(self, prefix: str, h: str) -> str:
        """An MLP whose weights begin so. A gated one has its two first matrices stacked in one."""
        (up,) = self.present(f"{prefix}gate_up_proj", f"{prefix}up_proj")
        learned = self.present(f"{prefix}act.alpha_p", f"{prefix}act.alpha_n")
        h = self.linear(h, up, U="T")
        h = self.emit(self.config.activation, f"{prefix}act", h, *learned, **(_XIELU if learned else {}))
        return self.linear(h, f"{prefix}down_proj", U="f32")

    # -- experts

    def mixture(self, i: int, h: str) -> str:
        """Layer i's experts, and the one that all tokens share, if it has that."""
        routes = self.routes(i, self.linear(h, f"{i}.router", U="f32"))  # behind the norm, which fusion needs
        shared = (self.mlp(f"{i}.shared.", h),) if f"{i}.shared.gate_up_proj" in self.weights else ()
        gated = f"{i}.shared_gate" in self.weights
        y = self.experts(i, routes, h, *(() if gated else shared))
        if not gated:
            return y
        # A gate is a router of one expert, which all tokens have: its weight is the sigmoid.
        attrs = {"k": 1, "sigmoid": 1, "renormalise": 0}
        share = self.routed("route", f"{i}.shared", self.linear(h, f"{i}.shared_gate", U="f32"), **attrs)[1]
        return self.emit("combine_pairs", f"{i}.shared.added", *shared, share, y)

    def side_by_side(self, i: int, h: str, x: str) -> str:
        """Layer i's MLP, of h, and its experts, of the residual stream x, with norms before and behind, as in Gemma 4:
        the router has a norm of its own."""
        dense = self.emit("rms_norm_f32", f"{i}.dense", self.mlp(f"{i}.", h), f"{i}.dense_post_norm", **self.norms)
        logits = self.linear(self.read(x, f"{i}.router_norm"), f"{i}.router", U="f32")
        routes = self.routes(i, self.scaled(logits, self.config.router_scale))
        y = self.experts(i, routes, self.read(x, f"{i}.experts_norm"))
        return self.emit("rms_norm_add", f"{i}.both", y, f"{i}.experts_post_norm", dense, **self.norms)

    def routed(self, op: str, name: str, logits: str, *ins: str, **attrs: Any) -> tuple[str, str]:
        """(experts, weights) of each row."""
        outs = f"{name}.chosen", f"{name}.weights"
        self.found.append(Node(op, outs, (logits, *ins), attrs))
        return outs

    def routes(self, i: int, logits: str) -> tuple[str, str, str]:
        """Which experts the router's logits choose: (their weights, pairs, offsets). A pair is a row and one of its
        experts."""
        config, name = self.config, f"{i}.experts"
        scale, (correction, *_) = self.present(f"{i}.router.scale"), (*self.present(f"{i}.router.correction"), "")
        beside = (correction, *scale) if correction or scale else ()
        chosen, weights = self.routed(config.family.router.op, name, logits, *beside, **config.router)
        pairs = f"{name}.pairs", f"{name}.offsets"
        self.found.append(Node("sort_pairs", pairs, (chosen,), {"E": config.experts}))
        return weights, *pairs

    def experts(self, i: int, routes: tuple[str, str, str], h: str, *more: str) -> str:
        """What the experts that were chosen make of h, by their weights, beside what there is more."""
        config, name = self.config, f"{i}.experts"
        weights, *pairs = routes
        bias = (self.present(f"{name}.{x}_proj.bias") for x in ("gate_up", "down"))
        op, limits = f"expert_linear_{config.activation}", {"alpha": config.swiglu_alpha, "limit": config.swiglu_limit}
        attrs = limits if config.swiglu_limit else {}
        y = self.emit(op, f"{name}.act", h, f"{name}.gate_up_proj", *pairs, *next(bias), **attrs)
        y = self.emit("expert_linear", f"{name}.out", y, f"{name}.down_proj", *pairs, *next(bias))
        return self.emit("combine_pairs", f"{name}.sum", y, weights, *more)
