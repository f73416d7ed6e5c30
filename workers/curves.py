"""A unit's curves on its prompt: which segments each blocks, at which sets of layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avflow.pathways.layout import Layout
from avflow.pathways.pathway import blocked_keys, blocked_segments, first_target
from avflow.pathways.windows import window_layers
from avflow.workers.engine.rows import Knockout
from avflow.workers.failing import failure
from avflow.workers.protocol import CurveSpec, UnitFailure, UnitSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A curve whose token groups were found. `n_lost` (query, key) edges a masked layer."""

    spec: CurveSpec
    knockout: Knockout
    n_lost: int

    @property
    def n_blocked_edges(self) -> NDArray[np.int64]:
        """int64 [C]: edges blocked at each centre, summed over its window."""
        layers = [len(layers) for layers in self.knockout.layer_sets]
        return np.array(layers, dtype=np.int64) * self.n_lost


def resolve(unit: UnitSpec, layout: Layout, n_layers: int) -> tuple[list[Curve], list[UnitFailure]]:
    """The unit's curves on this prompt, and the failures of those whose groups it lacks."""
    curves, lost = [], []
    for spec in unit.curves:
        try:
            windows = [window_layers(c, spec.window, n_layers) for c in spec.center_layers]
            blocked = blocked_segments(layout, spec.pathway, spec.option_span)
        except ValueError as error:  # LayoutError, or a window that does not fit the model
            lost.append(failure(unit.unit_id, spec.key, "prepare", error))
            continue
        knockout = Knockout(
            blocked=blocked,
            start=first_target(layout, blocked),
            layer_sets=tuple(tuple(window) for window in windows),
        )
        n_lost = int(blocked_keys(layout, blocked).sum())
        curves.append(Curve(spec=spec, knockout=knockout, n_lost=n_lost))
    return curves, lost


def check_wanted(unit: UnitSpec) -> None:
    """Raises ValueError for a wanted curve that is not the unit's, or a key that is there twice."""
    keys = [work.key for work in unit.work]
    unknown = unit.wanted.difference(keys)
    if unknown or len(set(keys)) < len(keys):
        raise ValueError(
            f"unit {unit.unit_id}: wanted curves must be among its own, each key once; "
            f"not among them: {sorted(unknown)}; its curves: {keys}"
        )


def knockouts_of(curves: Sequence[Curve]) -> list[Knockout]:
    """In the same order."""
    return [curve.knockout for curve in curves]
