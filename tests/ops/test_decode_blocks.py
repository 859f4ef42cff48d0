"""How decode attention shares out keys: what a multiprocessor is said to hold fits on it."""

from __future__ import annotations

import pytest

from cuplama.ops.decode_blocks import DecodeBlocks, decode_blocks, on_tensor_cores, room_bytes
from cuplama.ops.launch import Device

DEVICES = (Device(), Device(80, 108, 166912), Device(89, 128, 101376), Device(120, 170, 101376))
PAIRS = (1, 32, 64, 133, 512, 1024, 4096)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.arch}")
@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("D", [136, 144, 192, 256, 384, 512])
def test_rings_of_wide_heads_fit(D: int, C: int, device: Device) -> None:
    """With the queries [8, D + 32], the new key and value as T and as C, and each block's share for the driver."""
    if not on_tensor_cores(D, 2, C, device):
        assert (D * C) % 16 == 8
        return
    for pairs in PAIRS:
        for Q in (1, 8):
            found = decode_blocks(pairs, Q, D, C, device, True)
            block = room_bytes(found, Q, D, C) + 16 * (D + 32) + (4 + 2 * C) * D + 8 * Q * found.warps
            assert found.stages >= 1
            assert found.warps >= 1
            assert block <= device.shared
            assert found.places * (block + 1024) <= device.shared + 1024
            assert found.places * found.warps * 32 * (168 if D <= 256 else 250) <= 65536


def test_a_short_sequence_of_wide_heads_is_one_split() -> None:
    """And its block leaves half of an H200's shared memory to the product that runs before it."""
    found = decode_blocks(4, 2, 256, 2, Device(), True)
    assert found.alone >= 160 > found.keys == 16 * found.warps
    assert room_bytes(found, 2, 256, 2) + 8192 < Device().shared // 2


def test_room_for_sums_where_rings_are_smaller() -> None:
    """8 heads of 256 columns and 4 more are 8,320 bytes for each warp, a ring of e4m3 8,192; of one narrow head a
    thread has 4 columns when splits are added up."""
    assert room_bytes(DecodeBlocks(6, 256, 1, 2), 8, 256, 1) == 6 * 8320
    assert room_bytes(DecodeBlocks(6, 256, 1, 2), 1, 256, 1) == 6 * 8192
    assert room_bytes(DecodeBlocks(2, 1024, 2, 4), 1, 8, 2) == 2 * 1024
    assert room_bytes(DecodeBlocks(4, 1024, 1, 4), 1, 8, 2) == 4 * 4 * 64 * 8 // 4


@pytest.mark.parametrize(("arch", "T", "C", "D", "expected"), [
    (90, 2, 2, 256, True), (90, 2, 1, 512, True), (90, 2, 1, 136, False), (90, 2, 1, 72, True), (90, 4, 4, 64, False),
    (75, 2, 2, 64, False),
])  # fmt: skip
def test_what_goes_through_tensor_cores(arch: int, T: int, C: int, D: int, expected: bool) -> None:
    assert on_tensor_cores(D, T, C, Device(arch)) is expected
