"""The policy for captured graphs: which are kept, which make room, and what happens to one that is in use."""

from __future__ import annotations

from cuplama.engine.graphs import MAX_STEPS, GraphCache, max_logits, padded_rows, padded_sequences


class _Graph:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def _filled(most: int, *sizes: int) -> tuple[GraphCache[_Graph], dict[int, _Graph]]:
    graphs, made = GraphCache[_Graph](most), {size: _Graph() for size in sizes}
    for size, graph in made.items():
        graphs.first_time(size)
        graphs.keep(size, graph)
    return graphs, made


def test_only_a_size_that_comes_again_is_captured() -> None:
    graphs = GraphCache[_Graph](8)
    assert [graphs.first_time(size) for size in (3, 4, 3)] == [True, True, False]


def test_the_graph_that_was_not_used_for_longest_makes_room() -> None:
    graphs, made = _filled(3, 1, 3, 4)
    used = graphs.take(1)
    assert used is made[1]
    graphs.keep(1, used)
    graphs.keep(2, _Graph())
    assert graphs.sizes == [4, 1, 2]
    assert [g.closed for g in made.values()] == [0, 1, 0]
    assert graphs.first_time(3)  # its graph is gone, so the size is new again
    assert not graphs.first_time(4)


def test_a_graph_in_use_is_neither_found_nor_closed() -> None:
    graphs, made = _filled(1, 3)
    taken = graphs.take(3)
    assert taken is made[3]
    assert graphs.take(3) is None
    graphs.close()
    assert made[3].closed == 0
    graphs.keep(3, made[3])
    assert len(graphs) == 1


def test_closing_forgets_every_size() -> None:
    graphs, made = _filled(8, 3, 4)
    graphs.close()
    assert [g.closed for g in made.values()] == [1, 1]
    assert len(graphs) == 0
    assert graphs.first_time(3)


def test_rows_are_padded_to_multiples_that_grow() -> None:
    sizes = sorted({padded_rows(n) for n in range(1, 900)})
    assert sizes == [16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    assert [padded_rows(n) for n in sizes] == sizes


def test_sequences_are_padded_to_the_next_size() -> None:
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert sorted({padded_sequences(n) for n in range(1, 129)}) == sizes
    assert [padded_sequences(n) for n in sizes] == sizes
    assert len([n for n in sizes if n <= 64]) <= MAX_STEPS  # a batch that shrinks finds all its steps


def test_the_logits_of_a_pass_take_256_mib_at_most() -> None:
    assert max_logits(1 << 16) == 1024
    assert max_logits((1 << 16) + 1) == 1023
    assert max_logits(1 << 26) == max_logits(1 << 27) == 1
