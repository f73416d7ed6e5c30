"""Reading a run folder: frames without doubles, SQL over the tables, how far the sweep is.

From the store alone, so all of it works while the sweep runs and after it died.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import polars as pl

from avflow.orchestrator.errors import ConfigError, StoreError
from avflow.orchestrator.parts import find_parts
from avflow.orchestrator.paths import TABLES, RunPaths, TableName
from avflow.orchestrator.run_folder import driver
from avflow.orchestrator.schema import KEYS, SCHEMAS
from avflow.orchestrator.source import unknown

_PART = "__part"
_SAMPLE = ["model", "dataset", "sample_id"]
# What a worker calls a curve, an intervention or a probe, from the columns of its table.
_KEY_IN: Mapping[TableName, pl.Expr] = {
    "cells": pl.concat_str("pathway", pl.lit("/k"), "window", pl.lit("/"), "variant"),
    "interventions": pl.concat_str("kind", pl.lit("/"), "intervention"),
    "probes": pl.concat_str(pl.lit("probe/"), "probe"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """A (model, data set, task): of its `planned` samples, those with all their curves (`right`),
    with a wrong baseline that calls for none (`wrong`), and with a terminal failure (`failed`)."""

    model: str
    dataset: str
    task: str
    category: str
    layout: str
    planned: int
    right: int
    wrong: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A job has failed if one of its samples has a terminal failure, is done when all of them have
    ended, and runs when some have. `extras` are interventions and probes, one a sample; done are
    those that are stored or that a wrong baseline leaves out. `driver` says which process writes
    here now, if any."""

    jobs: int
    jobs_done: int
    jobs_running: int
    jobs_failed: int
    samples: int
    samples_done: int
    samples_failed: int
    samples_correct: int
    cells: int
    extras: int
    extras_done: int
    extras_failed: int
    tasks: tuple[TaskStatus, ...]
    driver: str | None

    @property
    def complete(self) -> bool:
        """Whether every sample has ended, well or not."""
        return self.samples_done + self.samples_failed == self.samples


P = ParamSpec("P")
R = TypeVar("R")
_LOOKS = 20


def _while_parts_are_merged(look: Callable[P, R]) -> Callable[P, R]:
    """Look again when a part was merged into another between its listing and its reading."""

    @wraps(look)
    def looking(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(_LOOKS):
            try:
                return look(*args, **kwargs)
            except FileNotFoundError:
                continue
        return look(*args, **kwargs)

    return looking


@_while_parts_are_merged
def read(run: str | Path, table: str = "cells") -> pl.DataFrame:
    """A table of a run, each row once. Raises StoreError for no run folder, ConfigError for no
    table of ours."""
    if table not in TABLES:
        raise ConfigError(unknown("table", table, TABLES))
    return _scan(_paths(run), table).collect()


@_while_parts_are_merged
def query(run: str | Path, sql: str) -> pl.DataFrame:
    """Polars SQL over cells, samples, interventions, probes, failures, and the planned jobs and
    units. Raises ConfigError when the statement can't be run."""
    paths = _paths(run)
    # Each scan looks for doubles, so only what the statement may ask for is scanned.
    asked = [name for name in TABLES if re.search(rf"\b{name}\b", sql, re.IGNORECASE)]
    frames: dict[str, pl.LazyFrame] = {name: _scan(paths, name) for name in asked}
    frames["jobs"], frames["units"] = pl.scan_parquet(paths.jobs), pl.scan_parquet(paths.units)
    try:
        with pl.SQLContext(frames) as context:
            return context.execute(sql, eager=True)
    except pl.exceptions.PolarsError as error:
        known = (*TABLES, "jobs", "units")
        why = str(error).partition("\n\n")[0]  # then polars' own plan of the query
        text = f"the query can't be run: {why}\ntables: {', '.join(known)}"
        raise ConfigError(text) from error


@_while_parts_are_merged
def status(run: str | Path) -> RunStatus:
    """How far a run is."""
    paths = _paths(run)
    units, samples = _unit_frame(paths), read(run, "samples")
    curves, extras = _curve_frame(paths, units), _extra_frame(paths, units)
    ended = (
        pl.concat([frame.select(*_SAMPLE, "ended", "failed") for frame in (curves, extras)])
        .group_by(_SAMPLE)
        .agg(pl.col("ended").all(), pl.col("failed").any())
    )
    units = units.join(ended, on=_SAMPLE, how="left").with_columns(
        failed=pl.col("failed").fill_null(False) | pl.col("given_up"),
        done=pl.col("correct").is_not_null() & pl.col("ended").fill_null(True),
    )
    units = units.with_columns(done=pl.col("done") & ~pl.col("failed"))
    jobs = _job_counts(curves)
    return RunStatus(
        jobs=int(jobs["jobs"].sum()),
        jobs_done=_weighted(jobs, pl.col("ended") & ~pl.col("failed")),
        jobs_running=_weighted(jobs, pl.col("started") & ~pl.col("ended") & ~pl.col("failed")),
        jobs_failed=_weighted(jobs, pl.col("failed")),
        samples=units.height,
        samples_done=int(units["done"].sum()),
        samples_failed=int(units["failed"].sum()),
        samples_correct=int(samples["correct"].sum()),
        cells=_scan(paths, "cells").select(pl.len()).collect().item(),
        extras=extras.height,
        extras_done=int((extras["ended"] & ~extras["failed"]).sum()),
        extras_failed=int(extras["failed"].sum()),
        tasks=_task_statuses(units),
        driver=driver(paths),
    )


@_while_parts_are_merged
def standing_failures(run: str | Path) -> pl.DataFrame:
    """What no later attempt has mended, the latest of each: terminal failures of a unit or a curve,
    and models that were given up (`unit_id` null) and have measured nothing since."""
    all_attempts = read(run, "failures").sort("at")
    failures = all_attempts.filter("terminal")
    samples = read(run, "samples")
    measured = samples.select("model", "dataset", "sample_id")
    stored = _stored(_paths(run), _KEY_IN).collect()
    whole = failures.filter(pl.col("curve").is_null())
    one = failures.filter(pl.col("curve").is_not_null())
    since = samples.group_by("model").agg(pl.col("finished_at").max().alias("since"))
    given_up = all_attempts.filter(pl.col("action") == "abort_model", ~pl.col("terminal"))
    standing = pl.concat(
        [
            whole.join(measured, on=_SAMPLE, how="anti", maintain_order="left"),
            one.join(stored, on=[*_SAMPLE, "curve"], how="anti", maintain_order="left"),
            given_up.join(since, on="model", how="left", maintain_order="left")
            .filter(pl.col("since").is_null() | (pl.col("since") < pl.col("at")))
            .drop("since"),
        ]
    )
    latest = standing.unique(["model", "unit_id", "curve"], keep="last", maintain_order=True)
    return latest.sort("at")


# -- frames ----------------------------------------------------------------------------------


def _paths(run: str | Path) -> RunPaths:
    paths = RunPaths(Path(run))
    for needed in (paths.sweep, paths.jobs, paths.units, paths.curves, paths.extras):
        if not needed.is_file():
            raise StoreError(f"{run} is no run folder: there is no {needed.relative_to(run)} in it")
    return paths


def _scan(paths: RunPaths, table: TableName) -> pl.LazyFrame:
    """Each row once: of parts that hold the same row, the first by name wins."""
    empty = cast(pl.DataFrame, pl.from_arrow(SCHEMAS[table].empty_table()))
    parts = find_parts(paths.table(table))
    if not parts:
        return empty.lazy()
    # Explicit files and schema: a listing would take in hidden files, a schema read off the first
    # file would refuse a later column, and hive keys would override the columns.
    frame = pl.scan_parquet(
        parts,
        schema=empty.schema,
        missing_columns="insert",
        extra_columns="ignore",
        hive_partitioning=False,
        include_file_paths=_PART,
    )
    keys = list(KEYS[table])
    if keys and _has_doubles(_thinned(paths, table, frame), keys):
        winners = frame.group_by(keys).agg(pl.col(_PART).min())
        frame = frame.join(
            winners, on=[*keys, _PART], how="semi", nulls_equal=True, maintain_order="left"
        ).unique(keys, keep="first", maintain_order=True)
    return frame.drop(_PART)


def _thinned(paths: RunPaths, table: TableName, frame: pl.LazyFrame) -> pl.LazyFrame:
    """Rows enough to find every double: a curve is stored whole, so its first layer tells."""
    if table != "cells":
        return frame
    firsts = pl.read_parquet(paths.curves, columns=["center_layers"])["center_layers"].list.first()
    return frame.filter(pl.col("center_layer").is_in(firsts.cast(pl.Int16).unique().implode()))


def _has_doubles(frame: pl.LazyFrame, keys: list[str]) -> bool:
    counts = frame.select(rows=pl.len(), keys=pl.struct(keys).n_unique()).collect()
    return bool(counts["rows"].item() > counts["keys"].item())


def _unit_frame(paths: RunPaths) -> pl.DataFrame:
    """A row a planned unit, with `correct` (null: no samples row) and `given_up` (whole)."""
    samples = _scan(paths, "samples").select("model", "dataset", "sample_id", "correct")
    lost = _lost(paths).filter(pl.col("curve").is_null()).select("unit_id", given_up=True)
    return (
        pl.scan_parquet(paths.units)
        .join(samples, on=("model", "dataset", "sample_id"), how="left", maintain_order="left")
        .join(lost.unique(), on="unit_id", how="left", maintain_order="left")
        # A sample that was given up, taken up again and then measured has not failed.
        .with_columns(given_up=pl.col("given_up").fill_null(False) & pl.col("correct").is_null())
        .collect()
    )


def _lost(paths: RunPaths) -> pl.LazyFrame:
    failures = _scan(paths, "failures").filter("terminal", pl.col("unit_id").is_not_null())
    return failures.select("unit_id", "curve")


def _curve_frame(paths: RunPaths, units: pl.DataFrame) -> pl.DataFrame:
    """A row a planned (unit, curve): `stored`, `failed`, `ended` (either, or not called for)."""
    planned = pl.scan_parquet(paths.curves).with_columns(jobs=pl.col("job_ids").list.len())
    asked = units.lazy().drop("curves").join(planned, on=("model", "dataset", "task", "layout"))
    return _with_state(paths, asked, ("cells",)).collect()


def _extra_frame(paths: RunPaths, units: pl.DataFrame) -> pl.DataFrame:
    """The same, a row a planned (unit, intervention or probe)."""
    asked = units.lazy().drop("curves").join(pl.scan_parquet(paths.extras), on="unit_id")
    return _with_state(paths, asked, ("interventions", "probes")).collect()


def _stored(paths: RunPaths, tables: Iterable[TableName]) -> pl.LazyFrame:
    """A row a (sample, key) of what is stored in these tables."""
    frames = [_scan(paths, table).select(*_SAMPLE, curve=_KEY_IN[table]) for table in tables]
    return pl.concat(frames).unique()


def _with_state(paths: RunPaths, asked: pl.LazyFrame, tables: Iterable[TableName]) -> pl.LazyFrame:
    stored = _stored(paths, tables).with_columns(stored=True)
    lost = _lost(paths).unique().with_columns(lost=True)
    whole = lost.filter(pl.col("curve").is_null()).select("unit_id", whole=True)
    return (
        asked.join(stored, on=[*_SAMPLE, "curve"], how="left")
        .join(lost, on=("unit_id", "curve"), how="left")
        .join(whole, on="unit_id", how="left")
        .with_columns(pl.col("stored", "lost", "whole").fill_null(False))
        .with_columns(skipped=pl.col("correct_only") & pl.col("correct").eq_missing(False))
        .with_columns(
            failed=(pl.col("lost") | pl.col("whole")) & ~pl.col("stored") & ~pl.col("skipped")
        )
        .with_columns(ended=pl.col("stored") | pl.col("skipped") | pl.col("failed"))
    )


def _job_counts(curves: pl.DataFrame) -> pl.DataFrame:
    """A row a planned curve of a task: how many `jobs` (centres), and where they all stand."""
    return curves.group_by("model", "dataset", "task", "layout", "curve").agg(
        pl.col("jobs").first(),
        pl.col("ended").all(),
        pl.col("failed").any(),
        started=pl.col("ended").any(),
    )


def _weighted(jobs: pl.DataFrame, which: pl.Expr) -> int:
    return int(jobs.filter(which)["jobs"].sum())


def _task_statuses(units: pl.DataFrame) -> tuple[TaskStatus, ...]:
    """In the order of the sweep file's models and data sets and of the reader's tasks."""
    group = ["model", "dataset", "task"]
    rows = (
        units.sort("group", maintain_order=True)
        .group_by(group, maintain_order=True)
        .agg(
            pl.col("category").first(),
            pl.col("layout").first(),
            planned=pl.len(),
            right=(pl.col("done") & pl.col("correct")).sum(),
            wrong=(pl.col("done") & ~pl.col("correct")).sum(),
            failed=pl.col("failed").sum(),
        )
    )
    return tuple(TaskStatus(**row) for row in rows.iter_rows(named=True))


__all__ = ["RunStatus", "TaskStatus", "query", "read", "status"]
