"""The paper's figures: a panel a task, a line a pathway, the change against the centre layer.

Lines are means over samples, bands the 95% bootstrap interval of the mean, both straight from
`statistics.curve_table`. A panel whose data is incomplete says so on its face. Drawn without
pyplot, so that nothing global is touched; the same table gives the same bytes of SVG.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from avflow.orchestrator.outcome import caveat
from avflow.orchestrator.paths import slug
from avflow.orchestrator.results import TaskStatus
from avflow.pathways import catalogue
from avflow.pathways.pathway import Pathway

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours (less the yellow, too pale for a line); styles and markers differ as well,
# so that a line is known without its colour.
_LOOKS: Final = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (5, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
    ("#E69F00", (0, (1, 1)), "X"),
)
_PANELS_A_LINE: Final = 5
_PANEL_INCHES: Final = (2.7, 2.3)
_NOTE_LETTERS: Final = 44  # of a panel's width
_WARNING: Final = "#B00020"
_UNDATED: Final = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}

Rows = tuple[tuple[Pathway, ...], ...]
"""A figure's pathways, row by row; every row repeats the tasks."""


def figure_rows(own: Sequence[Pathway] = ()) -> dict[str, Rows]:
    """The figures by name: the paper's (`fig3`, `fig4`, ...) and `own`, a person's pathways.

    A figure with more pathways than there are looks for lines gets one row for each target.
    """
    figures: dict[str, list[Pathway]] = {}
    redefined = {(pathway.layout, pathway.name) for pathway in own}
    for pathway in catalogue.ALL:
        if (pathway.layout, pathway.name) not in redefined:
            for name in pathway.figures:
                figures.setdefault(name, []).append(pathway)
    for layout in dict.fromkeys(pathway.layout for pathway in own):
        name = "own" if layout == "single_video" else "own_interleaved"
        figures[name] = [pathway for pathway in own if pathway.layout == layout]
    return {name: _rows(pathways) for name, pathways in sorted(figures.items(), key=_by_number)}


def _by_number(item: tuple[str, list[Pathway]]) -> tuple[int, str]:
    digits = item[0].removeprefix("fig")
    return (int(digits), "") if digits.isdigit() else (10_000, item[0])


def _rows(pathways: list[Pathway]) -> Rows:
    if len(pathways) <= len(_LOOKS):
        return (tuple(pathways),)
    rows: dict[tuple[str, ...], list[Pathway]] = {}
    for pathway in pathways:
        rows.setdefault(pathway.targets, []).append(pathway)
    return tuple(
        tuple(row[start : start + len(_LOOKS)])
        for row in rows.values()
        for start in range(0, len(row), len(_LOOKS))
    )


def change_figure(
    curves: pl.DataFrame, rows: Rows, tasks: Sequence[TaskStatus], *, title: str
) -> Figure:
    """Draw `curves` (of one model, data set, variant and window): a panel for each row and task."""
    from matplotlib.figure import Figure

    lines = -(-len(tasks) // _PANELS_A_LINE)
    columns = -(-len(tasks) // lines)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * columns + 0.4, (height * lines + 0.5) * len(rows) + 0.4))
    figure.set_layout_engine("constrained")
    figure.suptitle(textwrap.fill(title, max(30, int(12 * width * columns))), fontsize=11)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        panels = list(part.subplots(lines, columns, squeeze=False).flat)
        for axes, task in zip(panels, tasks, strict=False):
            _draw_panel(axes, curves.filter(pl.col("task") == task.task), row, task)
        _label_outer(panels, len(tasks), columns)
        _legend(part, row, inches=width * columns)
    drawn = [pathway.name for row in rows for pathway in row]
    _share_limits(figure, curves.filter(pl.col("pathway").is_in(drawn)))
    return figure


def _label_outer(panels: Sequence[Axes], drawn: int, columns: int) -> None:
    """Name the axes at the left and under the last panel of each column; hide unused panels."""
    for at, axes in enumerate(panels):
        left, bottom = at % columns == 0, at + columns >= drawn
        axes.tick_params(labelsize=7, labelleft=left, labelbottom=bottom)
        axes.set_ylabel("change of p (%)" if left else "", fontsize=8)
        axes.set_xlabel("centre layer" if bottom else "", fontsize=8)
        if at >= drawn:
            axes.set_axis_off()


def _legend(part: SubFigure, pathways: Sequence[Pathway], *, inches: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, ls=style, marker=marker, ms=4, label=_arrows(pathway.label))
        for pathway, (colour, style, marker) in zip(pathways, _LOOKS, strict=False)
    ]
    longest = max(len(pathway.label) for pathway in pathways)
    columns = max(1, int(inches / (0.065 * longest + 0.7)))
    part.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)),
        fontsize=8, frameon=False, handlelength=3,
    )  # fmt: skip


def _arrows(label: str) -> str:
    return label.replace("<-/->", "\N{LEFT RIGHT ARROW WITH STROKE}").replace(
        "-/->", "\N{RIGHTWARDS ARROW WITH STROKE}"
    )


def _draw_panel(
    axes: Axes, curves: pl.DataFrame, pathways: Sequence[Pathway], task: TaskStatus
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.axhline(0, color="0.6", lw=0.8, zorder=0)
    absent = []
    for pathway, (colour, style, marker) in zip(pathways, _LOOKS, strict=False):
        line = curves.filter(pl.col("pathway") == pathway.name).sort("center_layer")
        if line.is_empty():
            absent.append(_arrows(pathway.label))
            continue
        layers = line["center_layer"].to_numpy()
        mean, low, high = (
            100 * line[c].cast(pl.Float64).to_numpy() for c in ("mean", "low", "high")
        )
        axes.fill_between(layers, low, high, color=colour, alpha=0.18, lw=0, label=pathway.name)
        axes.plot(
            layers, mean, color=colour, ls=style, marker=marker, ms=3, lw=1.4, label=pathway.name
        )
    axes.set_title(f"{task.task} ({_sample_count(curves)})", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if note := caveat(task) or _absence(absent, len(pathways)):
        axes.text(
            0.5, 0.02, note, transform=axes.transAxes, ha="center", va="bottom", fontsize=7,
            color=_WARNING, bbox={"color": "white", "alpha": 0.8, "pad": 1},
        )  # fmt: skip


def _absence(absent: Sequence[str], of: int) -> str:
    """Of a panel whose samples have all ended: lines that the legend has and the panel lacks."""
    if not absent:
        return ""
    if len(absent) == of:
        return "no curve is stored"
    return textwrap.fill(f"no curve is stored of {', '.join(absent)}", _NOTE_LETTERS)


def _sample_count(curves: pl.DataFrame) -> str:
    counts = sorted(set(curves["n"]))
    if not counts:
        return "n = 0"
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def _share_limits(figure: Figure, curves: pl.DataFrame) -> None:
    """One y axis for all panels of a figure, so that they compare: -100% is always on it."""
    values = pl.concat([curves["mean"], curves["low"], curves["high"]]).drop_nulls() * 100
    bottom, top = min([-100.0, *values]), max([10.0, *values])
    margin = 0.05 * (top - bottom)
    for axes in figure.get_axes():
        axes.set_ylim(bottom - margin, top + margin)


def task_figure(curves: pl.DataFrame, task: TaskStatus, own: Sequence[Pathway] = ()) -> Figure:
    """All pathways of one task: a panel for each row of each figure. `curves` are the task's."""
    from matplotlib.figure import Figure

    rows = [row for rows in figure_rows(own).values() for row in _held(rows, curves, task.layout)]
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines + 0.4))
    figure.set_layout_engine("constrained")
    figure.suptitle(f"{task.task}: {task.model} on {task.dataset}", fontsize=11)
    parts = figure.subfigures(lines, columns, squeeze=False).flat
    for part, row in zip(parts, rows, strict=False):
        axes = part.subplots()
        _draw_panel(axes, curves, row, task)
        _label_outer([axes], 1, 1)
        _legend(part, row, inches=4.6)
    _share_limits(figure, curves)
    return figure


def sweep_figures(
    curves: pl.DataFrame, tasks: Sequence[TaskStatus], own: Sequence[Pathway] = ()
) -> dict[str, Figure]:
    """Every figure for which there is a curve, by file stem.

    The stem is the figure's name; model, data set, window and variant are added where the sweep
    has more than one of them.
    """
    views = curves.select("model", "dataset", "window", "variant").unique().sort(pl.all())
    varying = [name for name in views.columns if views[name].n_unique() > 1]
    figures = {}
    for view in views.iter_rows(named=True):
        table = curves.filter(**view)
        for name, rows in figure_rows(own).items():
            layout = rows[0][0].layout
            held = _held(rows, table, layout)
            shown = [
                task
                for task in tasks
                if (task.model, task.dataset, task.layout)
                == (view["model"], view["dataset"], layout)
            ]
            if held and shown:
                stem = "-".join([name, *(slug(f"{key[0]}{view[key]}") for key in varying)])
                title = "{}: {model} on {dataset}, window of {window}".format(name, **view)
                figures[stem] = change_figure(table, held, shown, title=title)
    return figures


def _held(rows: Rows, curves: pl.DataFrame, layout: str) -> Rows:
    """The pathways of this kind of prompt that have a curve, without empty rows."""
    names = set(curves["pathway"])
    held = (tuple(p for p in row if p.layout == layout and p.name in names) for row in rows)
    return tuple(row for row in held if row)


def save_figures(
    figures: Mapping[str, Figure], folder: Path, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Write each figure in each format under `folder`, made if missing; returns the paths."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # A fixed salt and no date: unchanged data leave unchanged files.
    with mpl.rc_context({"svg.hashsalt": "avflow", "svg.fonttype": "none"}):
        for stem, figure in figures.items():
            if layout := figure.get_layout_engine():
                layout.execute(figure)  # once for all formats: half of the time
                figure.set_layout_engine("none")
            for suffix in formats:
                path = folder / f"{stem}.{suffix}"
                figure.savefig(path, dpi=150, metadata=_UNDATED.get(suffix))
                paths.append(path)
    return paths
