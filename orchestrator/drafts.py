"""What MLflow is to hold of a sweep: a draft a run, made from the store's numbers alone.

Of curves a run a (model, data set, task, window, variant), tagged `kind = cell`, and one a category
of tasks; the sweep's own run holds figures, words and the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import polars as pl

from avflow.orchestrator import figures, report, statistics
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.findings import effects
from avflow.orchestrator.identity import digest, identity_fields
from avflow.orchestrator.outcome import Outcome, is_complete
from avflow.orchestrator.panels import category_statuses
from avflow.orchestrator.paths import RunPaths, slug
from avflow.orchestrator.results import TaskStatus
from avflow.pathways.pathway import Pathway

LAYOUT_VERSION: Final = 3
"""Counted up when the same numbers would be published in another form."""

STRIDE: Final = 3  # of colours, between lines of one task; it shares no factor with their number
_METRICS: Final = (
    ("dp", "mean"),
    ("dp_low", "low"),
    ("dp_high", "high"),
    ("flip", "flip"),
    ("effect_log_odds", "log_odds"),
    ("effect_accuracy", "accuracy"),
    ("q", "q_value"),
    ("n", "n"),
)  # name's prefix, column of the curve table; the page lists them by the alphabet, `dp` first


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A run to be. `line` numbers its colour; `content` is what its artifacts are made of; `fill`
    makes them in a folder."""

    key: str
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: tuple[tuple[str, float, int], ...]  # name, value, step
    line: int | None
    content: str
    fill: Callable[[Path], None]

    @property
    def digest(self) -> str:
        """Equal for drafts that would look alike. Twelve digits: the last bits of a mean depend on
        the machine, and are no reason to replace a run."""
        metrics = [(name, f"{value:.12g}", step) for name, value, step in self.metrics]
        return digest(
            [LAYOUT_VERSION, self.name, self.tags, self.line, self.params, metrics, self.content]
        )


def curve_drafts(outcome: Outcome, config: SweepConfig) -> Iterator[Draft]:
    """Of every task and category whose samples have all ended, well or not."""
    for task in outcome.tasks:
        if is_complete(task):
            for cell in outcome.cell_keys(task):
                yield _cell_draft(outcome, config, task, cell)
    for category in category_statuses(outcome.tasks):
        if is_complete(category):
            for cell in outcome.category_keys(category):
                yield _category_draft(outcome, config, category, cell)


def _cell_draft(
    outcome: Outcome, config: SweepConfig, task: TaskStatus, cell: Mapping[str, Any]
) -> Draft:
    """The run of one (model, dataset, task, window, variant)."""
    curves = outcome.curves.filter(**cell).sort("pathway", "center_layer")
    names = {key: str(value) for key, value in cell.items()}
    identity = {key: str(value) for key, value in identity_fields(config.model(task.model)).items()}
    counts = {"planned": task.planned, "right": task.right, "wrong": task.wrong}
    return Draft(
        key="{model}/{dataset}/{task}/k{window}/{variant}".format(**names),
        name=_run_name(config, cell),
        tags={"kind": "cell", "category": task.category, **names},
        params={f"model.{key}": value for key, value in identity.items()}
        | names
        | {f"samples.{key}": str(value) for key, value in counts.items()}
        | {"samples.failed": str(task.failed)},
        metrics=tuple(_curve_metrics(curves)),
        line=line(outcome.tasks, task) + STRIDE * _scopes(outcome).index(_scope(cell)),
        content=curves.write_csv(float_precision=12),
        fill=partial(_fill_cell, curves, task, outcome.own),
    )


def _category_draft(
    outcome: Outcome, config: SweepConfig, category: TaskStatus, cell: Mapping[str, Any]
) -> Draft:
    """The run of a category; `category.task` is its name, as the cell's is."""
    curves = outcome.categories.filter(**cell).sort("pathway", "center_layer")
    names = {key: str(value) for key, value in cell.items()}
    del names["task"]
    order = list(dict.fromkeys(task.category for task in outcome.tasks))
    counts = {"planned": category.planned, "right": category.right, "wrong": category.wrong}
    shown = f"{category.task} (category)"
    return Draft(
        key="{model}/{dataset}/category {task}/k{window}/{variant}".format(**cell),
        name=_run_name(config, {**cell, "task": shown}),
        tags={"kind": "category", "category": category.task, **names},
        params={**names, "category": category.task}
        | {f"samples.{key}": str(value) for key, value in counts.items()}
        | {"samples.failed": str(category.failed)},
        metrics=tuple(_curve_metrics(curves)),
        line=order.index(category.task) + STRIDE * _scopes(outcome).index(_scope(cell)),
        content=curves.write_csv(float_precision=12),
        fill=partial(_fill_cell, curves, category, outcome.own),
    )


def line(tasks: Sequence[TaskStatus], task: TaskStatus) -> int:
    """The number of a task's line, the same under every model."""
    names = list(dict.fromkeys((one.dataset, one.task) for one in tasks))
    return names.index((task.dataset, task.task))


def _scope(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["model"], cell["window"], cell["variant"]


def _scopes(outcome: Outcome) -> list[tuple[Any, ...]]:
    """What else tells lines of one task apart."""
    return sorted(outcome.curves.select("model", "window", "variant").unique().iter_rows())


def _fill_cell(
    curves: pl.DataFrame, task: TaskStatus, own: Sequence[Pathway], folder: Path
) -> None:
    curves.write_csv(folder / "curves.csv")
    drawn = {slug(task.task): figures.task_figure(curves, task, own)}
    figures.save_figures(drawn, folder / "figures", formats=("png",))


def _run_name(config: SweepConfig, cell: Mapping[str, Any]) -> str:
    """The task, and what else tells the sweep's runs apart: legends have little room."""
    several = {
        "model": len(config.models) > 1,
        "dataset": len(config.datasets) > 1,
        "task": True,
        "window": len({w for asked in config.experiments for w in asked.windows}) > 1,
        "variant": len({asked.option_span for asked in config.experiments}) > 1,
    }
    shown = {**cell, "window": f"k={cell['window']}"}
    parts = [str(shown[key]) for key, varies in several.items() if varies]
    return run_name(config, parts)


def run_name(config: SweepConfig, parts: Sequence[str]) -> str:
    """In a store that other sweeps may share, the sweep's name tells their lines apart."""
    return " · ".join([*parts, *[config.name] * (config.mlflow.tracking_uri is not None)])


def _curve_metrics(curves: pl.DataFrame) -> Iterator[tuple[str, float, int]]:
    """Name, value, step. MLflow takes A-Z a-z 0-9 _ - . / : and spaces in names, so no arrows."""
    for row in curves.iter_rows(named=True):
        for prefix, column in _METRICS:
            if row[column] is not None:
                yield f"{prefix}/{row['pathway']}", float(row[column]), row["center_layer"]
    for row in statistics.peak_table(curves).iter_rows(named=True):
        yield f"peak_dp/{row['pathway']}", row["mean"], 0
        yield f"peak_layer/{row['pathway']}", float(row["center_layer"]), 0
    for row in effects(curves).drop_nulls("peak").iter_rows(named=True):
        yield f"first_layer/{row['pathway']}", float(min(row["layers"])), 0
        yield f"last_layer/{row['pathway']}", float(max(row["layers"])), 0


def sweep_draft(outcome: Outcome, config: SweepConfig, paths: RunPaths) -> Draft:
    """The run of the sweep as a whole: figures, words, tables, failures, config."""
    totals = {
        f"samples/{name}": sum(getattr(task, name) for task in outcome.tasks)
        for name in ("planned", "right", "wrong", "failed")
    }
    found = "\n".join(f"- {line}" for line in report.words(outcome).splitlines())
    return Draft(
        key="sweep",
        name=f"sweep: {config.name}",
        tags={"kind": "sweep", "mlflow.note.content": found},
        params={},
        line=None,
        metrics=tuple((name, float(value), 0) for name, value in totals.items()),
        content=report.report_digest(outcome),
        fill=partial(_fill_sweep, outcome, paths),
    )


def _fill_sweep(outcome: Outcome, paths: RunPaths, folder: Path) -> None:
    report.write_report(paths, outcome)
    shutil.copytree(paths.report, folder / "report")
    shutil.copy(paths.sweep, folder)
