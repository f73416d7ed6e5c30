"""What a run folder already holds, and so what is left to do. The data are the ledger."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from avflow.orchestrator.parts import find_parts, read_columns
from avflow.orchestrator.paths import RunPaths, TableName
from avflow.orchestrator.plan import Plan, unit_id
from avflow.workers.protocol import UnitSpec

_CURVE = ("model", "dataset", "sample_id", "pathway", "window", "variant")
_INTERVENTION = ("model", "dataset", "sample_id", "kind", "intervention")
_PROBE = ("model", "dataset", "sample_id", "probe")
_SAMPLE = ("model", "dataset", "sample_id", "correct")
_FAILURE = ("unit_id", "curve", "terminal")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """Curves, interventions and probes by (unit, key), samples' correctness by unit, and terminal
    failures: (unit, key), None where the whole sample was given up."""

    curves: frozenset[tuple[str, str]] = frozenset()
    samples: dict[str, bool] = field(default_factory=dict)
    failures: frozenset[tuple[str, str | None]] = frozenset()


def stored_state(paths: RunPaths) -> StoredState:
    """Read from the parts alone. Torn and foreign files are named in a warning and left out."""
    curves = {
        (unit_id(model, dataset, sample), f"{pathway}/k{window}/{variant}")
        for model, dataset, sample, pathway, window, variant in _distinct(paths, "cells", _CURVE)
    }
    curves.update(
        (unit_id(model, dataset, sample), f"{kind}/{name}")
        for model, dataset, sample, kind, name in _distinct(paths, "interventions", _INTERVENTION)
    )
    curves.update(
        (unit_id(model, dataset, sample), f"probe/{name}")
        for model, dataset, sample, name in _distinct(paths, "probes", _PROBE)
    )
    samples: dict[str, bool] = {
        unit_id(model, dataset, sample): correct
        for model, dataset, sample, correct in _distinct(paths, "samples", _SAMPLE)
    }
    failures = frozenset(
        (unit, curve)
        for unit, curve, terminal in _distinct(paths, "failures", _FAILURE)
        if terminal and unit is not None
    )
    return StoredState(curves=frozenset(curves), samples=samples, failures=failures)


def remaining(plan: Plan, done: StoredState, *, retry_failed: bool = False) -> list[UnitSpec]:
    """The plan's units that are not complete, in its order, each with `wanted` = what it lacks.

    A unit is complete when its samples row is there and every curve is stored, given up, or not
    called for because the baseline is wrong; or when the sample was given up whole.
    `retry_failed` takes up again what was given up.
    """
    given_up = defaultdict[str, set[str | None]](set)
    if not retry_failed:
        for unit, curve in done.failures:
            given_up[unit].add(curve)
    stored = defaultdict[str, set[str]](set)
    for unit, curve in done.curves:
        stored[unit].add(curve)
    units = []
    for spec in plan.units:
        lost = given_up.get(spec.unit_id, set())
        if None in lost:
            continue
        correct = done.samples.get(spec.unit_id)
        wanted = frozenset(
            curve.key
            for curve in spec.work
            if not (correct is False and curve.correct_only)
            and curve.key not in stored.get(spec.unit_id, ())
            and curve.key not in lost
        )
        if wanted or correct is None:
            units.append(replace(spec, wanted=wanted))
    return units


def _distinct(
    paths: RunPaths, table: TableName, columns: tuple[str, ...]
) -> Iterator[tuple[Any, ...]]:
    for part in find_parts(paths.table(table)):
        found = read_columns(part, columns)
        if found is not None:
            rows: pa.Table = found.group_by(list(columns)).aggregate([])
            yield from zip(*(rows[name].to_pylist() for name in columns), strict=True)
