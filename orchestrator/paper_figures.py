"""The figures and tables of a report: those that the sweep file lists, or, where it lists none,
the paper's figures of every model, data set, window and variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.extras_figures import (
    attention_shares,
    portrait_figure,
    probe_figures,
    shares_figure,
)
from avflow.orchestrator.figure_config import PROBE_OF, TABLES, FigureConfig, figure_names
from avflow.orchestrator.figures import Rows, change_figure, sweep_figures
from avflow.orchestrator.outcome import Outcome, is_complete
from avflow.orchestrator.panels import statuses, tasks_of
from avflow.orchestrator.results import TaskStatus
from avflow.orchestrator.sentences import (
    attention_sentences,
    curve_sentences,
    portrait_sentences,
)
from avflow.orchestrator.source import unknown
from avflow.orchestrator.tables import Table, paper_table
from avflow.pathways.catalogue import find

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_figures(outcome: Outcome, only: str | None = None) -> dict[str, Figure]:
    """By file stem; `only` one item of the report, `fig1` meaning its parts too.

    A listed figure of which nothing is stored is drawn all the same, and says so. Raises
    ConfigError for an unknown name.
    """
    if not outcome.figures:
        figures = sweep_figures(outcome.curves, outcome.tasks, outcome.own)
        figures |= probe_figures(outcome.last_attention, outcome.portraits, outcome.tasks)
        names = {stem: figure for stem, figure in figures.items() if _is(stem, only)}
        if only is not None and not names:
            raise ConfigError(unknown("figure", only, figures))
        return names
    wanted = _wanted(outcome, only)
    return {
        figure.name: _figure(outcome, figure) for figure in wanted if figure.shows not in TABLES
    }


def report_tables(outcome: Outcome, only: str | None = None) -> dict[str, Table]:
    """Likewise, of tables. Raises ConfigError for an unknown name."""
    return {
        figure.name: paper_table(
            figure, outcome.interventions, _tasks(outcome, figure), outcome.directions
        )
        for figure in (_wanted(outcome, only) if outcome.figures else ())
        if figure.shows in TABLES
    }


def _is(stem: str, only: str | None) -> bool:
    return only is None or stem == only or stem.startswith(f"{only}-")


def _wanted(outcome: Outcome, only: str | None) -> Sequence[FigureConfig]:
    wanted = [f for f in outcome.figures if only is None or f.is_part_of(only)]
    if not wanted:
        raise ConfigError(unknown("figure", only or "", figure_names(outcome.figures)))
    return wanted


def heading(figure: FigureConfig) -> str:
    """`fig3: Within and across modalities, MODEL on DATA SET`."""
    title = f": {figure.title}" if figure.title else ""
    datasets = "" if figure.datasets == "all" else f" on {', '.join(figure.datasets)}"
    return f"{figure.name}{title}, {figure.model}{datasets}"


def _tasks(outcome: Outcome, figure: FigureConfig) -> list[TaskStatus]:
    return tasks_of(figure, outcome.tasks, outcome.own)


def _figure(outcome: Outcome, figure: FigureConfig) -> Figure:
    title = heading(figure)
    if figure.shows in ("curves", "windows"):
        return _curves(outcome, figure, title)
    if figure.shows == "attention":
        held = _of(figure, outcome.last_attention)
        return shares_figure(attention_shares(held), title, _missing(outcome, figure, held))
    probe, held = PROBE_OF[figure.shows], _portrait(outcome, figure)
    shown = held.filter(probe=probe)
    return portrait_figure(probe, held, title, _missing(outcome, figure, shown))


def _portrait(outcome: Outcome, figure: FigureConfig) -> pl.DataFrame:
    held = _of(figure, outcome.portraits)
    return held.filter(pl.col("layer").is_in(figure.layers)) if figure.layers else held


def report_words(outcome: Outcome, figure: FigureConfig) -> list[str]:
    """What a listed figure shows, and how sure it is, in sentences; tables have theirs."""
    if figure.shows == "attention":
        return attention_sentences(attention_shares(_of(figure, outcome.last_attention)))
    if figure.shows in PROBE_OF:
        return portrait_sentences(PROBE_OF[figure.shows], _portrait(outcome, figure))
    curves = outcome.panels.get(figure.name)
    if curves is None or curves.is_empty():
        return []
    names = [name for row in figure.pathways for name in row]
    return curve_sentences(curves, outcome.own, names)


def _of(figure: FigureConfig, rows: pl.DataFrame) -> pl.DataFrame:
    held = [
        figure.holds(dataset, task) for dataset, task in rows.select("dataset", "task").iter_rows()
    ]
    return rows.filter(pl.Series(held, dtype=pl.Boolean), model=figure.model)


def _missing(outcome: Outcome, figure: FigureConfig, held: pl.DataFrame) -> str:
    """What a figure of a probe must say on its face."""
    if held.is_empty():
        return "INCOMPLETE: nothing is stored of it yet"
    shown = _tasks(outcome, figure)
    absent = sorted(set(figure.layers) - set(held["layer"]))
    if absent:
        return f"INCOMPLETE: layers {', '.join(map(str, absent))} were not looked at"
    if figure.shows == "attention" and not all(map(is_complete, shown)):
        return "INCOMPLETE: samples are missing"
    return ""


def _curves(outcome: Outcome, figure: FigureConfig, title: str) -> Figure:
    panels = statuses(figure, _tasks(outcome, figure), outcome.directions)
    curves = outcome.panels.get(figure.name)
    if curves is None:
        curves = outcome.curves.clear()
    if figure.panels == "mean":
        title += ", averages over tasks"
    if not outcome.correct:
        title += ", samples answered WRONGLY"
        panels = [_wrong(panel) for panel in panels]
    return change_figure(curves, rows_of(outcome, figure, panels), panels, title=title)


def _wrong(panel: TaskStatus) -> TaskStatus:
    """As `caveat` reads it: none right is what is wanted here."""
    from dataclasses import replace

    return replace(panel, right=panel.wrong, wrong=panel.right)


def rows_of(outcome: Outcome, figure: FigureConfig, panels: Sequence[TaskStatus]) -> Rows:
    """The figure's pathways for its kind of prompt, row by row."""
    layouts = {panel.layout for panel in panels}
    rows = (
        tuple(p for name in row for p in find(name, outcome.own) if p.layout in layouts)
        for row in figure.pathways
    )
    return tuple(row for row in rows if row)
