"""Quantise a model folder: each number to the nearest, or by GPTQ on the inputs that a text gives the matrices."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..arguments import checked, one_of, whole_number
from ..device import DEVICES, Setup, open_backend
from ..dtypes import Array, dtype_name, upcast
from ..errors import CheckpointError, ParameterError
from ..quant.compressed import config_of, read_tensors, tensor_specs, tensors_of
from ..quant.gptq import Matrix, gptq
from ..quant.grid import GRIDS, Grid
from ..quant.rtn import GROUPS, Quantised, round_to_nearest
from ..text.tokenizer import Tokenizer
from . import METHODS
from .calibration import Calibration, samples_of
from .folder import OutputFolder
from .shards import make_shards
from .source import Source, layer_of

__all__ = ["Options", "quantise"]

_log = logging.getLogger("cuplama")
_LENGTH = 512  # tokens of a sample
Progress = Callable[[int, int], None]  # (layers that are done, layers in all)


@dataclass(frozen=True)
class Options:
    """What a model is quantised to, and how.

    format: one of ``GRIDS``; group_size: columns that share a scale, 0 for whole rows, None for the format's own;
    method: "rtn", to the nearest numbers, or "gptq"; text: what gptq calibrates on; samples: taken from it; length:
    tokens of each, None for 512 or the model's context; device: where they run through the model; shard_bytes: of a
    file of weights at most.
    """

    format: str
    group_size: int | None = None
    method: str = "rtn"
    text: str = ""
    samples: int = 128
    length: int | None = None
    device: str = "auto"
    shard_bytes: int = 5 * 10**9

    def check(self, context: int) -> None:
        """Raises ParameterError naming what is wrong. context: of the model."""
        one_of("format", self.format, GRIDS)
        one_of("method", self.method, METHODS)
        one_of("device", self.device, DEVICES)
        if self.group_size not in (None, 0, *GROUPS):
            sizes = ", ".join(map(str, GROUPS))
            raise ParameterError(
                f"group_size = {self.group_size} is not supported; supported: {sizes}, 0 for whole rows"
            )
        checked("samples", self.samples, whole_number(1), "a number of at least 1")
        length = whole_number(1, context, none=True)
        checked("length", self.length, length, f"a number from 1 to {context}, the model's context")
        checked("shard_bytes", self.shard_bytes, whole_number(1), "a number of bytes")
        if (self.method == "gptq") != bool(self.text):
            needs = "method = gptq needs a text to calibrate on"
            raise ParameterError("text is for method = gptq alone" if self.text else needs)


def quantise(folder: Path, out: Path, options: Options, progress: Progress | None = None) -> bool:
    """Write the model of ``folder``, quantised, to the folder ``out``, in the layout of compressed-tensors.

    Where an earlier call with the same arguments was stopped, this one goes on. False: all had been done before.
    progress: called with (layers done, layers in all). Raises ParameterError, ConfigError, CheckpointError, PromptError
    and DeviceError, each naming the culprit.
    """
    one_of("format", options.format, GRIDS)
    source, grid = Source.open(folder), GRIDS[options.format]
    source.check_described()
    options.check(source.config.context)
    if options.method == "gptq" and source.config.experts:
        raise ParameterError(f"method = gptq does not take the experts of {source.config.architecture}; rtn does")
    options = replace(options, length=options.length or min(_LENGTH, source.config.context))
    group = source.group(grid, options.group_size)
    shards = make_shards(source.specs(grid, group), options.shard_bytes)
    samples = _samples(source, options) if options.method == "gptq" else []
    target = OutputFolder(out, _recipe(source, options, group), shards)
    if target.finished:
        return False
    work = _Work(source, target, grid, group)
    quantiser: _Quantiser = _Rounding(work) if options.method == "rtn" else _Calibrated(work, options, samples)
    quantised = {tensor for name in source.linear for tensor in source.names[name]}
    try:
        for part, names in enumerate(source.parts()):
            if progress is not None:
                progress(max(0, part - 1), source.config.num_layers)
            matrices = quantiser.layer(part - 1) if part else {}
            if part >= target.done:
                target.write({n: source.tensors[n] for n in names if n not in quantised} | _written(matrices))
        target.finish(_config(source, grid, group, options), source.copies())
    finally:
        quantiser.close()
    if progress is not None:
        progress(source.config.num_layers, source.config.num_layers)
    return True


def _samples(source: Source, options: Options) -> list[list[int]]:
    """What gptq calibrates on, tokens; fewer than were asked for, of which the log tells, if the text is short."""
    length = options.length or _LENGTH
    found = samples_of(options.text, Tokenizer.load(source.folder), options.samples, length)
    tokens = sum(map(len, found))
    if tokens < options.samples * length // 2:
        asked = f"{options.samples} samples of {length} tokens were asked for"
        _log.warning("the calibration text is short: it gives %d tokens, where %s", tokens, asked)
    return found


def _recipe(source: Source, options: Options, group: int) -> dict[str, Any]:
    """What decides about the result, as JSON."""
    found = {"source": source.fingerprint(), "format": options.format, "group_size": group, "method": options.method}
    found["shard_bytes"] = options.shard_bytes
    if options.text:
        text = hashlib.sha256(options.text.encode()).hexdigest()[:16]
        found |= {"text": text, "samples": options.samples, "length": options.length}
    return found


def _config(source: Source, grid: Grid, group: int, options: Options) -> dict[str, Any]:
    sort = options.method == "gptq"
    return {**source.config.raw, "quantization_config": config_of(grid, group, ("lm_head", *source.plain), sort)}


def _written(matrices: Mapping[str, Quantised]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of quantised matrices. matrices: by the name of the plain tensor, "....weight"."""
    return {
        f"{name.removesuffix('weight')}{end}": array
        for name, q in matrices.items()
        for end, array in tensors_of(q).items()
    }


@dataclass(frozen=True)
class _Work:
    """What is quantised to what. group: columns that share a scale, 0 for whole rows."""

    source: Source
    target: OutputFolder
    grid: Grid
    group: int

    def linear(self, layer: int) -> list[str]:
        """The canonical names of the layer's matrices, in the order in which the layer uses them."""
        return [name for name in self.source.linear if layer_of(name) == layer]

    def done(self, layer: int) -> bool:
        """Whether the layer is written."""
        return layer + 1 < self.target.done

    def checked(self, tensor: str, q: Quantised) -> Quantised:
        """A matrix that was quantised. Raises CheckpointError for one that held what no scale can stand for."""
        if not np.isfinite(q.scales).all():
            raise CheckpointError(
                f"{self.source.folder}: tensor {tensor} holds numbers that are not finite, or too large for scales in"
                f" {dtype_name(q.dtype)}"
            )
        return q

    def read(self, tensor: str) -> Quantised:
        """A matrix that is written."""
        plain = self.source.tensors[tensor]
        m, k = plain.shape
        begin = tensor.removesuffix("weight")
        tensors = {end: self.target.read(begin + end) for end in tensor_specs(self.grid, self.group, m, k, "F32")}
        return read_tensors(tensors, self.grid, self.group, k)


class _Quantiser(Protocol):
    def layer(self, layer: int) -> dict[str, Quantised]:
        """The layer's matrices by the names of their tensors; maybe none if it is written already."""

    def close(self) -> None:
        """Give back everything."""


class _Rounding:
    """Each number to the nearest."""

    def __init__(self, work: _Work) -> None:
        self._work = work

    def layer(self, layer: int) -> dict[str, Quantised]:
        work = self._work
        tensors = [] if work.done(layer) else [t for name in work.linear(layer) for t in work.source.names[name]]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return dict(zip(tensors, threads.map(self._rounded, tensors), strict=True))

    def _rounded(self, tensor: str) -> Quantised:
        work, array = self._work, self._work.source.tensors[tensor]
        with np.errstate(all="ignore"):  # what is not finite is refused
            return work.checked(tensor, round_to_nearest(array, work.grid, work.group, array.dtype))

    def close(self) -> None:
        pass


class _Calibrated:
    """By GPTQ. Every matrix is calibrated on what the quantised matrices before it give it."""

    def __init__(self, work: _Work, options: Options, samples: Sequence[Sequence[int]]) -> None:
        self._work, self._source = work, work.source
        config, weights = self._source.config, self._source.weights
        length = options.length or _LENGTH
        # One layer's weights are on the device at a time, and its cache: as of a model with a single layer.
        one = replace(config, layers=config.layers[:1])
        few = {name: weight for name, weight in weights.items() if (layer_of(name) or 0) == 0 and name != "lm_head"}
        self._backend, _ = open_backend(Setup(options.device, "auto", length, length), one, few)
        try:
            self._calibration = Calibration(self._backend, config, samples, work.target.path)
            self._calibration.embed(self._load(["embed_tokens", *{"position_table"} & weights.keys()]))
        except BaseException:
            self._backend.close()
            raise

    def layer(self, layer: int) -> dict[str, Quantised]:
        linear = self._work.linear(layer)
        found: dict[str, Quantised] = {}
        read = linear if self._work.done(layer) else []
        loaded = self._load(n for n in self._source.weights if layer_of(n) == layer and n not in read)
        for name in linear:
            if self._work.done(layer):
                parts = {tensor: self._work.read(tensor) for tensor in self._source.names[name]}
            else:
                parts = self._quantised(name, self._calibration.hessian(layer, name, loaded))
            numbers = np.concatenate([q.numbers() for q in parts.values()])
            loaded[name] = self._backend.upload(numbers.astype(self._backend.dtype))
            found |= parts
        if layer + 1 < self._source.config.num_layers:
            self._calibration.advance(layer, loaded)
        return found

    def _quantised(self, name: str, hessian: Matrix) -> dict[str, Quantised]:
        """The tensors that a weight is stacked of: one after the other, with the same inputs."""
        work = self._work
        arrays = {tensor: self._source.tensors[tensor] for tensor in self._source.names[name]}
        stacked = np.concatenate([np.asarray(upcast(a), np.float32) for a in arrays.values()])
        with np.errstate(all="ignore"):  # what is not finite is refused
            q = gptq(stacked, hessian, work.grid, work.group, next(iter(arrays.values())).dtype)
        found, at = {}, 0
        for tensor, array in arrays.items():
            found[tensor] = work.checked(tensor, q[at : at + len(array)])
            at += len(array)
        return found

    def _load(self, names: Iterable[str]) -> dict[str, Array]:
        """Weights on the device, by canonical name."""
        loaded = {name: self._backend.load_weight(self._source.weights[name]) for name in names}
        self._backend.end_loading()
        return loaded

    def close(self) -> None:
        self._backend.close()
