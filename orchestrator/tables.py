"""The paper's Tables 1 and 4 from rows of `interventions`, cell by cell as they are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from avflow.orchestrator.accuracy import accuracies, change_words
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.outcome import caveat
from avflow.orchestrator.panels import Directions, labelled, statuses
from avflow.orchestrator.results import TaskStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table to print: `cells` are texts, the first column names the row; `notes` stand below.

    `words` say how sure the changes are; `numbers` is what the texts were made from: a row a row
    and panel.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    words: tuple[str, ...]
    numbers: pl.DataFrame


def paper_table(
    figure: FigureConfig,
    interventions: pl.DataFrame,
    shown: Sequence[TaskStatus],
    directions: Directions,
) -> Table:
    """What is stored of these tasks, and a note where that is not all."""
    kind = "discard" if figure.shows == "discards" else "mask"
    rows = interventions.filter(pl.col("intervention").is_in(figure.interventions), kind=kind)
    kept = labelled(figure, rows, shown)
    panels = statuses(figure, shown, directions)
    notes = tuple(f"{panel.task}: {caveat(panel)}" for panel in panels if _unfinished(panel))
    absent = [name for name in figure.interventions if name not in set(kept["intervention"])]
    if absent:
        notes = (*notes, f"INCOMPLETE: nothing is stored of {', '.join(absent)}")
    make = {"masks": _masks, "discards": _discards, "effective": _effective}[figure.shows]
    columns, cells, words, numbers = make(figure, kept, [panel.task for panel in panels])
    return Table(
        name=figure.name,
        title=figure.title or figure.name,
        columns=columns,
        cells=cells,
        notes=(*figure.notes, *notes),
        words=words,
        numbers=numbers,
    )


def _unfinished(panel: TaskStatus) -> bool:
    """Interventions are of all samples: that none was right is no caveat."""
    return panel.failed > 0 or panel.right + panel.wrong + panel.failed < panel.planned


_Texts = tuple[str, ...]
_Made = tuple[_Texts, tuple[_Texts, ...], _Texts, pl.DataFrame]
"""Columns, cells, words, numbers."""


def _masks(figure: FigureConfig, rows: pl.DataFrame, _panels: Sequence[str]) -> _Made:
    """Table 1: all samples pooled."""
    numbers = accuracies(rows, ["intervention"])
    by_name = {row["intervention"]: row for row in numbers.iter_rows(named=True)}
    cells: list[tuple[str, ...]] = []
    words = []
    for name in figure.interventions:
        row = by_name.get(name)
        if row is None:
            continue
        if not cells:
            base = row["accuracy_base"]
            cells.append(("no mask", _percent(base), "", str(row["right_base"]), str(row["n"])))
        change = _signed(row["change"])
        right, n = str(row["right"]), str(row["n"])
        cells.append((_spoken(name), _percent(row["accuracy"]), change, right, n))
        words.append(
            f"With {_spoken(name)} masked, {row['accuracy']:.1%} of {_questions(row)} are answered "
            f"right, {row['accuracy_base']:.1%} without the mask ({change_words(row)})."
        )
    return ("mask", "accuracy %", "change", "right", "of"), tuple(cells), tuple(words), numbers


def _discards(figure: FigureConfig, rows: pl.DataFrame, panels: Sequence[str]) -> _Made:
    """Table 4: a column a panel, the change from the first row in brackets, mean latency last."""
    first = figure.interventions[0]
    numbers = accuracies(rows, ["intervention", "task"], against=first)
    whole = accuracies(rows, ["intervention"], against=first)
    pooled = {row["intervention"]: row for row in whole.iter_rows(named=True)}
    found = {(row["intervention"], row["task"]): row for row in numbers.iter_rows(named=True)}
    held = [panel for panel in dict.fromkeys(panels) if panel in set(numbers["task"])]
    counts = {row["task"]: row["n"] for row in numbers.iter_rows(named=True)}
    cells, words = [], []
    for name in figure.interventions:
        if name not in pooled:
            continue
        words.append(_discarded(name, pooled[name], pooled.get(first)))
        texts = [_accuracy(found.get((name, panel)), compare=name != first) for panel in held]
        latency = f"{1000 * pooled[name]['prefill_s']:.2f}"
        work = f"{pooled[name]['token_layers']:,.0f}"
        cells.append((_spoken(name), *texts, latency, work))
    columns = (*(f"{panel} (n = {counts[panel]})" for panel in held), "prefill ms", "token-layers")
    return ("tokens", *columns), tuple(cells), tuple(words), numbers


def _discarded(name: str, row: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
    """Over all samples of the table; the first row is what the others are compared with."""
    text = f"{_spoken(name).capitalize()}: {row['accuracy']:.1%} of {_questions(row)} right"
    if first is None or row is first or row["change"] is None:
        return f"{text}."
    less = 1 - row["token_layers"] / first["token_layers"]
    faster = 1 - row["prefill_s"] / first["prefill_s"]
    return (
        f"{text}, {row['accuracy_base']:.1%} of the same without ({change_words(row)}); {less:.0%} "
        f"fewer token-layers, a prefill {abs(faster):.0%} {'shorter' if faster > 0 else 'longer'}."
    )


def _questions(row: Mapping[str, Any]) -> str:
    shared = f" about {row['videos']} videos" if row["videos"] < row["n"] else ""
    return f"{row['n']} questions{shared}"


def _effective(figure: FigureConfig, rows: pl.DataFrame, panels: Sequence[str]) -> _Made:
    """A row a task; the first intervention leaves what was found open, the others random choices
    of as many pathways: their mean, and the best and the worst of them."""
    numbers = accuracies(rows, ["task", "intervention"])
    first = figure.interventions[0]
    cells, words = [], []
    for panel in dict.fromkeys(panels):
        of_task = {
            row["intervention"]: row for row in numbers.filter(task=panel).iter_rows(named=True)
        }
        if not of_task:
            continue
        one = next(iter(of_task.values()))
        drawn = [row["accuracy"] for name, row in of_task.items() if name != first]
        if first in of_task:
            words.append(_kept_alone(panel, of_task[first], drawn))
        cells.append(
            (
                panel,
                str(one["n"]),
                _percent(one["accuracy_base"]),
                _accuracy(of_task.get(first), compare=True),
                _percent(sum(drawn) / len(drawn)) if drawn else "not run",
                f"{_percent(min(drawn))} to {_percent(max(drawn))}" if drawn else "",
            )
        )
    columns = ("task", "n", "accuracy %", "only what was found", "only as many at random", "range")
    return columns, tuple(cells), tuple(words), numbers


def _kept_alone(task: str, row: Mapping[str, Any], drawn: Sequence[float]) -> str:
    text = (
        f"{task}: with only the pathways found left open, {row['accuracy']:.1%} of "
        f"{_questions(row)} are answered right, {row['accuracy_base']:.1%} with all open "
        f"({change_words(row)})"
    )
    if drawn:
        several = (
            f"the mean of {len(drawn)} random choices" if len(drawn) > 1 else "a random choice"
        )
        text += f"; {sum(drawn) / len(drawn):.1%} with as many others, {several}"
    return f"{text}."


def _accuracy(row: Mapping[str, Any] | None, *, compare: bool) -> str:
    if row is None:
        return "not run"
    if not compare or row["change"] is None:
        return _percent(row["accuracy"])
    return f"{_percent(row['accuracy'])} ({_signed(row['change'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}"


def _spoken(name: str) -> str:
    return name.replace("_", " ")
