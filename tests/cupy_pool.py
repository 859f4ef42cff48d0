"""CuPy's memory pool on a made-up card, for tests of what happens when memory is short.

The rules are those of CuPy 14's MemoryPool: sizes in units of 512 bytes; the smallest free block that is large enough
is split; neighbours merge when they are free; a pool that the card refuses gives its own whole blocks back and asks
once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuplama.backends.gpu import Gpu
from tests.test_cuda_backend import FakeGpu, _HostArray, _HostCublas

_UNIT = 512


class OutOfMemoryError(Exception):
    """Stands for CuPy's."""


class Block:
    """A piece of what one cudaMalloc gave, between its neighbours."""

    def __init__(self, size: int, before: Block | None = None, after: Block | None = None) -> None:
        self.size, self.before, self.after = size, before, after


class Pool:
    def __init__(self, card: PoolGpu) -> None:
        self._card, self._free, self.total = card, list[Block](), 0
        card.pools_made.append(weakref.ref(self))

    def malloc(self, size: int) -> Block | None:
        size = -(-size // _UNIT) * _UNIT
        if not size:
            return None
        fits = [b for b in self._free if b.size >= size]
        if not fits:
            if self._card.used() + size > self._card.capacity:
                self.free_all_blocks()
            if self._card.used() + size > self._card.capacity:
                raise OutOfMemoryError
            self.total += size
            return Block(size)
        block = min(fits, key=lambda b: b.size)
        self._free.remove(block)
        if block.size > size:
            rest = Block(block.size - size, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._free.append(rest)
        return block

    def release(self, block: Block) -> None:
        if block.after in self._free:
            block = self._join(block, block.after)
        if block.before in self._free:
            block = self._join(block.before, block)
        self._free.append(block)

    def _join(self, left: Block, right: Block) -> Block:
        """One block of two neighbours, of which at most one is among the free."""
        self._free = [b for b in self._free if b is not left and b is not right]
        left.size += right.size
        left.after = right.after
        if left.after is not None:
            left.after.before = left
        return left

    def free_all_blocks(self) -> None:
        whole = [b for b in self._free if b.before is None and b.after is None]
        self._free = [b for b in self._free if b not in whole]
        self.total -= sum(b.size for b in whole)

    def free_bytes(self) -> int:
        return sum(b.size for b in self._free)


class PoolGpu(FakeGpu):
    """A card of so many bytes. Its kernels do nothing, so arrays of any size cost the test no memory."""

    def __init__(self, capacity: int = 1 << 60) -> None:
        cublas = _HostCublas()
        cublas.product = lambda *_, **__: _nothing  # type: ignore[method-assign]
        self.capacity, self.pools_made = capacity, list["weakref.ref[Pool]"]()
        super().__init__(cublas=cublas)
        card = self

        class Device:
            @property
            def mem_info(self) -> tuple[int, int]:
                return card.capacity - card.used(), card.capacity

        self._device: Any = Device()
        self._cupy: Any = SimpleNamespace(
            cuda=SimpleNamespace(memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError))
        )
        self.pool: Any = Pool(self)
        self._main_pool = self.pool
        self.give_back: Callable[[], None] = lambda: None
        self._capturing = False
        self.array_type: Any = self._array

    def used(self) -> int:
        return sum(pool.total for ref in self.pools_made if (pool := ref()) is not None)

    def _array(self, shape: tuple[int, ...], dtype: np.dtype[Any], block: Block | None) -> _HostArray:
        array = np.zeros(shape, dtype).view(_HostArray)
        if block is not None:
            weakref.finalize(array, self.pool.release, block)
        return array

    empty, free_memory = Gpu.empty, Gpu.free_memory

    def new_pool(self) -> Any:
        return Pool(self)

    def capture(self, body: Callable[[], None]) -> Any:
        self._capturing, self.captured = True, _Forgets()
        try:
            body()
        finally:
            self._capturing, self.captured = False, None
        return SimpleNamespace(launch=lambda stream: None)


class _Forgets(list[Callable[[], None]]):
    def append(self, _: Callable[[], None]) -> None:
        pass


def _nothing(*_: int, **__: int) -> None:
    pass


_nothing.text = "a product"  # type: ignore[attr-defined]


def weights_on(gpu: PoolGpu, shapes: dict[str, tuple[int, ...]], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Weights of zeros."""
    return {name: gpu.empty(shape, dtype) for name, shape in shapes.items()}
