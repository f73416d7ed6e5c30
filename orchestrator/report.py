"""RUN/report: the figures, their tables, and what was found in words. Made again only when the
numbers have changed."""

from dataclasses import asdict
from typing import Final

from avflow.orchestrator.figures import save_figures, sweep_figures
from avflow.orchestrator.findings import findings
from avflow.orchestrator.identity import digest
from avflow.orchestrator.outcome import Outcome, caveat
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.statistics import peak_table

REPORT_VERSION: Final = 1
"""Counted up when the same numbers would be drawn in another way."""

_STAMP: Final = "digest.txt"


def words(outcome: Outcome) -> str:
    """What was found, a line a pathway, and what to keep in mind, a line a task."""
    notes = [
        f"mind: {task.model}, {task.dataset}, {task.task}: {caveat(task)}"
        for task in outcome.tasks
        if caveat(task)
    ]
    return "\n".join([*findings(outcome.curves, outcome.own), *notes])


def report_digest(outcome: Outcome) -> str:
    """Of everything that the report shows."""
    tables = [table.write_csv(float_precision=12) for table in (outcome.curves, outcome.failures)]
    tasks = [asdict(task) for task in outcome.tasks]
    labels = [pathway.label for pathway in outcome.own]
    return digest([REPORT_VERSION, tables, tasks, labels, words(outcome)])


def write_report(paths: RunPaths, outcome: Outcome) -> None:
    """Bring RUN/report in line: FIGURE.svg and .png, curves.csv, peaks.csv, failures.csv,
    findings.txt. Does nothing if it is."""
    folder, wanted = paths.report, report_digest(outcome)
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        old.unlink()
    save_figures(sweep_figures(outcome.curves, outcome.tasks, outcome.own), folder)
    outcome.curves.write_csv(folder / "curves.csv")
    peak_table(outcome.curves).write_csv(folder / "peaks.csv")
    outcome.failures.write_csv(folder / "failures.csv")
    (folder / "findings.txt").write_text(words(outcome) + "\n")
    stamp.write_text(wanted)  # last: whatever was cut short is made again
