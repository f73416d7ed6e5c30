"""Rows of a batch, and which of them are one and the same up to some layer.

A knockout over a set of layers equals the undisturbed trunk until its first masked layer, and it
equals another row of the same mask until their sets of layers part. So each distinct row is born
once, at the layer where it leaves the trunk or its parent, and costs nothing before: a tree.
(Windows that are clipped at layer 0, or of several widths, share their beginnings this way.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avflow.pathways.layout import Layout
from avflow.pathways.pathway import blocked_keys
from avflow.workers.engine.reads import Span

Layers = tuple[int, ...]  # ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Knockout:
    """A mask, and the sets of layers to put it on, each one forward's worth.

    `blocked` is bool [S, S] over the layout's segments (query, key); `start` the first position
    whose attention changes, None if none does.
    """

    blocked: NDArray[np.bool_]
    start: int | None
    layer_sets: tuple[Layers, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`mask` (by number) at `layers`. Before layer `born` it is its parent: a row (by number) of
    the same batch, or, where that is None, the undisturbed trunk; then `born` is `layers[0]`."""

    mask: int
    layers: Layers
    parent: int | None
    born: int


def family(rows: Sequence[tuple[int, Layers]]) -> tuple[Row, ...]:
    """Distinct (mask, layers), each with the row that it leaves last; in the order given."""
    born: list[Row] = []
    for mask, layers in rows:
        parent, leaves = None, layers[0]
        for number, other in enumerate(born):
            if other.mask == mask:
                parting = min(set(layers) ^ set(other.layers))
                if parting > leaves:
                    parent, leaves = number, parting
        born.append(Row(mask=mask, layers=layers, parent=parent, born=leaves))
    return tuple(born)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What happens at one layer, rows by number. `forks` (child, parent) copy a state before the
    layer; `joins` leave the trunk in it, their targets alone computed; `running` go through it
    whole, the trunk too if `trunk`. `masked`: those under their mask here."""

    layer: int
    forks: tuple[tuple[int, int], ...]
    joins: tuple[int, ...]
    running: tuple[int, ...]
    trunk: bool
    masked: frozenset[int]


def steps(rows: Sequence[Row], layers: range, trunk_until: int) -> Iterator[Step]:
    """Layer by layer; no row is born before `layers` begin. The trunk runs as long as rows leave
    it, and in any case until it is the input of layer `trunk_until`."""
    joins_at = {row.born for row in rows if row.parent is None}
    for layer in layers:
        numbers = range(len(rows))
        yield Step(
            layer=layer,
            forks=tuple(
                (i, parent)
                for i in numbers
                if rows[i].born == layer and (parent := rows[i].parent) is not None
            ),
            joins=tuple(i for i in numbers if rows[i].parent is None and rows[i].born == layer),
            running=tuple(i for i in numbers if rows[i].born + (rows[i].parent is None) <= layer),
            trunk=layer < trunk_until or layer <= max(joins_at),
            masked=frozenset(i for i in numbers if layer in rows[i].layers),
        )


def target_spans(layout: Layout, blocked: NDArray[np.bool_], start: int) -> tuple[Span, ...]:
    """The segments of which a query loses a key, from position `start` on: all that a row's first
    masked layer changes."""
    lost = blocked_keys(layout, blocked)
    spans: list[Span] = []
    for segment in layout.segments:
        low = max(segment.start, start)
        if low >= segment.stop or not lost[low : segment.stop].any():
            continue
        if spans and spans[-1][1] == low:
            spans[-1] = (spans[-1][0], segment.stop)
        else:
            spans.append((low, segment.stop))
    return tuple(spans)
