"""Which rows go through together: a function of the sample's curves and shapes alone.

Float32 results move in their last bits with a batch's composition, so it must not depend on what
is still missing, on free memory or on timing: an interrupted run, resumed, then gives equal bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avflow.pathways.windows import window_layers
from avflow.workers.engine.cost import Shapes
from avflow.workers.engine.replay import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Knockout:
    """One curve as the engine needs it. `blocked` is bool [S, S] over the layout's segments
    (query, key); `start` the first position whose attention changes, None if none does."""

    blocked: NDArray[np.bool_]
    start: int | None
    window: int
    center_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows with the same first changed position."""

    start: int
    rows: tuple[Row, ...]


def compose_batches(
    knockouts: Sequence[Knockout], shapes: Shapes, byte_budget: int
) -> tuple[Batch, ...]:
    """Rows by first changed position, cut so that a batch's activations fit `byte_budget`.

    Rows stay in the order of their curves, so that a curve ends as early as it can; cheap batches
    (late positions) come first. A knockout that changes nothing has no row. Raises ValueError for
    a window that does not fit the model.
    """
    rows: dict[int, list[Row]] = {}
    for curve, knockout in enumerate(knockouts):
        if knockout.start is None:
            continue
        rows.setdefault(knockout.start, []).extend(
            Row(
                curve=curve,
                center_layer=center,
                layers=window_layers(center, knockout.window, shapes.n_layers),
            )
            for center in knockout.center_layers
        )
    batches = []
    for start in sorted(rows, reverse=True):
        size = max(1, (byte_budget - 3 * score_bytes(byte_budget)) // shapes.row_bytes(start))
        of_start = rows[start]
        batches += [
            Batch(start=start, rows=tuple(of_start[i : i + size]))
            for i in range(0, len(of_start), size)
        ]
    return tuple(batches)


def score_bytes(byte_budget: int) -> int:
    """What a piece's attention scores may take; a softmax holds them three times over, so a
    quarter of the budget goes to them."""
    return byte_budget // 12
