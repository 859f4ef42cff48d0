"""The tensors of quantised modules, "x.qweight", "x.scales", ...: taken one by one, each held to dtype and shape."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from ..errors import CheckpointError
from .stored import Stored
from .tensor import Tensor

__all__ = ["FLOATS", "Module", "Modules"]

_log = logging.getLogger("cuplama")
FLOATS = ("F32", "F16", "BF16")
# The scales of quantised keys and values.
_CACHE = tuple(f".{x}_{part}" for x in ("k", "v", "q", "kv") for part in ("scale", "zero_point"))


class Module:
    """The tensors of one quantised module, by the ends of their names.

    name: the module's; names: that, and its name in the file where that is another one: settings may know it by either.
    Methods raise CheckpointError, one line that names file and tensor, what it is and what is expected.
    """

    def __init__(self, name: str, left: dict[str, Tensor], end: str) -> None:
        self.name, self._left = name, left
        self._main = left.get(name + ".weight", left[name + end])
        self.names = tuple(dict.fromkeys((name, left[name + end].name.removesuffix(end))))
        self._taken: dict[str, Tensor] = {}

    def has(self, end: str) -> bool:
        """Whether the module has a tensor with that end."""
        return self.name + end in self._left

    def tensor(self, end: str) -> Tensor:
        """A tensor, which stays."""
        if not self.has(end):
            raise CheckpointError(f"{self._main.file}: tensor {self.name}{end} is missing beside {self._main.name}")
        return self._left[self.name + end]

    @property
    def nbytes(self) -> int:
        """Bytes in the files, of what was taken."""
        return sum(t.data.nbytes for t in self._taken.values() if t.data is not None)

    def take(self, end: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """The data of a tensor, whose dtype and shape must be one of these; without shapes it is a matrix."""
        tensor = self.tensor(end)
        if tensor.dtype not in dtypes or not isinstance(tensor.data, np.ndarray):
            self.refuse(end, f"has dtype {tensor.dtype}; expected: {', '.join(dtypes)}")
        if tensor.shape not in shapes if shapes else len(tensor.shape) != 2 or 0 in tensor.shape:
            expected = " or ".join(str(list(shape)) for shape in shapes) or "two sizes, not 0"
            self.refuse(end, f"has shape {list(tensor.shape)}; expected: {expected}")
        self._taken[end] = self._left.pop(self.name + end)
        return tensor.data

    def refuse(self, end: str, problem: str) -> NoReturn:
        """Raise. problem: what is wrong with the tensor of that end."""
        tensor = self._taken[end] if end in self._taken else self.tensor(end)
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} {problem}")

    def drop(self, *ends: str) -> None:
        """Leave out tensors that are not the weight's."""
        for end in ends:
            self._left.pop(self.name + end, None)

    def put(self, weight: Stored, end: str = ".weight", shape: tuple[int, ...] = ()) -> None:
        """The module's weight. end: of its name; shape: of a weight of experts, whose rows lie one below the other."""
        main = self._main
        if self.has(end):
            codes = next(iter(self._taken.values()))
            self.refuse(end, f"is there beside {codes.name}; expected: one of the two")
        self._left[self.name + end] = Tensor(main.name, main.file, weight.format.name, shape or weight.shape, weight)


class Modules:
    """The tensors of a checkpoint; ``left`` are those that nobody has taken, and the weights that were put."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.left = dict(tensors)

    def named(self, end: str, *dtypes: str) -> Iterator[Module]:
        """The modules that have a tensor with this end, of one of these dtypes if there are any."""
        for name, tensor in list(self.left.items()):
            if name.endswith(end) and (not dtypes or tensor.dtype in dtypes):
                yield Module(name.removesuffix(end), self.left, end)

    def drop_cache_scales(self) -> None:
        """Leave out the scales that a quantised cache would have, and say so."""
        names = [name for name in self.left if name.endswith(_CACHE)]
        for name in names:
            del self.left[name]
        if names:
            _log.warning("%d scales of a quantised KV cache are left out, %s first", len(names), names[0])

    def finish(self, companions: Mapping[str, str]) -> dict[str, Tensor]:
        """What is left. companions: ends of names that no other tensor has, and that of the one they lie beside."""
        for name, tensor in self.left.items():
            for end, main in companions.items():
                if name.endswith(end):
                    owner = name.removesuffix(end) + main
                    raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is left over; there is no {owner}")
        return self.left
