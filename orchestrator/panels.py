"""The numbers of a figure that a sweep file asks for: cells relabelled, then made curves.

A panel is what `statistics` calls a task: tasks pooled to a category, a task in one direction, all
tasks as one, a width of the window. So each kind of figure is a renaming of the column `task`, and
curves, bands and tests are the same everywhere.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import polars as pl

from avflow.orchestrator.figure_check import layouts_of
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.results import TaskStatus
from avflow.orchestrator.statistics import curve_table, mean_of_tasks
from avflow.pathways.pathway import Pathway

DIRECTIONS = {"audio_to_image": "A to I", "image_to_audio": "I to A"}
"""As the paper's Table 4 abbreviates them: of the reference, and of the candidates."""
MEANS = ("mean of tasks", "pooled")


Directions = Mapping[tuple[str, str], Sequence[str]]
"""(data set, task) -> the directions that its samples have; none for single videos."""


def tasks_of(
    figure: FigureConfig, tasks: Sequence[TaskStatus], own: Sequence[Pathway]
) -> list[TaskStatus]:
    """The tasks that a figure shows: of its model and data, and of a kind of prompt that has its
    pathways (the first of them, if both have)."""
    shown = [t for t in tasks if t.model == figure.model and figure.holds(t.dataset, t.task)]
    kinds = layouts_of(figure, own)
    if kinds is None:
        return shown
    kept = [task for task in shown if task.layout in kinds]
    return [task for task in kept if task.layout == kept[0].layout]


def statuses(
    figure: FigureConfig, shown: Sequence[TaskStatus], directions: Directions
) -> list[TaskStatus]:
    """How far the samples of each panel are, in the order of the panels; `task` is the panel's
    name. `shown` as of `tasks_of`. A direction's are those of its task as a whole.
    """
    called = names(figure, shown)
    match figure.panels:
        case "task":
            found = [replace(t, task=name) for t, name in zip(shown, called, strict=True)]
        case "category":
            found = _summed(shown, called)
        case "direction":
            found = [
                replace(t, task=f"{name} ({DIRECTIONS.get(direction, direction)})")
                for t, name in zip(shown, called, strict=True)
                for direction in directions.get((t.dataset, t.task), ("",))
            ]
        case "mean":
            found = [one for name in MEANS for one in _summed(shown, [name] * len(shown))]
    if figure.shows == "windows":
        return [
            replace(t, task=_width(t.task if len(found) > 1 else "", k))
            for k in figure.windows
            for t in found
        ]
    return found


def _width(task: str, window: int) -> str:
    return f"{task} k = {window}".strip()


def _summed(shown: Sequence[TaskStatus], labels: Sequence[str]) -> list[TaskStatus]:
    totals: dict[str, TaskStatus] = {}
    for task, label in zip(shown, labels, strict=True):
        before = totals.get(label)
        if before is None:
            totals[label] = replace(task, task=label)
            continue
        counts = {
            name: getattr(before, name) + getattr(task, name)
            for name in ("planned", "right", "wrong", "failed")
        }
        totals[label] = replace(before, **counts)
    return list(totals.values())


def category_statuses(tasks: Sequence[TaskStatus]) -> list[TaskStatus]:
    """How far each category of each model and data set is; `task` is its name."""
    scopes: dict[tuple[str, str], list[TaskStatus]] = {}
    for task in tasks:
        scopes.setdefault((task.model, task.dataset), []).append(task)
    return [
        one for held in scopes.values() for one in _summed(held, [task.category for task in held])
    ]


def names(figure: FigureConfig, shown: Sequence[TaskStatus]) -> list[str]:
    """What these tasks are called: with the data set's name where two would have one; pooled ones
    by their category, where a figure pools and shows several of it."""
    together = Counter((task.dataset, task.category) for task in shown)
    labels = [
        task.category
        if figure.panels == "category" and together[task.dataset, task.category] > 1
        else task.task
        for task in shown
    ]
    owners: dict[str, set[str]] = {}
    for task, label in zip(shown, labels, strict=True):
        owners.setdefault(label, set()).add(task.dataset)
    return [
        f"{task.dataset}: {label}" if len(owners[label]) > 1 else label
        for task, label in zip(shown, labels, strict=True)
    ]


def labelled(figure: FigureConfig, rows: pl.DataFrame, shown: Sequence[TaskStatus]) -> pl.DataFrame:
    """The rows (of cells, or interventions) of these tasks, `task` being their panel."""
    labels = pl.DataFrame(
        {
            "dataset": [task.dataset for task in shown],
            "task": [task.task for task in shown],
            "panel": names(figure, shown),
        },
        schema={"dataset": pl.String, "task": pl.String, "panel": pl.String},
    )
    kept = rows.filter(pl.col("model") == figure.model)
    if figure.ordering is not None:
        kept = kept.filter(pl.col("ordering") == figure.ordering)
    kept = kept.join(labels, on=["dataset", "task"], maintain_order="left")
    if figure.panels == "direction":
        label = pl.col("direction").replace_strict(DIRECTIONS, default=pl.col("direction"))
        suffix = pl.concat_str(pl.lit(" ("), label.fill_null(""), pl.lit(")"))
        kept = kept.with_columns(panel=pl.col("panel") + suffix)
    return kept.with_columns(task=pl.col("panel")).drop("panel")


def panel_curves(
    figure: FigureConfig, cells: pl.DataFrame, shown: Sequence[TaskStatus], *, correct: bool = True
) -> pl.DataFrame:
    """A figure's curves: `statistics.curve_table` with panels for tasks, or `mean_of_tasks`."""
    wanted = {name for row in figure.pathways for name in row}
    kept = cells.filter(
        pl.col("pathway").is_in(wanted),
        pl.col("window").is_in(list(figure.windows)),
        variant=figure.option_span,
    )
    kept = labelled(figure, kept, shown)
    if figure.shows == "windows":
        several = kept["task"].n_unique() > 1
        prefix = pl.col("task") + " " if several else pl.lit("")
        width = pl.concat_str(prefix, pl.lit("k = "), pl.col("window").cast(pl.String))
        kept = kept.with_columns(task=width)
    if figure.panels == "mean":
        return mean_of_tasks(kept, correct=correct)
    return curve_table(kept, correct=correct)
