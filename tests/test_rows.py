"""Rows that begin alike are one row until they part; batches hold each once, in their budget."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avflow.pathways import catalogue
from avflow.pathways.pathway import blocked_segments, first_target
from avflow.pathways.windows import window_layers
from avflow.workers.engine.memory import (
    HEAD_ROWS,
    Shapes,
    batch_bytes,
    head_bytes,
    piece_rows,
    rows_in_budget,
)
from avflow.workers.engine.plan import compose_batches, halves
from avflow.workers.engine.rows import Knockout, family, steps

SHAPES = Shapes(
    n_layers=12, hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=128, vocabulary=200,
    n_tokens=200, item_bytes=4,
)  # fmt: skip

layer_sets = st.sets(st.integers(0, 9), min_size=1, max_size=6).map(lambda s: tuple(sorted(s)))


@given(asked=st.lists(st.tuples(st.integers(0, 2), layer_sets), min_size=1, unique=True))
def test_each_layer_is_walked_once_for_rows_that_are_still_one(asked) -> None:
    """Follow the steps: at each layer every row's history is what its parent's was."""
    rows = family(sorted(asked))
    history: dict[int, tuple[int, ...]] = {}  # masked layers that a live row has been through
    work = 0
    for step in steps(rows, range(10), trunk_until=0):
        for child, parent in step.forks:
            assert child not in history
            history[child] = history[parent]
        for row in step.joins:
            assert step.trunk
            assert row in step.masked
        running = [*step.running, *step.joins]
        work += len(running)
        assert len({(rows[i].mask, history.get(i, ()), i in step.masked) for i in running}) == len(
            running
        ), "two rows with one past and one future at this layer"
        for row in running:
            masked = (step.layer,) if row in step.masked else ()
            history[row] = history.get(row, ()) + masked
    for number, row in enumerate(rows):
        assert history[number] == row.layers
    distinct = {
        (mask, layers[: sum(x <= layer for x in layers)], layer)
        for mask, layers in asked
        for layer in range(layers[0], 10)
    }
    assert work == len(distinct)  # no state is computed twice


def test_windows_clipped_at_the_first_layer_share_their_beginning() -> None:
    windows = [tuple(window_layers(c, 7, 12)) for c in range(12)]
    rows = family([(0, layers) for layers in sorted(set(windows))])
    trunk_born = [row for row in rows if row.parent is None]
    assert len(trunk_born) == 12 - 3  # centres 0 to 3 begin at layer 0 together
    assert sorted(row.born for row in rows if row.parent is not None) == [4, 5, 6]


def knockouts(layout, n_layers: int, window: int = 3) -> list[Knockout]:
    made = []
    for pathway in (p for p in catalogue.ALL if p.layout == layout.kind):
        blocked = blocked_segments(layout, pathway)
        layers = tuple(tuple(window_layers(c, window, n_layers)) for c in range(n_layers))
        start = first_target(layout, blocked)
        made.append(Knockout(blocked=blocked, start=start, layer_sets=layers))
    return made


@pytest.mark.parametrize("budget", [1, 2**21, 2**30])
def test_batches_answer_every_row_once_within_their_budget(random_layout, budget: int) -> None:
    layout = random_layout("single_video", 200, 15)
    asked = knockouts(layout, 12)
    batches = compose_batches(layout, asked, SHAPES, budget)
    answers = [answer for batch in batches for row in batch.wanted_by for answer in row]
    assert sorted(answers) == [(i, c) for i in range(len(asked)) for c in range(12)]
    assert all(a.start >= b.start for a, b in pairwise(batches))
    for batch in batches:
        for number in batch.knockouts:
            start = asked[number].start
            assert start is not None
            assert batch.start <= start
            redone = sum(12 - layers[0] for layers in asked[number].layer_sets)
            assert (start - batch.start) * redone <= (200 - start) * 12
        assert batch.first_layer == min(row.layers[0] for row in batch.rows)
        held = batch_bytes(SHAPES, batch.start, len(batch.rows), budget)
        heads = head_bytes(SHAPES, HEAD_ROWS)
        alone = len(batch.rows) == 1 or piece_rows(SHAPES, batch.start, budget) == 1
        assert alone or held <= budget + heads
    for group in {batch.group for batch in batches}:
        assert next(b for b in batches if b.group == group).control
        assert sum(b.control for b in batches if b.group == group) == 1


def test_composition_follows_from_the_curves_alone(random_layout) -> None:
    layout = random_layout("interleaved", 200, 3)
    once = compose_batches(layout, knockouts(layout, 12), SHAPES, 2**21)
    again = compose_batches(layout, knockouts(layout, 12), SHAPES, 2**21)
    assert [(b.start, b.rows, b.wanted_by) for b in once] == [
        (b.start, b.rows, b.wanted_by) for b in again
    ]


def test_halves_hold_the_same_rows_and_one_control(random_layout) -> None:
    layout = random_layout("single_video", 200, 15)
    batch = compose_batches(layout, knockouts(layout, 12), SHAPES, 2**30)[-1]
    first, second = halves(batch)
    assert first.wanted_by + second.wanted_by == batch.wanted_by
    assert [(r.mask, r.layers) for r in first.rows + second.rows] == [
        (r.mask, r.layers) for r in batch.rows
    ]
    assert (first.control, second.control) == (True, False)
    assert first.first_layer == batch.first_layer
    assert first.hand_over == second.first_layer == second.rows[0].layers[0]
    assert second.hand_over is None


def test_a_bigger_budget_never_holds_fewer_rows() -> None:
    sizes = [rows_in_budget(SHAPES, 50, 2**power) for power in range(10, 34)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1


def test_masks_that_are_equal_are_one(random_layout) -> None:
    layout = random_layout("single_video", 200, 15)
    one = knockouts(layout, 12)[5]
    batches = compose_batches(layout, [one, one], SHAPES, 2**30)
    assert [len(batch.masks) for batch in batches] == [1]
    assert all(len(answers) == 2 for batch in batches for answers in batch.wanted_by)
    assert np.array_equal(batches[0].masks[0].blocked, one.blocked)
