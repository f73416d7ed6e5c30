"""What replayed queries read: rectangles and triangles against the dense mask they stand for."""

import numpy as np
import pytest
import torch
from engine_ways import clip_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from avflow.pathways import catalogue
from avflow.pathways.layout import Layout
from avflow.pathways.pathway import blocked_segments
from avflow.workers.engine import flex, reads
from avflow.workers.engine.reads import Keys, Reads, plan_reads
from avflow.workers.engine.rows import target_spans

CPU = torch.device("cpu")


def dense(layout: Layout, blocked: np.ndarray | None) -> np.ndarray:
    """bool [N, N]: the mask by its definition."""
    n = layout.n_tokens
    allowed = np.tril(np.ones((n, n), dtype=bool))
    if blocked is not None:
        segment = layout.segment_of_position
        allowed &= ~blocked[segment][:, segment]
        np.fill_diagonal(allowed, True)
    return allowed


def drawn(plan: Reads, queries: list[int], own_from: int, n: int) -> np.ndarray:
    """int [q, N]: how often a query's parts hold a key."""
    held = np.zeros((len(queries), n), dtype=int)

    def places(keys: Keys, first: int) -> np.ndarray:
        at = keys.at
        index = np.arange(at.start, at.stop) if isinstance(at, slice) else at.numpy()
        assert len(index) == keys.n
        return index[:first] + (0 if keys.shared else own_from)

    for square in plan.squares:
        rows = np.arange(square.queries.start, square.queries.stop)
        keys = places(square.keys, square.keys.n)
        shape = np.eye(len(rows), dtype=int) if square.alone else np.tri(len(rows), dtype=int)
        held[np.ix_(rows, keys)] += shape
    for rect in plan.rects:
        rows = np.arange(rect.queries.start, rect.queries.stop)
        held[np.ix_(rows, places(plan.keys[rect.keys], rect.n))] += 1
    return held


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layout, np.ndarray | None, list[tuple[int, int]], int]:
    layout = clip_of(*draw(st.lists(st.integers(1, 5), min_size=1, max_size=9)))
    n_segments, n = len(layout.segments), layout.n_tokens
    blocked = draw(
        st.none() | arrays.arrays(np.bool_, (n_segments, n_segments), elements=st.booleans())
    )
    if blocked is not None and draw(st.booleans()):
        np.fill_diagonal(blocked, False)
    start = draw(st.integers(0, n - 1))
    if draw(st.booleans()):  # a suffix, its own keys
        return layout, blocked, [(start, n)], start
    cuts = sorted(draw(st.sets(st.integers(start, n), min_size=2, max_size=6)) | {n})
    spans = list(zip(cuts[::2], cuts[1::2], strict=False)) or [(n - 1, n)]
    return layout, blocked, spans, draw(st.sampled_from([start, n])) if spans[0][0] >= start else n


@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_parts_hold_each_open_edge_once_and_no_other(problem) -> None:
    layout, blocked, spans, own_from = problem
    plan = plan_reads(layout, blocked, spans, own_from, CPU)
    queries = [p for start, stop in spans for p in range(start, stop)]
    expected = dense(layout, blocked)[queries]
    assert plan.n_queries == len(queries)
    assert plan.edges == expected.sum()
    np.testing.assert_array_equal(drawn(plan, queries, own_from, layout.n_tokens), expected)


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_no_query_is_ever_without_a_key(problem) -> None:
    """Each query lies in exactly one square, which holds its own position: by construction."""
    layout, blocked, spans, own_from = problem
    plan = plan_reads(layout, blocked, spans, own_from, CPU)
    covered = sorted(i for s in plan.squares for i in range(s.queries.start, s.queries.stop))
    assert covered == list(range(plan.n_queries))
    for square in plan.squares:
        assert square.keys.n == square.queries.stop - square.queries.start


@pytest.mark.parametrize("kind", ["single_video", "interleaved"])
def test_every_pathway_is_read_as_its_definition_says(random_layout, kind) -> None:
    layout = random_layout(kind, 150, 4)
    for pathway in (p for p in catalogue.ALL if p.layout == kind):
        blocked = blocked_segments(layout, pathway)
        spans = target_spans(layout, blocked, 0)
        for queries, own_from in ((((20, 150),), 20), (spans, 150)):
            plan = plan_reads(layout, blocked, queries, own_from, CPU)
            asked = [p for start, stop in queries for p in range(start, stop)]
            held = drawn(plan, asked, own_from, 150)
            np.testing.assert_array_equal(held, dense(layout, blocked)[asked])


def test_question_targets_take_three_parts_and_no_copy_of_their_own_keys(random_layout) -> None:
    layout = random_layout("single_video", 150, 4)
    (pathway,) = catalogue.find("video_to_question")
    blocked = blocked_segments(layout, pathway)
    ((start, stop),) = target_spans(layout, blocked, 0)
    plan = plan_reads(layout, blocked, ((start, stop + 1),), start, CPU)
    # The question reads itself and what is open before it; the last position reads all.
    assert len(plan.squares) + len(plan.rects) <= 5
    assert all(isinstance(keys.at, slice) for keys in plan.keys if not keys.shared)


def test_parts_that_miss_an_edge_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = clip_of(3, 4, 5)
    blocked = np.zeros((4, 4), dtype=bool)
    blocked[2, 0] = True
    whole = reads._earlier
    monkeypatch.setattr(reads, "_earlier", lambda *arguments: whole(*arguments)[1:])
    with pytest.raises(reads.ReadsError, match="the segments leave"):
        plan_reads(layout, blocked, ((3, 13),), 3, CPU)


@settings(deadline=None, max_examples=100)
@given(problem=problems(), size=st.sampled_from([2, 3, 4]))
def test_blocks_of_the_compiled_backend_cover_the_open_edges(problem, size: int) -> None:
    """With small blocks: empty ones hold no open edge, full ones no closed one."""
    layout, blocked, spans, _ = problem
    asked = np.concatenate([np.arange(start, stop) for start, stop in spans])
    keys = np.arange(layout.n_tokens)
    closed = np.zeros((len(layout.segments),) * 2, dtype=bool) if blocked is None else blocked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", size)
        empty, full = flex._occupancy(layout, closed, asked, keys)
    allowed = dense(layout, closed)[asked]
    assert not (empty & full).any()
    for i in range(empty.shape[0]):
        for j in range(empty.shape[1]):
            block = allowed[i * size : (i + 1) * size, j * size : (j + 1) * size]
            if empty[i, j]:
                assert not block.any()
            if full[i, j]:
                assert block.shape == (size, size)
                assert block.all()
