"""The shapes of a model's values, with letters for the sizes that a pass decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ..dtypes import DTYPES, Array, dtype_name
from ..engine.batch import abstract_values, input_shapes
from ..models.config import ModelConfig
from ..models.graph import decoder
from ..ops.abstract import infer
from ..ops.node import Node
from ..train.memory import abstract_values as training_values
from ..train.step import training_step

__all__ = ["LETTERS", "shapes", "training_shapes"]

# Sizes that a pass decides, by ARCHITECTURE.md's letters, and the number that stands for each while shapes are found:
# primes beyond any size of a model, so that no other size is taken for one of them.
LETTERS: Mapping[str, int] = {"n": 1_000_003, "b": 1_000_033, "r": 1_000_037, "M": 1_000_039, "P": 1_000_081}
_TOKENS = 1_009  # stands for the tokens of a batch in a training step: also a prime, and one chunk of the head


def shapes(config: ModelConfig, every_row: bool = False) -> dict[str, str]:
    """Name of a value -> its shape and dtype in the form of signatures, ``[n,4096]:f32``.

    every_row: of the graph of a decode step, whose head takes every row. Weights and activations have the config's
    dtype, as on a GPU.
    """
    T, inputs = DTYPES[config.stored], input_shapes(*(LETTERS[letter] for letter in "nbMr"))
    found: dict[str, Array | None] = {**abstract_values(config, T, inputs, LETTERS["P"], config.context)}
    graph = decoder(config)
    for _ in infer([*graph.body, *(graph.every_row() if every_row else graph.selected_rows())], found, T):
        pass  # infer adds what each node makes
    return _shown(found)


def training_shapes(config: ModelConfig) -> tuple[Sequence[Node], dict[str, str]]:
    """The nodes of a training step on few enough tokens for one chunk of the head, and the shapes of their values."""
    T, trained = DTYPES[config.stored], list(config.weight_shapes())
    step = training_step(config, _TOKENS, trained)
    found: dict[str, Array | None] = {**training_values(config, step, T, config.context, LETTERS["b"])}
    for _ in infer(step.nodes, found, T):
        pass
    return [_with_letter(node) for node in step.nodes], _shown(found, {_TOKENS: "n"})


def _with_letter(node: Node) -> Node:
    """The node as it is to be read: of its attributes too, what is the number of tokens is a letter."""
    return replace(node, attrs={name: "n" if value == _TOKENS else value for name, value in node.attrs.items()})


def _shown(values: Mapping[str, Array | None], more: Mapping[int, str] = MappingProxyType({})) -> dict[str, str]:
    letters = {size: letter for letter, size in LETTERS.items()} | {LETTERS["b"] + 1: "b+1"} | dict(more)

    def shown(size: int) -> str:
        times, rest = divmod(size, LETTERS["n"])
        return letters.get(size) or (f"{times}*n" if times and not rest else str(size))

    return {
        name: f"[{','.join(map(shown, x.shape))}]:{dtype_name(x.dtype)}" for name, x in values.items() if x is not None
    }
