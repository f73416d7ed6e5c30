"""The paper's Tables 1 and 4 from rows of `interventions`, cell by cell as they are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.outcome import caveat
from avflow.orchestrator.panels import Directions, labelled, statuses
from avflow.orchestrator.results import TaskStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table to print: `cells` are texts, the first column names the row; `notes` stand below.

    `numbers` is what the texts were made from: a row a row and panel.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
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
    columns, cells, numbers = make(figure, kept, [panel.task for panel in panels])
    return Table(
        name=figure.name,
        title=figure.title or figure.name,
        columns=columns,
        cells=cells,
        notes=(*figure.notes, *notes),
        numbers=numbers,
    )


def _unfinished(panel: TaskStatus) -> bool:
    """Interventions are of all samples: that none was right is no caveat."""
    return panel.failed > 0 or panel.right + panel.wrong + panel.failed < panel.planned


_Made = tuple[tuple[str, ...], tuple[tuple[str, ...], ...], pl.DataFrame]


def _summary(rows: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    return rows.group_by(by).agg(
        n=pl.len(),
        right=pl.col("correct").sum(),
        right_base=pl.col("correct_base").sum(),
        accuracy=pl.col("correct").mean(),
        accuracy_base=pl.col("correct_base").mean(),
        prefill_s=pl.col("prefill_s").mean(),
        token_layers=pl.col("token_layers").mean(),
    )


def _masks(figure: FigureConfig, rows: pl.DataFrame, _panels: Sequence[str]) -> _Made:
    """Table 1: all samples pooled."""
    numbers = _summary(rows, ["intervention"])
    by_name = {row["intervention"]: row for row in numbers.iter_rows(named=True)}
    cells: list[tuple[str, ...]] = []
    for name in figure.interventions:
        row = by_name.get(name)
        if row is None:
            continue
        if not cells:
            base = row["accuracy_base"]
            cells.append(("no mask", _percent(base), "", str(row["right_base"]), str(row["n"])))
        change = _signed(row["accuracy"] - row["accuracy_base"])
        right, n = str(row["right"]), str(row["n"])
        cells.append((_spoken(name), _percent(row["accuracy"]), change, right, n))
    return ("mask", "accuracy %", "change", "right", "of"), tuple(cells), numbers


def _discards(figure: FigureConfig, rows: pl.DataFrame, panels: Sequence[str]) -> _Made:
    """Table 4: a column a panel, the change from the first row in brackets, mean latency last."""
    numbers = _summary(rows, ["intervention", "task"])
    pooled = {r["intervention"]: r for r in _summary(rows, ["intervention"]).iter_rows(named=True)}
    found: Mapping[tuple[str, str], float] = {
        (row["intervention"], row["task"]): row["accuracy"] for row in numbers.iter_rows(named=True)
    }
    held = [panel for panel in dict.fromkeys(panels) if panel in set(numbers["task"])]
    counts = {row["task"]: row["n"] for row in numbers.iter_rows(named=True)}
    first = figure.interventions[0]
    cells = []
    for name in figure.interventions:
        if name not in pooled:
            continue
        texts = [_against(found.get((name, p)), found.get((first, p)), name != first) for p in held]
        latency = f"{1000 * pooled[name]['prefill_s']:.2f}"
        work = f"{pooled[name]['token_layers']:,.0f}"
        cells.append((_spoken(name), *texts, latency, work))
    columns = (*(f"{panel} (n = {counts[panel]})" for panel in held), "prefill ms", "token-layers")
    return ("tokens", *columns), tuple(cells), numbers


def _effective(figure: FigureConfig, rows: pl.DataFrame, panels: Sequence[str]) -> _Made:
    """A row a task; the first intervention leaves what was found open, the others random choices
    of as many pathways: their mean, and the best and the worst of them."""
    numbers = _summary(rows, ["task", "intervention"])
    first = figure.interventions[0]
    cells = []
    for panel in dict.fromkeys(panels):
        of_task = {
            row["intervention"]: row for row in numbers.filter(task=panel).iter_rows(named=True)
        }
        if not of_task:
            continue
        one = next(iter(of_task.values()))
        drawn = [row["accuracy"] for name, row in of_task.items() if name != first]
        kept = of_task[first]["accuracy"] if first in of_task else None
        cells.append(
            (
                panel,
                str(one["n"]),
                _percent(one["accuracy_base"]),
                _against(kept, one["accuracy_base"], compare=True),
                _percent(sum(drawn) / len(drawn)) if drawn else "not run",
                f"{_percent(min(drawn))} to {_percent(max(drawn))}" if drawn else "",
            )
        )
    columns = ("task", "n", "accuracy %", "only what was found", "only as many at random", "range")
    return columns, tuple(cells), numbers


def _against(value: float | None, base: float | None, compare: bool) -> str:
    if value is None:
        return "not run"
    if not compare or base is None:
        return _percent(value)
    return f"{_percent(value)} ({_signed(value - base)})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}"


def _spoken(name: str) -> str:
    return name.replace("_", " ")
