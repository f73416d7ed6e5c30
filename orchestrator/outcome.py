"""What a run folder holds, as figures, MLflow and the words need it: curves, and how far it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import polars as pl

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.extras_results import last_attention_table, portraits, sink_table
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.results import TaskStatus, query, read, standing_failures, status
from avflow.orchestrator.run_folder import sessions
from avflow.orchestrator.statistics import CURVE, curve_table
from avflow.pathways.pathway import Pathway

# Only what curves need: a large sweep's cells have many more columns than fit in memory.
_CELLS: Final = """
    SELECT model, dataset, task, variant, window, pathway, center_layer, sample_id, delta,
           base_token, knockout_token, correct_base
    FROM cells WHERE correct_base
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`curves` is `statistics.curve_table` of all cells; `interventions` the rows of that table;
    `last_attention`, `sinks` and `portraits` the tables of `extras_results`; `created_ms` counts
    from 1970."""

    curves: pl.DataFrame
    tasks: tuple[TaskStatus, ...]
    failures: pl.DataFrame
    interventions: pl.DataFrame
    last_attention: pl.DataFrame
    sinks: pl.DataFrame
    portraits: pl.DataFrame
    own: tuple[Pathway, ...]
    created_ms: int

    def cell_keys(self, task: TaskStatus) -> Iterator[dict[str, Any]]:
        """The (model, dataset, task, variant, window) of a task that have curves."""
        of_task = self.curves.filter(model=task.model, dataset=task.dataset, task=task.task)
        yield from of_task.select(CURVE[:-1]).unique().sort(CURVE[:-1]).iter_rows(named=True)


def read_outcome(paths: RunPaths, config: SweepConfig) -> Outcome:
    """From the store alone, running or not. Raises StoreError for what is no run folder."""
    return Outcome(
        curves=curve_table(query(paths.root, _CELLS)),
        tasks=status(paths.root).tasks,
        failures=standing_failures(paths.root),
        interventions=read(paths.root, "interventions"),
        last_attention=last_attention_table(paths.root),
        sinks=sink_table(paths.root),
        portraits=portraits(paths.root),
        own=config.own_pathways(),
        created_ms=_created_ms(paths),
    )


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
    elif not task.right:
        notes.append("no sample was answered correctly")
    elif task.right == 1:
        notes.append("one sample: no band")
    if task.failed:
        notes.append(f"{task.failed} failed")
    return ", ".join(notes)


def _settled(task: TaskStatus) -> int:
    return task.right + task.wrong + task.failed
