"""RUN/report: one page, its figures and tables as files, and what was found in words. Made again
only when the numbers have changed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import polars as pl

from avflow.orchestrator.accuracy import intervention_words
from avflow.orchestrator.extras_results import intervention_table
from avflow.orchestrator.figures import save_figures
from avflow.orchestrator.findings import evidence, findings
from avflow.orchestrator.identity import digest
from avflow.orchestrator.outcome import Outcome, caveat
from avflow.orchestrator.page import Item, render
from avflow.orchestrator.paper_figures import (
    heading,
    report_figures,
    report_tables,
    report_words,
)
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.run_folder import sessions
from avflow.orchestrator.sentences import few_words, sweep_sentences
from avflow.orchestrator.statistics import VERSION, peak_table
from avflow.orchestrator.tables import Table
from avflow.pathways import catalogue

REPORT_VERSION: Final = 4
"""Counted up when the same numbers would be drawn in another way."""

FORMATS: Final = ("svg", "png", "pdf")
PAGE: Final = "report.html"
_STAMP: Final = "digest.txt"


def words(outcome: Outcome) -> str:
    """What was found, a line a pathway, and what to keep in mind, a line a task."""
    caveats = [*few_words(outcome.curves), *_caveats(outcome)]
    return "\n".join([*_found(outcome), *(f"mind: {line}" for line in caveats)])


def _found(outcome: Outcome) -> list[str]:
    curves = findings(outcome.curves, outcome.own)
    answers = intervention_words(outcome.interventions)
    headed = any(line.endswith(":") for line in curves) and bool(answers)
    return [*curves, *(["masks and discards:"] if headed else []), *answers]


def full_words(outcome: Outcome) -> list[str]:
    """The same in sentences: how large, on how many samples, how sure, at which layers."""
    curves = sweep_sentences(outcome.curves, outcome.own)
    answers = intervention_words(outcome.interventions)
    headed = bool(curves and answers)
    return [*curves, *(["masks and discards:"] if headed else []), *answers]


def _caveats(outcome: Outcome) -> list[str]:
    return [
        f"{task.model}, {task.dataset}, {task.task}: {caveat(task)}"
        for task in outcome.tasks
        if caveat(task)
    ]


def report_digest(outcome: Outcome) -> str:
    """Of everything that the report shows."""
    extras = _extras(outcome).values()
    tables = [
        table.write_csv(float_precision=12)
        for table in (outcome.curves, outcome.failures, outcome.portraits, *extras)
    ]
    tables += [name + table.write_csv(float_precision=12) for name, table in outcome.panels.items()]
    tasks = [asdict(task) for task in outcome.tasks]
    labels = [pathway.label for pathway in outcome.own]
    shown = [figure.model_dump(mode="json") for figure in outcome.figures]
    return digest(
        [REPORT_VERSION, VERSION, outcome.correct, tables, tasks, labels, shown, words(outcome)]
    )


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


def report_folder(paths: RunPaths, outcome: Outcome) -> Path:
    """RUN/report, or RUN/report/wrong for curves of wrongly answered samples."""
    return paths.report if outcome.correct else paths.report / "wrong"


def write_report(paths: RunPaths, outcome: Outcome) -> None:
    """Bring RUN/report in line. Does nothing if it is.

    report.html; FIGURE.svg, .png, .pdf and, of figures that the sweep file lists, FIGURE.csv;
    TABLE.csv; curves.csv, peaks.csv, evidence.csv, failures.csv, findings.txt; and of interventions
    and probes interventions.csv, last_attention.csv, sinks.csv.
    """
    folder, wanted = report_folder(paths, outcome), report_digest(outcome)
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for old in (path for suffix in FORMATS for path in folder.glob(f"*.{suffix}")):
        old.unlink()
    figures, tables = report_figures(outcome), report_tables(outcome)
    save_figures(figures, folder, FORMATS)
    _write_numbers(folder, outcome, tables)
    outcome.curves.write_csv(folder / "curves.csv")
    peak_table(outcome.curves).write_csv(folder / "peaks.csv")
    evidence(outcome.curves).write_csv(folder / "evidence.csv")
    outcome.failures.write_csv(folder / "failures.csv")
    for name, table in _extras(outcome).items():
        table.write_csv(folder / name)
    full = "\n".join(full_words(outcome))
    (folder / "findings.txt").write_text(f"{words(outcome)}\n\nIn full:\n{full}\n")
    page = _page(outcome, folder, list(figures), tables, sessions(paths))
    (folder / PAGE).write_text(page, encoding="utf-8")
    stamp.write_text(wanted)  # last: whatever was cut short is made again


def write_only(paths: RunPaths, outcome: Outcome, name: str) -> list[Path]:
    """Draw one figure or table into the report's folder, and leave the rest as it is.

    Returns the files. Raises ConfigError for an unknown name.
    """
    folder = report_folder(paths, outcome)
    figures, tables = report_figures(outcome, name), report_tables(outcome, name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = save_figures(figures, folder, FORMATS)
    return [*drawn, *_write_numbers(folder, outcome, tables, figures)]


def _write_numbers(
    folder: Path,
    outcome: Outcome,
    tables: Mapping[str, Table],
    only: Mapping[str, object] | None = None,
) -> list[Path]:
    """The numbers behind tables and listed figures of curves."""
    frames = {name: table.numbers for name, table in tables.items()}
    frames |= {name: t for name, t in outcome.panels.items() if only is None or name in only}
    for name, frame in frames.items():
        frame.write_csv(folder / f"{name}.csv")
    return [folder / f"{name}.csv" for name in frames]


def _page(
    outcome: Outcome,
    folder: Path,
    drawn: Sequence[str],
    tables: Mapping[str, Table],
    of_sessions: Sequence[Mapping[str, object]],
) -> str:
    listed = {figure.name: figure for figure in outcome.figures}
    whose = "" if outcome.correct else ": samples answered wrongly"
    items = [
        Item(
            name=stem,
            title=heading(listed[stem]) if stem in listed else stem,
            svg=(folder / f"{stem}.svg").read_text(encoding="utf-8"),
            words=report_words(outcome, listed[stem]) if stem in listed else (),
            curves=outcome.panels.get(stem),
        )
        for stem in drawn
    ]
    return render(
        title=f"{outcome.name}{whose}",
        found=full_words(outcome),
        caveats=_caveats(outcome),
        tables=tables,
        items=items,
        sessions=of_sessions,
        labels={p.name: p.label for p in (*catalogue.ALL, *outcome.own)},
        curves=outcome.curves,
    )
