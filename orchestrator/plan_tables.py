"""The plan as tables, for whoever reads a run folder without its sweep file."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from avflow.datasets.sample import LETTERS
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan, group_of

# Spelled out where a plan may hold no row: a table without rows would have no columns either.
_JOBS = pa.schema(
    {
        "job_id": pa.string(),
        "model": pa.string(),
        "dataset": pa.string(),
        "task": pa.string(),
        "layout": pa.string(),
        "pathway": pa.string(),
        "variant": pa.string(),
        "window": pa.int64(),
        "center_layer": pa.int64(),
        "samples": pa.int64(),
    }
)
_CURVES = pa.schema(
    {
        "model": pa.string(),
        "dataset": pa.string(),
        "task": pa.string(),
        "layout": pa.string(),
        "curve": pa.string(),
        "pathway": pa.string(),
        "label": pa.string(),
        "window": pa.int64(),
        "variant": pa.string(),
        "correct_only": pa.bool_(),
        "center_layers": pa.list_(pa.int64()),
        "job_ids": pa.list_(pa.string()),
    }
)
_EXTRAS = pa.schema(
    {
        "unit_id": pa.string(),
        "curve": pa.string(),
        "layers": pa.list_(pa.int64()),
        "correct_only": pa.bool_(),
    }
)
_COUNTS = pa.schema(
    {
        "dataset": pa.string(),
        "task": pa.string(),
        "part": pa.string(),
        "expected": pa.int64(),
        "found": pa.int64(),
        "within": pa.int64(),
        "good": pa.bool_(),
    }
)
_LEFT_OUT = pa.schema(
    {"dataset": pa.string(), "place": pa.string(), "task": pa.string(), "reason": pa.string()}
)


def plan_tables(paths: RunPaths, plan: Plan) -> Iterator[tuple[Path, pa.Table]]:
    """Each table of the plan, and its place in the run folder."""
    yield paths.jobs, pa.Table.from_pylist([asdict(job) for job in plan.jobs()], schema=_JOBS)
    yield paths.units, pa.Table.from_pylist(list(_units(plan)))
    yield paths.curves, pa.Table.from_pylist(list(_curves(plan)), schema=_CURVES)
    yield paths.counts, pa.Table.from_pylist(list(_counts(plan)), schema=_COUNTS)
    yield paths.left_out, pa.Table.from_pylist(list(_left_out(plan)), schema=_LEFT_OUT)
    yield paths.extras, pa.Table.from_pylist(list(_extras(plan)), schema=_EXTRAS)


def _units(plan: Plan) -> Iterator[dict[str, object]]:
    order = {group.key: at for at, group in enumerate(plan.groups)}
    for unit in plan.units:
        sample = unit.sample
        yield {
            "unit_id": unit.unit_id,
            "model": unit.model,
            "dataset": sample.dataset,
            "sample_id": sample.sample_id,
            "task": sample.task,
            "category": sample.category,
            "layout": sample.layout,
            "direction": sample.direction,
            "ordering": sample.ordering,
            "answer": LETTERS[sample.answer],
            "media_group": sample.media_group,
            "group": order[group_of(unit)],
            "curves": len(unit.curves),
            "cost": unit.cost,
        }


def _curves(plan: Plan) -> Iterator[dict[str, object]]:
    for group in plan.groups:
        for curve in group.curves:
            yield {
                "model": group.model,
                "dataset": group.dataset,
                "task": group.task,
                "layout": group.layout,
                "curve": curve.spec.key,
                "pathway": curve.spec.pathway.name,
                "label": curve.spec.pathway.label,
                "window": curve.spec.window,
                "variant": curve.spec.variant,
                "correct_only": curve.spec.correct_only,
                "center_layers": list(curve.spec.center_layers),
                "job_ids": list(curve.job_ids),
            }


def _extras(plan: Plan) -> Iterator[dict[str, object]]:
    for unit in plan.units:
        for spec in unit.extras:
            yield {
                "unit_id": unit.unit_id,
                "curve": spec.key,
                "layers": list(spec.layers),
                "correct_only": spec.correct_only,
            }


def _counts(plan: Plan) -> Iterator[dict[str, object]]:
    """The paper's tables against the data, row by row."""
    for name, loaded in plan.datasets.items():
        for check in loaded.checks:
            yield {"dataset": name, **asdict(check), "good": check.good}


def _left_out(plan: Plan) -> Iterator[dict[str, object]]:
    """Questions that can't be asked, and why."""
    for name, loaded in plan.datasets.items():
        for row in loaded.left_out:
            yield {"dataset": name, **asdict(row)}
