"""RUN/report: the figures, their tables, and what was found in words. Made again only when the
numbers have changed."""

from dataclasses import asdict
from typing import Final

import polars as pl

from avflow.orchestrator.extras_figures import probe_figures
from avflow.orchestrator.extras_results import intervention_table, intervention_words
from avflow.orchestrator.figures import save_figures, sweep_figures
from avflow.orchestrator.findings import findings
from avflow.orchestrator.identity import digest
from avflow.orchestrator.outcome import Outcome, caveat
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.statistics import peak_table

REPORT_VERSION: Final = 2
"""Counted up when the same numbers would be drawn in another way."""

_STAMP: Final = "digest.txt"


def words(outcome: Outcome) -> str:
    """What was found, a line a pathway, and what to keep in mind, a line a task."""
    notes = [
        f"mind: {task.model}, {task.dataset}, {task.task}: {caveat(task)}"
        for task in outcome.tasks
        if caveat(task)
    ]
    found = [*findings(outcome.curves, outcome.own), *intervention_words(outcome.interventions)]
    return "\n".join([*found, *notes])


def report_digest(outcome: Outcome) -> str:
    """Of everything that the report shows."""
    extras = _extras(outcome).values()
    tables = [
        table.write_csv(float_precision=12)
        for table in (outcome.curves, outcome.failures, outcome.portraits, *extras)
    ]
    tasks = [asdict(task) for task in outcome.tasks]
    labels = [pathway.label for pathway in outcome.own]
    return digest([REPORT_VERSION, tables, tasks, labels, words(outcome)])


def _extras(outcome: Outcome) -> dict[str, pl.DataFrame]:
    """Tables of interventions and probes by file name; those that the sweep asked for."""
    interventions = intervention_table(outcome.interventions).with_columns(
        pl.col("layers").list.eval(pl.element().cast(pl.String)).list.join(" ")
    )
    tables = {
        "interventions.csv": interventions,
        "last_attention.csv": outcome.last_attention,
        "sinks.csv": outcome.sinks,
    }
    return {name: table for name, table in tables.items() if not table.is_empty()}


def write_report(paths: RunPaths, outcome: Outcome) -> None:
    """Bring RUN/report in line: FIGURE.svg and .png, curves.csv, peaks.csv, failures.csv,
    findings.txt, and of interventions and probes interventions.csv, last_attention.csv, sinks.csv.
    Does nothing if it is."""
    folder, wanted = paths.report, report_digest(outcome)
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        old.unlink()
    figures = sweep_figures(outcome.curves, outcome.tasks, outcome.own)
    figures |= probe_figures(outcome.last_attention, outcome.portraits, outcome.tasks)
    save_figures(figures, folder)
    outcome.curves.write_csv(folder / "curves.csv")
    peak_table(outcome.curves).write_csv(folder / "peaks.csv")
    outcome.failures.write_csv(folder / "failures.csv")
    for name, table in _extras(outcome).items():
        table.write_csv(folder / name)
    (folder / "findings.txt").write_text(words(outcome) + "\n")
    stamp.write_text(wanted)  # last: whatever was cut short is made again
