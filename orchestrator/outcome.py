"""What a run folder holds, as figures, MLflow and the words need it: curves, and how far it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import polars as pl

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.extras_results import (
    last_attention_table,
    portraits,
    probe_means,
    sink_table,
)
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.panels import Directions, panel_curves, tasks_of
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.results import TaskStatus, query, read, standing_failures, status
from avflow.orchestrator.run_folder import sessions
from avflow.orchestrator.statistics import CURVE, curve_table
from avflow.pathways.pathway import Pathway

# Only what curves need: a large sweep's cells have many more columns than fit in memory.
_CELLS: Final = """
    SELECT c.model, c.dataset, c.task, c.category, c.variant, c.window, c.pathway, c.center_layer,
           c.sample_id, c.direction, c.ordering, c.delta, c.p_base, c.p_knockout, c.base_token,
           c.knockout_token, c.correct_base, c.correct_knockout, u.media_group
    FROM cells c
    JOIN units u ON c.model = u.model AND c.dataset = u.dataset AND c.sample_id = u.sample_id
    WHERE c.correct_base = {correct} AND c.model = '{model}' AND c.dataset = '{dataset}'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`curves` is `statistics.curve_table` of all cells, `categories` the same with categories for
    tasks, `panels` that of each figure of curves that the sweep file asks for, by its name;
    `interventions` the rows of that table, with `media_group`; `last_attention`, `sinks`,
    `portraits` and `probe_means` the tables of `extras_results`; `created_ms` counts from 1970.
    `correct`: whether curves are of samples with a right baseline."""

    name: str
    correct: bool
    curves: pl.DataFrame
    categories: pl.DataFrame
    panels: Mapping[str, pl.DataFrame]
    figures: tuple[FigureConfig, ...]
    tasks: tuple[TaskStatus, ...]
    directions: Directions
    failures: pl.DataFrame
    interventions: pl.DataFrame
    last_attention: pl.DataFrame
    sinks: pl.DataFrame
    portraits: pl.DataFrame
    probe_means: pl.DataFrame
    own: tuple[Pathway, ...]
    created_ms: int

    def cell_keys(self, task: TaskStatus) -> Iterator[dict[str, Any]]:
        """The (model, dataset, task, variant, window) of a task that have curves."""
        of_task = self.curves.filter(model=task.model, dataset=task.dataset, task=task.task)
        yield from of_task.select(CURVE[:-1]).unique().sort(CURVE[:-1]).iter_rows(named=True)

    def category_keys(self, category: TaskStatus) -> Iterator[dict[str, Any]]:
        """Likewise of `categories`, `task` being the category."""
        found = self.categories.filter(
            model=category.model, dataset=category.dataset, task=category.task
        )
        yield from found.select(CURVE[:-1]).unique().sort(CURVE[:-1]).iter_rows(named=True)


def read_outcome(paths: RunPaths, config: SweepConfig, *, correct: bool = True) -> Outcome:
    """From the store alone, running or not. Raises StoreError for what is no run folder."""
    tasks = status(paths.root).tasks
    drawn = [figure for figure in config.figures if figure.shows in ("curves", "windows")]
    own = config.own_pathways()
    curves, categories = [], []
    panels: dict[str, list[pl.DataFrame]] = {figure.name: [] for figure in drawn}
    # A model and data set at a time: the cells of a whole paper need not fit in memory at once.
    for model, dataset in dict.fromkeys((task.model, task.dataset) for task in tasks):
        names = {"model": model.replace("'", "''"), "dataset": dataset.replace("'", "''")}
        cells = query(paths.root, _CELLS.format(correct="TRUE" if correct else "FALSE", **names))
        curves.append(curve_table(cells, correct=correct))
        pooled = cells.with_columns(task=pl.col("category"))
        categories.append(curve_table(pooled, correct=correct))
        for figure in drawn:
            if figure.model == model and (figure.datasets == "all" or dataset in figure.datasets):
                shown = tasks_of(figure, tasks, own)
                panels[figure.name].append(panel_curves(figure, cells, shown, correct=correct))
    return Outcome(
        name=config.name,
        correct=correct,
        curves=pl.concat(curves),
        categories=pl.concat(categories),
        panels={name: pl.concat(found) for name, found in panels.items() if found},
        figures=config.figures,
        tasks=tasks,
        directions=_directions(paths),
        failures=standing_failures(paths.root),
        interventions=_interventions(paths),
        last_attention=last_attention_table(paths.root),
        sinks=sink_table(paths.root),
        portraits=portraits(paths.root),
        probe_means=probe_means(paths.root),
        own=own,
        created_ms=_created_ms(paths),
    )


def _interventions(paths: RunPaths) -> pl.DataFrame:
    """With `media_group`, which says what samples are about one video."""
    rows = read(paths.root, "interventions")
    units = "SELECT DISTINCT model, dataset, sample_id, media_group FROM units"
    on = ["model", "dataset", "sample_id"]
    return rows.join(query(paths.root, units), on=on, how="left", maintain_order="left")


def _directions(paths: RunPaths) -> Directions:
    found = query(
        paths.root,
        "SELECT DISTINCT dataset, task, direction FROM units WHERE direction IS NOT NULL",
    )
    directions: dict[tuple[str, str], list[str]] = {}
    for dataset, task, direction in found.sort(pl.all()).rows():
        directions.setdefault((dataset, task), []).append(direction)
    return directions


def _created_ms(paths: RunPaths) -> int:
    """When the first session began: the same for every reader, wherever the folder lies."""
    for session in sessions(paths):
        return int(datetime.fromisoformat(str(session["at"])).timestamp() * 1000)
    return int(paths.sweep.stat().st_mtime * 1000)


def is_complete(task: TaskStatus) -> bool:
    """Whether the task's curves are final: each sample has ended, well or not."""
    return _settled(task) >= task.planned


def caveat(task: TaskStatus) -> str:
    """What a reader of the task's curves must know, "" if all is well."""
    notes = []
    if not is_complete(task):
        notes.append(f"INCOMPLETE: {_settled(task)} of {task.planned} samples")
    elif task.wrong and not task.right:
        notes.append("no sample was answered correctly")
    elif task.right == 1:
        notes.append("one sample: no band")
    if task.failed:
        notes.append(f"{task.failed} failed")
    return ", ".join(notes)


def _settled(task: TaskStatus) -> int:
    return task.right + task.wrong + task.failed
