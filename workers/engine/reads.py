"""Which keys each replayed query reads, as a few rectangles and triangles, never an N x N mask.

A knockout blocks whole segments from whole segments (paper section 3, Eq. 2), so the queries fall
into runs: neighbours that lose the same earlier keys and read each other causally. A run reads
  - itself: a causal triangle (`Square`), and
  - what comes before it and is not blocked: a full rectangle (`Rect`) for each kind of key.
No part holds a closed edge, so no part needs a mask; a softmax over several parts is put together
from their log-sum-exps. Each query lies in exactly one square, and a square holds the query's own
position: a softmax without a key can't occur.

Keys are of two kinds: `shared` ones, the baseline's, the same for all rows of a batch, and `own`
ones, which a row computes anew. Positions count from 0 over the whole prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.pathways.layout import Layout

Span = tuple[int, int]  # half-open, of positions


class ReadsError(RuntimeError):
    """The parts hold other edges than the segments leave open: a fault of the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Positions within `shared` or `own` keys, ascending: a slice, or an index int64 on the
    device where they are spread out."""

    shared: bool
    at: slice | Tensor
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """A run's queries and, as keys, the same positions: causal, or each reading itself `alone`."""

    queries: slice
    keys: Keys
    alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rect:
    """These queries read the first `n` of the key list number `keys`, all of them."""

    queries: slice
    keys: int
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """All that the queries of one row read at one layer. `edges` are (query, key) pairs."""

    n_queries: int
    squares: tuple[Square, ...]
    rects: tuple[Rect, ...]
    keys: tuple[Keys, ...]
    edges: int


@dataclass(slots=True, kw_only=True)
class _Run:
    """Neighbouring queries [start, stop) of some segments with the same earlier keys."""

    start: int
    stop: int
    segments: list[int]
    alone: bool


@dataclass(slots=True, kw_only=True)
class _Chain:
    """A list of keys that grows from run to run: each run reads what was in it by then."""

    shared: bool
    spans: tuple[Span, ...]
    reach: int  # spans are complete up to here


def plan_reads(
    layout: Layout,
    blocked: NDArray[np.bool_] | None,
    queries: Sequence[Span],
    own_from: int,
    device: torch.device,
) -> Reads:
    """What queries at these positions (ascending spans) read. `blocked` [S, S] (query, key)
    segments, None for plain causal; keys from `own_from` on are the row's own.

    Raises ReadsError if the parts' edges are not those that `blocked` leaves.
    """
    if blocked is None:
        blocked = np.zeros((len(layout.segments),) * 2, dtype=np.bool_)
    runs = _runs(layout, blocked, queries)
    chains: list[_Chain] = []
    squares, rects, at, edges = [], [], 0, 0
    for run in runs:
        n = run.stop - run.start
        here = slice(at, at + n)
        at += n
        shared = run.stop <= own_from
        offset = 0 if shared else own_from
        inside = Keys(shared=shared, at=slice(run.start - offset, run.stop - offset), n=n)
        squares.append(Square(queries=here, keys=inside, alone=run.alone or n == 1))
        edges += n if run.alone else n * (n + 1) // 2
        earlier = _earlier(layout, blocked, run)
        for is_shared, low, high in ((True, 0, own_from), (False, own_from, layout.n_tokens)):
            spans = _clip(earlier, low, min(high, run.start))
            if not spans:
                continue
            rect = Rect(
                queries=here,
                keys=_chain_for(chains, is_shared, spans, run.start),
                n=sum(stop - start for start, stop in spans),
            )
            rects.append(rect)
            edges += n * rect.n
    expected = _open_edges(layout, blocked, queries)
    if edges != expected:
        raise ReadsError(f"the parts hold {edges} edges, the segments leave {expected} open")
    return Reads(
        n_queries=at,
        squares=tuple(squares),
        rects=tuple(_joined(rects)),
        keys=tuple(_keys(chain, own_from, device) for chain in chains),
        edges=edges,
    )


def _runs(layout: Layout, blocked: NDArray[np.bool_], queries: Sequence[Span]) -> list[_Run]:
    runs: list[_Run] = []
    for start, stop in queries:
        for number, segment in enumerate(layout.segments):
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low >= high:
                continue
            alone = bool(blocked[number, number])
            if runs and runs[-1].stop == low and _fits(layout, blocked, runs[-1], number):
                runs[-1].stop = high
                runs[-1].segments.append(number)
            else:
                runs.append(_Run(start=low, stop=high, segments=[number], alone=alone))
    return runs


def _fits(layout: Layout, blocked: NDArray[np.bool_], run: _Run, segment: int) -> bool:
    """Whether a segment reads the whole run, itself, and what the run reads before it."""
    if run.alone or blocked[segment, segment] or blocked[segment, run.segments].any():
        return False
    first = run.segments[0]
    before = first + (layout.segments[first].start < run.start)
    return bool((blocked[segment, :before] == blocked[first, :before]).all())


def _earlier(layout: Layout, blocked: NDArray[np.bool_], run: _Run) -> tuple[Span, ...]:
    """The open keys before a run, neighbouring segments merged."""
    spans: list[Span] = []
    for number, segment in enumerate(layout.segments):
        stop = min(segment.stop, run.start)
        if segment.start >= stop or blocked[run.segments[0], number]:
            continue
        if spans and spans[-1][1] == segment.start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((segment.start, stop))
    return tuple(spans)


def _clip(spans: Sequence[Span], low: int, high: int) -> tuple[Span, ...]:
    clipped = ((max(start, low), min(stop, high)) for start, stop in spans)
    return tuple((start, stop) for start, stop in clipped if start < stop)


def _chain_for(chains: list[_Chain], shared: bool, spans: tuple[Span, ...], reach: int) -> int:
    """The number of the list that begins with what this run reads; it is extended, or begun."""
    for number, chain in enumerate(chains):
        if chain.shared == shared and _clip(spans, 0, chain.reach) == chain.spans:
            chain.spans, chain.reach = spans, reach
            return number
    chains.append(_Chain(shared=shared, spans=spans, reach=reach))
    return len(chains) - 1


def _joined(rects: Sequence[Rect]) -> Iterator[Rect]:
    """Neighbouring queries that read the very same keys in one rectangle."""
    ordered = sorted(rects, key=lambda r: (r.keys, r.queries.start))
    held: Rect | None = None
    for rect in ordered:
        if (
            held is not None
            and (held.keys, held.n) == (rect.keys, rect.n)
            and held.queries.stop == rect.queries.start
        ):
            held = replace(held, queries=slice(held.queries.start, rect.queries.stop))
            continue
        if held is not None:
            yield held
        held = rect
    if held is not None:
        yield held


def _keys(chain: _Chain, own_from: int, device: torch.device) -> Keys:
    offset = 0 if chain.shared else own_from
    spans = [(start - offset, stop - offset) for start, stop in chain.spans]
    n = sum(stop - start for start, stop in spans)
    if len(spans) == 1:
        return Keys(shared=chain.shared, at=slice(*spans[0]), n=n)
    index = torch.cat([torch.arange(start, stop) for start, stop in spans])
    return Keys(shared=chain.shared, at=index.to(device), n=n)


def _open_edges(layout: Layout, blocked: NDArray[np.bool_], queries: Sequence[Span]) -> int:
    """Causal edges of the queries less the blocked ones, counted another way than the parts:
    segment by segment."""
    asked = np.zeros(layout.n_tokens, dtype=np.int64)
    for start, stop in queries:
        asked[start:stop] = 1
    bounds = [segment.start for segment in layout.segments] + [layout.n_tokens]
    per_segment = np.array([asked[a:b].sum() for a, b in pairwise(bounds)])
    lengths = np.diff(bounds)
    earlier = np.tril(~blocked, -1) @ lengths
    total = int((per_segment * earlier).sum())
    for number, (a, b) in enumerate(pairwise(bounds)):
        if per_segment[number]:
            inside = np.arange(1, b - a + 1)
            total += int((asked[a:b] * (1 if blocked[number, number] else inside)).sum())
    return total
