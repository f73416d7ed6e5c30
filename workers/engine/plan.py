"""Which rows go through together: a function of the sample's curves and shapes alone.

Float32 results move in their last bits with a batch's composition, so it must not depend on what
is still missing, on free memory or on timing: an interrupted run, resumed, then gives equal bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from avflow.pathways.layout import Layout
from avflow.workers.engine.memory import Shapes, rows_in_budget
from avflow.workers.engine.reads import Span
from avflow.workers.engine.rows import Knockout, Layers, Row, family, target_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Blocked segments [S, S], and the targets' spans from the batch's start on."""

    blocked: NDArray[np.bool_]
    targets: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that are replayed together, from position `start` on, off a trunk that begins with the
    baseline's residual stream at layer `first_layer`.

    `wanted_by[i]` are the (knockout, layer set) numbers that row i answers. A group's batches
    follow each other up the layers: the trunk's state at layer `hand_over` is what the next one
    begins with (None: the last of its group); the one that `opens` the group begins with the
    baseline's. `control`: the trunk goes on to the last layer, as a row without a mask.
    """

    layout: Layout
    group: int
    start: int
    first_layer: int
    masks: tuple[Mask, ...]
    rows: tuple[Row, ...]
    wanted_by: tuple[tuple[tuple[int, int], ...], ...]
    opens: bool
    hand_over: int | None
    control: bool

    def trunk_until(self, n_layers: int) -> int:
        """The layer whose input the trunk is needed for, whatever leaves it."""
        return n_layers if self.control else self.hand_over or 0

    @property
    def knockouts(self) -> frozenset[int]:
        """The knockouts that it answers, in part or in whole."""
        return frozenset(knockout for asked in self.wanted_by for knockout, _ in asked)


def compose_batches(
    layout: Layout, knockouts: Sequence[Knockout], shapes: Shapes, byte_budget: int
) -> tuple[Batch, ...]:
    """Batches whose states and activations fit `byte_budget`; late positions, the cheap ones,
    first. Rows are ordered by first masked layer, so that a batch's trunk is short. A knockout
    that changes nothing has no row. A group's batches belong together: all answer its curves.
    """
    batches: list[Batch] = []
    for number, (start, members) in enumerate(_groups(knockouts, shapes)):
        asked: dict[tuple[int, Layers], list[tuple[int, int]]] = {}
        masks: list[NDArray[np.bool_]] = []
        known: dict[bytes, int] = {}
        for knockout in members:
            blocked = knockouts[knockout].blocked
            mask = known.setdefault(blocked.tobytes(), len(masks))
            if mask == len(masks):
                masks.append(blocked)
            for index, layers in enumerate(knockouts[knockout].layer_sets):
                asked.setdefault((mask, layers), []).append((knockout, index))
        ordered = sorted(asked, key=lambda row: (row[1][0], row[0], row[1]))
        held = tuple(Mask(blocked=b, targets=target_spans(layout, b, start)) for b in masks)
        size = rows_in_budget(shapes, start, byte_budget)
        for at in range(0, len(ordered), size):
            part = ordered[at : at + size]
            batches.append(
                Batch(
                    layout=layout,
                    group=number,
                    start=start,
                    first_layer=part[0][1][0],
                    masks=held,
                    rows=family(part),
                    wanted_by=tuple(tuple(asked[row]) for row in part),
                    opens=at == 0,
                    hand_over=ordered[at + size][1][0] if at + size < len(ordered) else None,
                    control=at == 0,
                )
            )
    return tuple(batches)


def checkpoints(batches: Sequence[Batch]) -> set[tuple[int, int]]:
    """(layer, start) where the baseline is kept: where each group's first batch begins."""
    return {(batch.first_layer, batch.start) for batch in batches if batch.opens}


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The same work in two, for a device that turned out too small. At least two rows."""
    cut = len(batch.rows) // 2
    between = batch.rows[cut].layers[0]
    rows = [(row.mask, row.layers) for row in batch.rows]
    first = replace(
        batch, rows=family(rows[:cut]), wanted_by=batch.wanted_by[:cut], hand_over=between
    )
    second = replace(
        batch,
        first_layer=between,
        rows=family(rows[cut:]),
        wanted_by=batch.wanted_by[cut:],
        opens=False,
        control=False,
    )
    return first, second


def _groups(knockouts: Sequence[Knockout], shapes: Shapes) -> list[tuple[int, list[int]]]:
    """(start, knockouts) by first changed position, the latest first.

    Knockouts that start later join a group if the positions that they would redo there cost less
    than a trunk of their own.
    """
    by_start: dict[int, list[int]] = {}
    for number, knockout in enumerate(knockouts):
        if knockout.start is not None and knockout.layer_sets:
            by_start.setdefault(knockout.start, []).append(number)
    groups: list[tuple[int, list[int]]] = []
    for start in sorted(by_start):
        row_layers = sum(
            shapes.n_layers - layers[0]
            for number in by_start[start]
            for layers in knockouts[number].layer_sets
        )
        trunk = (shapes.n_tokens - start) * shapes.n_layers
        if groups and (start - groups[-1][0]) * row_layers <= trunk:
            groups[-1][1].extend(by_start[start])
        else:
            groups.append((start, list(by_start[start])))
    return groups[::-1]
