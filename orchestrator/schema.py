"""The tables of a run folder, column by column (the results contract), and rows for them.

`cells` holds what the same inputs give again, to the bit; where, when and by whom a row was made
is in `samples`. Probabilities are float64.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avflow.orchestrator.paths import TableName
from avflow.orchestrator.plan import PlannedCurve
from avflow.orchestrator.policy import Decision
from avflow.workers.protocol import CurveDone, InterventionDone, ProbeDone, SampleDone, UnitSpec

SCHEMA_VERSION = 1

Columns = dict[str, list[Any]]
"""A few rows: column -> values, all of one length."""

_TIME = pa.timestamp("us", tz="UTC")
_SPANS = pa.list_(pa.list_(pa.int32()))
_GROUP = pa.struct({"group": pa.string(), "length": pa.int32(), "spans": _SPANS})

SCHEMAS: Mapping[TableName, pa.Schema] = {
    "cells": pa.schema(
        {
            "job_id": pa.string(),
            "model": pa.string(),
            "dataset": pa.string(),
            "task": pa.string(),
            "category": pa.string(),
            "pathway": pa.string(),
            "variant": pa.string(),
            "window": pa.int16(),
            "center_layer": pa.int16(),
            "sample_id": pa.string(),
            "direction": pa.string(),
            "ordering": pa.string(),
            "p_base": pa.float64(),
            "p_knockout": pa.float64(),
            "delta": pa.float64(),
            "p_options": pa.list_(pa.float64()),
            "base_token": pa.int32(),
            "knockout_token": pa.int32(),
            "correct_base": pa.bool_(),
            "correct_knockout": pa.bool_(),
            "n_tokens": pa.int32(),
            "n_blocked_edges": pa.int64(),
        }
    ),
    "samples": pa.schema(
        {
            "model": pa.string(),
            "dataset": pa.string(),
            "task": pa.string(),
            "sample_id": pa.string(),
            "category": pa.string(),
            "direction": pa.string(),
            "ordering": pa.string(),
            "answer": pa.string(),
            "predicted": pa.string(),
            "base_token": pa.int32(),
            "p_options": pa.list_(pa.float64()),
            "p_base": pa.float64(),
            "correct": pa.bool_(),
            "n_tokens": pa.int32(),
            "groups": pa.list_(_GROUP),
            "decode_s": pa.float64(),
            "encode_s": pa.float64(),
            "prefill_s": pa.float64(),
            "replay_s": pa.float64(),
            "token_layers": pa.int64(),
            "flops": pa.float64(),
            "flops_lower_bound": pa.float64(),
            "split_batches": pa.int32(),
            "peak_bytes": pa.int64(),
            "notes": pa.list_(pa.string()),
            "worker": pa.string(),
            "attempt": pa.int32(),
            "finished_at": _TIME,
        }
    ),
    "interventions": pa.schema(
        {
            "model": pa.string(),
            "dataset": pa.string(),
            "task": pa.string(),
            "category": pa.string(),
            "sample_id": pa.string(),
            "direction": pa.string(),
            "ordering": pa.string(),
            "kind": pa.string(),
            "intervention": pa.string(),
            "layers": pa.list_(pa.int16()),
            "p": pa.float64(),
            "p_options": pa.list_(pa.float64()),
            "token": pa.int32(),
            "predicted": pa.string(),
            "correct": pa.bool_(),
            "p_base": pa.float64(),
            "correct_base": pa.bool_(),
            "token_layers": pa.int64(),
            "prefill_s": pa.float64(),
        }
    ),
    "probes": pa.schema(
        {
            "model": pa.string(),
            "dataset": pa.string(),
            "task": pa.string(),
            "sample_id": pa.string(),
            "probe": pa.string(),
            "layer": pa.int16(),
            "group": pa.string(),
            "position": pa.int32(),
            "key": pa.int32(),
            "width": pa.int32(),
            "dimension": pa.int32(),
            "value": pa.float64(),
        }
    ),
    "failures": pa.schema(
        {
            "unit_id": pa.string(),
            "model": pa.string(),
            "dataset": pa.string(),
            "task": pa.string(),
            "sample_id": pa.string(),
            "curve": pa.string(),
            "stage": pa.string(),
            "kind": pa.string(),
            "error": pa.string(),
            "message": pa.string(),
            "traceback": pa.string(),
            "action": pa.string(),
            "worker": pa.string(),
            "node": pa.string(),
            "attempt": pa.int32(),
            "at": _TIME,
            "terminal": pa.bool_(),
        }
    ),
}

KEYS: Mapping[TableName, tuple[str, ...]] = {
    "cells": ("job_id", "sample_id"),
    "samples": ("model", "dataset", "task", "sample_id"),
    "interventions": ("model", "dataset", "task", "sample_id", "kind", "intervention"),
    "probes": (
        *("model", "dataset", "sample_id", "probe"),
        *("layer", "group", "position", "key", "dimension"),
    ),
    "failures": (),  # every row is an event of its own
}
"""What a row is the only one of; readers drop the later ones."""


def cell_rows(unit: UnitSpec, planned: PlannedCurve, done: CurveDone) -> Columns:
    """A row a centre layer, in the plan's order. Raises ValueError for other centres than it."""
    centers = [int(center) for center in done.center_layer]
    if centers != list(planned.spec.center_layers):
        raise ValueError(
            f"{unit.unit_id} {done.curve}: the worker returned centre layers {centers}, "
            f"the plan holds {list(planned.spec.center_layers)}"
        )
    n, sample = len(centers), unit.sample
    constant: dict[str, Any] = {
        "model": unit.model,
        "dataset": sample.dataset,
        "task": sample.task,
        "category": sample.category,
        "pathway": planned.spec.pathway.name,
        "variant": planned.spec.variant,
        "window": planned.spec.window,
        "sample_id": sample.sample_id,
        "direction": sample.direction,
        "ordering": sample.ordering,
        "p_base": done.p_base,
        "base_token": done.base_token,
        "correct_base": done.correct_base,
        "n_tokens": done.n_tokens,
    }
    return {name: [value] * n for name, value in constant.items()} | {
        "job_id": list(planned.job_ids),
        "center_layer": centers,
        "p_knockout": done.p_knockout.tolist(),
        "delta": ((done.p_knockout - done.p_base) / done.p_base).tolist(),
        "p_options": done.p_options.tolist(),
        "knockout_token": done.knockout_token.tolist(),
        "correct_knockout": (done.knockout_token == done.answer_token).tolist(),
        "n_blocked_edges": done.n_blocked_edges.tolist(),
    }


def intervention_row(unit: UnitSpec, done: InterventionDone) -> Columns:
    """One row; `kind` is `mask` or `discard`."""
    kind, _, name = done.curve.partition("/")
    sample = unit.sample
    row: dict[str, Any] = {
        "model": unit.model,
        "dataset": sample.dataset,
        "task": sample.task,
        "category": sample.category,
        "sample_id": sample.sample_id,
        "direction": sample.direction,
        "ordering": sample.ordering,
        "kind": kind,
        "intervention": name,
        "layers": list(done.layers),
        "p": done.p,
        "p_options": done.p_options.tolist(),
        "token": done.token,
        "predicted": done.predicted,
        "correct": done.correct,
        "p_base": done.p_base,
        "correct_base": done.correct_base,
        "token_layers": done.token_layers,
        "prefill_s": done.prefill_s,
    }
    return {name: [value] for name, value in row.items()}


def probe_rows(unit: UnitSpec, done: ProbeDone) -> Columns:
    """Long form; null where a column says nothing of the probe (see ProbeDone)."""
    sample, n = unit.sample, len(done.value)
    constant = {
        "model": unit.model,
        "dataset": sample.dataset,
        "task": sample.task,
        "sample_id": sample.sample_id,
        "probe": done.curve.partition("/")[2],
    }
    return {name: [value] * n for name, value in constant.items()} | {
        "layer": done.layer.tolist(),
        "group": [group or None for group in done.group],
        "position": _known(done.position),
        "key": _known(done.key),
        "width": _known(done.width),
        "dimension": _known(done.dimension),
        "value": done.value.tolist(),
    }


def _known(numbers: NDArray[np.int32]) -> list[int | None]:
    return [None if number < 0 else number for number in numbers.tolist()]


def sample_row(
    unit: UnitSpec, done: SampleDone, *, worker: str, attempt: int, at: datetime
) -> Columns:
    """One row. `worker` is `host:pid`."""
    sample = unit.sample
    groups = [
        {"group": name, "length": sum(stop - start for start, stop in spans), "spans": spans}
        for name, spans in done.group_spans.items()
    ]
    row: dict[str, Any] = {
        "model": unit.model,
        "dataset": sample.dataset,
        "task": sample.task,
        "sample_id": sample.sample_id,
        "category": sample.category,
        "direction": sample.direction,
        "ordering": sample.ordering,
        "answer": done.answer,
        "predicted": done.predicted,
        "base_token": done.base_token,
        "p_options": done.p_options.tolist(),
        "p_base": done.p_base,
        "correct": done.correct,
        "n_tokens": done.n_tokens,
        "groups": groups,
        "decode_s": done.decode_s,
        "encode_s": done.encode_s,
        "prefill_s": done.prefill_s,
        "replay_s": done.replay_s,
        "token_layers": done.token_layers,
        "flops": done.flops,
        "flops_lower_bound": done.flops_lower_bound,
        "split_batches": done.split_batches,
        "peak_bytes": done.peak_bytes,
        "notes": list(done.notes),
        "worker": worker,
        "attempt": attempt,
        "finished_at": at,
    }
    return {name: [value] for name, value in row.items()}


def failure_row(decision: Decision, *, worker: str, at: datetime) -> Columns:
    """One row. A model's own failure (it can't be loaded) has no unit and no sample."""
    sample = None if decision.unit is None else decision.unit.sample
    failure = decision.failure
    row: dict[str, Any] = {
        "unit_id": failure.unit_id or None,
        "model": decision.model,
        "dataset": sample and sample.dataset,
        "task": sample and sample.task,
        "sample_id": sample and sample.sample_id,
        "curve": failure.curve,
        "stage": failure.stage,
        "kind": decision.kind.value,
        "error": failure.error,
        "message": _storable(failure.message),
        "traceback": _storable(failure.traceback),
        "action": decision.action.value,
        "worker": worker,
        "node": worker.rpartition(":")[0] or worker,
        "attempt": decision.attempt,
        "at": at,
        "terminal": decision.terminal,
    }
    return {name: [value] for name, value in row.items()}


def _storable(text: str) -> str:
    """As Arrow takes it: what is no Unicode (bytes of a file's name, above all) is spelled out."""
    return text.encode(errors="backslashreplace").decode()
