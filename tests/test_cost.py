"""Token-layers and FLOPs, by hand: executed, plain, and the least that causality requires."""

import numpy as np
import pytest

from avflow.pathways.windows import window_layers
from avflow.workers.engine import cost
from avflow.workers.engine.attention import query_chunks
from avflow.workers.engine.cost import Shapes
from avflow.workers.engine.replay import Row


def test_query_pieces_cover_the_suffix_once() -> None:
    assert query_chunks(rows=2, heads=4, m=10, n_tokens=100, score_bytes=4 * 2 * 4 * 100 * 3) == [
        range(0, 3), range(3, 6), range(6, 9), range(9, 10)
    ]  # fmt: skip
    assert query_chunks(rows=2, heads=4, m=3, n_tokens=100, score_bytes=1) == [
        range(0, 1), range(1, 2), range(2, 3)
    ]  # fmt: skip
    assert query_chunks(rows=2, heads=4, m=10, n_tokens=100, score_bytes=2**30) == [range(0, 10)]


SMALL = Shapes(
    n_layers=4, hidden=2, heads=2, kv_heads=1, head_size=3, intermediate=5, vocabulary=7,
    n_tokens=10, item_bytes=4,
)  # fmt: skip


def test_flops_of_a_token_layer_by_hand() -> None:
    assert SMALL.kv_flops == 2 * (2 * 3) * 2  # k and v: 2 -> 1 head of 3
    assert SMALL.linear_flops == SMALL.kv_flops + 2 * (2 * 6) * 2 + 3 * 2 * (2 * 5)
    assert SMALL.edge_flops == 2 * 2 * (2 * 3)  # score and mix, 2 heads of 3
    assert SMALL.head_flops == 2 * 2 * 7
    assert SMALL.causal_edges(0) == 55
    assert SMALL.causal_edges(8) == 9 + 10
    plain = cost.plain_cost(SMALL, forwards=3)
    assert plain.token_layers == 3 * 4 * 10
    a_layer = 10 * SMALL.linear_flops + 100 * SMALL.edge_flops
    assert plain.flops == 3 * (4 * a_layer + SMALL.head_flops)


def test_cost_of_a_replay_by_hand() -> None:
    rows = [Row(curve=0, center_layer=c, layers=window_layers(c, 3, 4)) for c in range(4)]
    done = cost.replay_cost(SMALL, 7, rows, score_bytes=2**20)
    layers = 4 + 4 + 3 + 2  # from each window's first layer to the top
    assert done.token_layers == layers * 3
    edges = 3 * 10
    per_layer = 3 * SMALL.linear_flops + edges * SMALL.edge_flops
    assert done.flops == layers * per_layer + 4 * SMALL.head_flops


@pytest.mark.parametrize("n_layers", [8, 28, 36])
@pytest.mark.parametrize("window", [3, 7])
def test_the_floor_is_the_least_that_causality_requires(n_layers: int, window: int) -> None:
    """C_min = sum over centres of |T| + (L - 2 - a) m + 1; for T = {last} the sum of L - a."""
    shapes = Shapes(
        n_layers=n_layers, hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=128,
        vocabulary=200, n_tokens=200, item_bytes=4,
    )  # fmt: skip
    windows = [window_layers(c, window, n_layers) for c in range(n_layers)]
    rows = [Row(curve=0, center_layer=c, layers=w) for c, w in enumerate(windows)]
    plain = cost.plain_cost(shapes, forwards=n_layers)
    for targets, lost in ((range(199, 200), 30), (range(150, 190), 70)):
        lost_keys = np.zeros(200, dtype=np.int64)
        lost_keys[targets] = lost
        m = 200 - targets.start
        floor = cost.replay_floor(shapes, lost_keys, windows)
        least = sum(len(targets) + (n_layers - 2 - w.start) * m + 1 for w in windows)
        assert floor.token_layers == least
        done = cost.replay_cost(shapes, targets.start, rows, score_bytes=2**20)
        assert floor.token_layers <= done.token_layers
        assert floor.flops < done.flops < plain.flops
    assert least > sum(n_layers - w.start for w in windows)  # the sum of L - a where m = 1


def test_the_floor_by_hand() -> None:
    """Two windows of one layer over four: layer 1, then layer 3, the last."""
    lost_keys = np.array([0, 0, 0, 0, 0, 0, 0, 2, 3, 0])
    floor = cost.replay_floor(SMALL, lost_keys, [range(1, 2), range(3, 4)])
    assert floor.token_layers == (2 + 3 + 1) + 1
    first = 2 * (SMALL.linear_flops - SMALL.kv_flops) + (8 + 9 - 5) * SMALL.edge_flops
    second = 3 * SMALL.linear_flops + (8 + 9 + 10) * SMALL.edge_flops
    last = SMALL.linear_flops + 2 * SMALL.kv_flops + 10 * SMALL.edge_flops + SMALL.head_flops
    alone = SMALL.linear_flops - SMALL.kv_flops + 10 * SMALL.edge_flops + SMALL.head_flops
    assert floor.flops == first + second + last + alone
