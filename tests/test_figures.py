"""What is drawn is what is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from avflow.orchestrator.figures import (
    change_figure,
    figure_rows,
    save_figures,
    sweep_figures,
    task_figure,
)
from avflow.orchestrator.results import TaskStatus
from avflow.orchestrator.statistics import curve_table
from avflow.pathways import catalogue
from avflow.pathways.pathway import Pathway

LAYERS = 6
TASKS = {"sight": "single_video", "sound": "single_video", "match": "interleaved"}


def state(task: str, **changes: Any) -> TaskStatus:
    fields: dict[str, Any] = {
        "model": "tiny", "dataset": "testbed", "task": task, "category": task,
        "layout": TASKS[task], "planned": 9, "right": 8, "wrong": 1, "failed": 0,
    }  # fmt: skip
    return TaskStatus(**fields | changes)


@pytest.fixture(scope="module")
def cells() -> pl.DataFrame:
    """All 37 pathways on three tasks; 8 right samples and a wrong one."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "model": "tiny", "dataset": "testbed", "task": task, "variant": "letter", "window": 3,
            "pathway": pathway.name, "center_layer": layer, "sample_id": f"{task}-{sample}",
            "delta": rng.normal(-0.3, 0.3), "base_token": 1, "knockout_token": 1,
            "correct_base": sample < 8, "correct_knockout": sample < 8,
            "p_base": 0.5, "p_knockout": 0.4,
        }
        for task, layout in TASKS.items()
        for pathway in catalogue.ALL
        if pathway.layout == layout
        for sample in range(9)
        for layer in range(LAYERS)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def panels(figure: Figure) -> dict[str, list[Axes]]:
    """Drawn panels by task."""
    found: dict[str, list[Axes]] = {}
    for axes in figure.get_axes():
        if axes.axison:
            found.setdefault(axes.get_title().split()[0], []).append(axes)
    return found


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("fig4", ["sight", "sound"]), ("fig10", ["sight", "sound"]), ("fig6", ["match"])],
)
def test_plotted_points_are_the_stores_numbers(
    cells: pl.DataFrame, name: str, tasks: list[str]
) -> None:
    curves = curve_table(cells)
    rows = figure_rows()[name]
    figure = change_figure(curves, rows, [state(task) for task in tasks], title="t")
    drawn = panels(figure)
    assert set(drawn) == set(tasks)
    for task in tasks:
        lines = {
            line.get_label(): line.get_xydata()
            for axes in drawn[task]
            for line in axes.get_lines()
            if len(line.get_xydata()) == LAYERS
        }
        assert set(lines) == {p.name for row in rows for p in row}
        for pathway, points in lines.items():
            # from the cells by hand, not through curve_table
            means = [
                100
                * np.mean(
                    cells.filter(
                        pl.col("correct_base"), task=task, pathway=pathway, center_layer=layer
                    )["delta"].to_numpy()
                )
                for layer in range(LAYERS)
            ]
            assert points[:, 0].tolist() == list(range(LAYERS))
            assert points[:, 1].tolist() == pytest.approx(means)


def test_bands_are_the_tables_low_and_high(cells: pl.DataFrame) -> None:
    curves = curve_table(cells)
    rows = figure_rows()["fig3"]
    figure = change_figure(curves, rows, [state("sight")], title="t")
    (axes,) = panels(figure)["sight"]
    bands = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    assert {band.get_label() for band in bands} == {p.name for p in rows[0]}
    for band in bands:
        (path,) = band.get_paths()
        drawn = {(int(x), round(float(y), 6)) for x, y in path.vertices}
        stored = curves.filter(task="sight", pathway=band.get_label())
        expected = {
            (row["center_layer"], round(100 * row[edge], 6))
            for row in stored.iter_rows(named=True)
            for edge in ("low", "high")
        }
        assert drawn == expected


def test_a_figure_of_incomplete_data_says_so_on_its_face(cells: pl.DataFrame) -> None:
    rows = figure_rows()["fig4"]
    tasks = [state("sight", right=5), state("sound", failed=1, right=7)]
    drawn = panels(change_figure(curve_table(cells), rows, tasks, title="t"))
    assert [t.get_text() for t in drawn["sight"][0].texts] == ["INCOMPLETE: 6 of 9 samples"]
    assert [t.get_text() for t in drawn["sound"][0].texts] == ["1 failed"]
    assert drawn["sight"][0].get_title() == "sight (n = 8)"


def test_every_pathway_is_in_a_figure_and_lines_of_a_panel_differ_in_look() -> None:
    figures = figure_rows()
    drawn = [p for rows in figures.values() for row in rows for p in row]
    assert sorted(p.name for p in drawn) == sorted(p.name for p in catalogue.ALL)
    assert list(figures) == ["fig3", "fig4", "fig5", "fig6", "fig9", "fig10"]
    assert max(len(row) for rows in figures.values() for row in rows) <= 7


def test_own_pathways_have_their_figure_and_take_the_place_of_the_papers(
    cells: pl.DataFrame,
) -> None:
    own = Pathway(
        name="video_to_last", layout="single_video", sources=("video", "audio"), targets=("last",)
    )
    rows = figure_rows([own])
    assert rows["own"] == ((own,),)
    assert "video_to_last" not in [p.name for p in rows["fig4"][0]]
    figures = sweep_figures(curve_table(cells), [state(task) for task in TASKS], [own])
    assert list(figures) == ["fig3", "fig4", "fig5", "fig6", "fig9", "fig10", "own"]


def test_only_what_the_sweep_holds_is_drawn(cells: pl.DataFrame) -> None:
    some = curve_table(cells.filter(pl.col("pathway").is_in(["video_to_last", "cross_frame"])))
    figures = sweep_figures(some, [state(task) for task in TASKS])
    assert list(figures) == ["fig3", "fig4"]
    lines = panels(figures["fig4"])["sight"][0].get_lines()
    assert [line.get_label() for line in lines[1:]] == ["video_to_last"]


def test_files_are_named_by_what_varies_and_do_not_change_with_unchanged_data(
    cells: pl.DataFrame, tmp_path: Path
) -> None:
    some = cells.filter(pathway="cross_frame")
    both = pl.concat([some, some.with_columns(window=pl.lit(5, pl.Int64))])

    def draw(folder: str) -> dict[str, bytes]:
        figures = sweep_figures(curve_table(both), [state("sight")])
        return {p.name: p.read_bytes() for p in save_figures(figures, tmp_path / folder)}

    first = draw("one")
    assert set(first) == {"fig3-w3.svg", "fig3-w3.png", "fig3-w5.svg", "fig3-w5.png"}
    assert draw("two") == first


def test_a_tasks_own_figure_shows_all_its_pathways(cells: pl.DataFrame) -> None:
    curves = curve_table(cells.filter(task="match"))
    figure = task_figure(curves, state("match"))
    lines = [
        line.get_label()
        for axes in figure.get_axes()
        for line in axes.get_lines()
        if len(line.get_xydata()) == LAYERS
    ]
    assert sorted(lines) == sorted(p.name for p in catalogue.INTERLEAVED)
