"""The inputs of a pass over new tokens of several sequences: their names, shapes and padding, in this file alone.

A new input of every sequence is one more row of ``INPUTS`` and one more entry where ``Batch.build`` fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import DTYPES
from ..models.config import ModelConfig
from ..models.graph import LAST
from ..models.rope import RotationTables, Span, table_rows
from ..ops.abstract import AbstractArray, abstract
from .kv_cache import PAGE, page_table
from .sequence import SequenceState

__all__ = ["ASKED", "INPUTS", "Batch", "Input", "abstract_tables", "abstract_values", "input_shapes"]


@dataclass(frozen=True)
class Input:
    """An int32 input. dims: sizes by name, see ``input_shapes``; padding: what fills the rest of a padded batch."""

    name: str
    dims: tuple[str, ...]
    doc: str
    padding: Callable[[Batch], int] = lambda batch: 0


# Rows that pad a batch belong to no sequence: they write to the padding page, attention leaves them out, and whatever
# they hold reaches no other row. Sequences that pad it are empty: they begin where the last one ends.
INPUTS: tuple[Input, ...] = (
    Input("input_ids", ("n",), "token ids of the new tokens, sequence after sequence"),
    Input("positions", ("n",), "position of each in its sequence"),
    Input("slot_mapping", ("n",), "place of each in the cache: page * PAGE + offset", lambda b: b.padding_page * PAGE),
    Input("rope.rows", ("n",), "row of each in the cos/sin tables of all rotations"),
    Input("cu_seqlens", ("b+1",), "first row of each sequence; the last entry is n", lambda b: b.rows),
    Input("seq_lens", ("b",), "tokens of each sequence, new ones included"),
    Input("page_table", ("b", "M"), "pages of each sequence, in order", lambda b: b.padding_page),
    Input("logit_rows", ("r",), "rows whose logits are asked for"),
    Input(LAST["input_ids"], ("e",), "token ids of the last tokens of sequences that end here"),
    Input(LAST["rope.rows"], ("e",), "row of each of them in the tables of rotations"),
    Input(LAST["cu_seqlens"], ("e+1",), "0, 1, ...: of the sequences that end here each has its last token, a row"),
    Input(LAST["seq_lens"], ("e",), "tokens of each of them"),
    Input(LAST["page_table"], ("e", "M"), "pages of each of them"),
)

# What is cut, and not padded, to the rows that are asked for.
ASKED = tuple(spec.name for spec in INPUTS if spec.dims[0] in ("r", "e", "e+1"))


def input_shapes(rows: int, sequences: int, pages: int, logit_rows: int) -> dict[str, tuple[int, ...]]:
    """The shape of each input for n = ``rows`` new tokens of b = ``sequences`` sequences.

    pages: M, of the page table's rows; logit_rows: r, rows whose logits are asked for, of e sequences that end in the
    pass.
    """
    ended = min(sequences, logit_rows)
    sizes = {"n": rows, "b": sequences, "b+1": sequences + 1, "M": pages, "r": logit_rows, "e": ended, "e+1": ended + 1}
    return {spec.name: tuple(sizes[d] for d in spec.dims) for spec in INPUTS}


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences. arrays: every input by name; tables: "rope.cos" and "rope.sin", if the pass
    needs tables of its own; padding_page: the cache's page that belongs to no sequence; all_logits: whether the logits
    of every token are asked for."""

    arrays: Mapping[str, np.ndarray[Any, Any]]
    tables: Mapping[str, np.ndarray[Any, Any]]
    padding_page: int
    all_logits: bool = False

    @classmethod
    def build(
        cls,
        parts: Sequence[tuple[SequenceState, int]],
        rotations: RotationTables,
        padding_page: int,
        all_logits: bool = False,
    ) -> Batch:
        """The next ``count`` tokens of each sequence that are not cached yet; its pages have room for them.

        parts: (sequence, count) pairs; rotations: the model's tables; all_logits: ask for the logits of every token,
        and not only of each sequence's last one where that is in the batch.
        """
        counts = np.array([count for _, count in parts])
        cu_seqlens = np.concatenate([[0], np.cumsum(counts)])
        positions = np.concatenate([np.arange(s.cached, s.cached + count) for s, count in parts])
        table = page_table([s.pages for s, _ in parts], padding_page)
        owner = np.repeat(np.arange(len(parts)), counts)
        seq_lens = np.array([s.cached + count for s, count in parts])
        complete = np.flatnonzero(seq_lens == [len(s.tokens) for s, _ in parts])
        tables, rows = rotations.lookup(
            [Span(s.cached, n, len(s.tokens), min(len(s.prompt), len(s.tokens))) for s, n in parts]
        )
        arrays = {
            "input_ids": np.concatenate([s.tokens[s.cached : s.cached + count] for s, count in parts]),
            "positions": positions,
            "slot_mapping": table[owner, positions // PAGE] * PAGE + positions % PAGE,
            "rope.rows": rows,
            "cu_seqlens": cu_seqlens,
            "seq_lens": seq_lens,
            "page_table": table,
            "logit_rows": np.arange(len(positions)) if all_logits else cu_seqlens[1:][complete] - 1,
            LAST["input_ids"]: np.array([parts[int(i)][0].tokens[-1] for i in complete]),
            LAST["rope.rows"]: rows[cu_seqlens[1:][complete] - 1],
            LAST["cu_seqlens"]: np.arange(len(complete) + 1),
            LAST["seq_lens"]: seq_lens[complete],
            LAST["page_table"]: table[complete],
        }
        return cls({name: array.astype(np.int32) for name, array in arrays.items()}, tables, padding_page, all_logits)

    @property
    def rows(self) -> int:
        """New tokens."""
        return len(self.arrays["input_ids"])

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self.arrays["seq_lens"])

    def pad_into(self, host: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write the inputs that ``host`` has into its arrays, which may be larger, and padding into the rest."""
        for spec in INPUTS:
            if spec.name in host:
                target, array = host[spec.name], self.arrays[spec.name]
                target.fill(spec.padding(self))
                target[tuple(map(slice, array.shape))] = array


def abstract_values(
    config: ModelConfig,
    T: np.dtype[Any],
    shapes: Mapping[str, tuple[int, ...]],
    pages: int,
    positions: int,
    cache: np.dtype[Any] | None = None,
) -> dict[str, AbstractArray]:
    """Descriptions of everything that a model's graph reads, by name: weights, cache, rotation tables and inputs.

    shapes: of the inputs, by ``input_shapes``; pages: of the cache, the padding page included; positions: that the
    rotation tables cover; cache: what keys and values are stored in, ``T`` by default.
    """
    found = {name: abstract(shape, T) for name, shape in config.weight_shapes().items()}
    found |= {name: abstract(found[name].shape, DTYPES["f32"]) for name in config.wide_weights()}
    for i, (heads, size) in config.caches.items():
        found |= {f"{i}.cache.{part}": abstract((pages, heads, PAGE, size), cache or T) for part in "kv"}
    found |= {name: abstract(part.shape, part.dtype) for name, part in config.lora_parts().items()}
    found |= abstract_tables(config, positions)
    return found | {name: abstract(shape, DTYPES["i32"]) for name, shape in shapes.items()}


def abstract_tables(config: ModelConfig, positions: int) -> dict[str, AbstractArray]:
    """Descriptions of the rotation tables of a model for that many positions, by name."""
    found: dict[str, AbstractArray] = {}
    for name, rope in config.ropes.items():
        table = abstract((table_rows(rope, positions), rope.dim // 2), DTYPES["f32"])
        found |= {f"{name}.cos": table, f"{name}.sin": table}
    return found
