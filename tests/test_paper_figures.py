"""Figures and tables that a sweep file lists: what is drawn and printed is what is stored."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from stored_run import INFO, config, curve_done, sample, sample_done
from test_extras_results import intervened

from avflow.datasets.sample import Sample
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.outcome import Outcome, read_outcome
from avflow.orchestrator.paper_figures import report_figures, report_tables
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.report import FORMATS, write_only, write_report
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import claim, record_session, stored_config
from avflow.orchestrator.store import ResultStore

LAYERS = 4
CATEGORY = {"sight": "media", "sound": "media", "both": "joint"}
VIDEO = [["video_to_question", "question_to_last"]]
FIGURES: list[dict[str, Any]] = [
    {"name": "fig3", "shows": "curves", "panels": "category", "windows": [3], "pathways": VIDEO},
    {"name": "fig5", "shows": "curves", "panels": "mean", "datasets": ["world"], "windows": [3],
     "tasks": ["match"], "ordering": "usual", "pathways": [["reference_to_last"]]},
    {"name": "fig6", "shows": "curves", "panels": "mean", "datasets": ["world"], "windows": [3],
     "tasks": ["sight", "sound"], "pathways": VIDEO},
    {"name": "fig8", "shows": "windows", "tasks": ["sight"], "windows": [1, 3], "pathways": VIDEO},
    {"name": "fig13", "shows": "curves", "panels": "direction", "windows": [3],
     "pathways": [["reference_to_last"]]},
    {"name": "fig1_left", "shows": "attention"},
    {"name": "fig7", "shows": "norms", "layers": [0, 3]},
    {"name": "table1", "shows": "masks", "interventions": ["late", "never_run"]},
    {"name": "table4", "shows": "discards", "panels": "direction", "tasks": ["match"],
     "interventions": ["full", "less"]},
]  # fmt: skip
SECTIONS: dict[str, Any] = {
    "experiments": [
        {"name": "e", "windows": [1, 3],
         "pathways": ["video_to_question", "question_to_last", "reference_to_last"]},
    ],
    "interventions": [
        {"name": "masks", "masks": [
            {"name": "late", "pathways": ["video_to_last"], "layers": [3]},
        ]},
        {"name": "drops", "tasks": ["match"], "discards": [
            {"name": "full", "steps": []},
            {"name": "less", "steps": [{"after_layer": 1, "groups": ["candidates"]}]},
        ]},
    ],
    "figures": [{"model": "tiny", **figure} for figure in FIGURES],
}  # fmt: skip


def item(number: int) -> Sample:
    return replace(
        sample(number, "match"),
        layout="interleaved",
        category="match",
        direction=("audio_to_image", "image_to_audio")[number % 2],
        ordering="usual" if number < 6 else "rare",
        correct_candidate=0,
    )


def make_plan() -> Plan:
    # as many of a task as make pooled means and means of means differ; pairs share a video
    counts = {"sight": 8, "sound": 4, "both": 4}
    samples = tuple(
        replace(sample(n, task), category=CATEGORY[task], media_group=f"{task}-{n // 2}")
        for task, count in counts.items()
        for n in range(count)
    )
    samples += tuple(item(number) for number in range(8))
    loaded = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    return build_plan(config(**SECTIONS), {"world": loaded}, {"tiny": INFO})


def seed_of(text: str) -> int:
    return int(np.random.default_rng(list(text.encode())).integers(100))


def fill(paths: RunPaths, plan: Plan, keep: int = 99) -> None:
    claim(paths, plan)
    record_session(paths, plan, ["test"])
    store = ResultStore(paths, plan)
    for unit in plan.units:
        if int(unit.sample.sample_id.split("-")[1]) >= keep:
            continue
        for curve in unit.curves:
            store.add_curve(unit, curve_done(unit, curve.key))
        for spec in unit.extras:
            chance = seed_of(unit.unit_id + spec.key)
            seconds = 0.01 * chance if spec.key.startswith("discard") else None
            done = intervened(unit, spec.key, correct=chance < 60, seconds=seconds)
            store.add_curve(unit, replace(done, p_options=np.full(4, 0.2)))
        store.add_sample(unit, sample_done(unit), worker="host:1", attempt=1)
    store.commit()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = RunPaths(tmp_path_factory.mktemp("paper") / "run")
    paths.root.mkdir()
    fill(paths, make_plan())
    return paths


@pytest.fixture(scope="module")
def outcome(paths: RunPaths) -> Outcome:
    return read_outcome(paths, stored_config(paths))


def drawn(figure: Figure) -> dict[tuple[str, str], list[float]]:
    """(panel, pathway) -> plotted values, by centre layer."""
    found: dict[tuple[str, str], list[float]] = {}
    for axes in figure.get_axes():
        for line in axes.get_lines():
            points = np.asarray(line.get_xydata())
            if len(points) == LAYERS:
                assert points[:, 0].tolist() == list(range(LAYERS))
                panel = axes.get_title().rpartition(" (n")[0]
                found[panel, str(line.get_label())] = points[:, 1].tolist()
    return found


def by_hand(cells: pl.DataFrame, **where: Any) -> list[float]:
    """Per cent, by layer, from the store's own rows."""
    kept = cells.filter(pl.lit(True), **where)
    return [
        100 * np.mean(kept.filter(center_layer=c)["delta"].to_numpy()).item() for c in range(LAYERS)
    ]


def test_categories_pool_the_samples_of_their_tasks(outcome: Outcome, paths: RunPaths) -> None:
    cells = read(paths.root).filter(window=3)
    found = drawn(report_figures(outcome, "fig3")["fig3"])
    assert {panel for panel, _ in found} == {"media", "both"}  # one task alone keeps its name
    for (panel, pathway), values in found.items():
        category = "joint" if panel == "both" else "media"
        assert values == pytest.approx(by_hand(cells, pathway=pathway, category=category))


def test_an_average_is_of_task_means_with_the_pooled_mean_beside(
    outcome: Outcome, paths: RunPaths
) -> None:
    cells = read(paths.root).filter(window=3, pathway="video_to_question")
    found = drawn(report_figures(outcome, "fig6")["fig6"])
    parts = [by_hand(cells, task=task) for task in ("sight", "sound")]
    tasks = np.mean(parts, axis=0).tolist()
    pooled = by_hand(cells.filter(pl.col("task").is_in(["sight", "sound"])))
    assert found["mean of tasks", "video_to_question"] == pytest.approx(tasks)
    assert found["pooled", "video_to_question"] == pytest.approx(pooled)
    assert tasks != pytest.approx(pooled)


def test_only_the_named_ordering_is_shown(outcome: Outcome, paths: RunPaths) -> None:
    cells = read(paths.root).filter(window=3, pathway="reference_to_last")
    found = drawn(report_figures(outcome, "fig5")["fig5"])
    assert found["pooled", "reference_to_last"] == pytest.approx(by_hand(cells, ordering="usual"))
    assert outcome.panels["fig5"]["n"].unique().to_list() == [6]


def test_a_panel_a_width_and_a_panel_a_direction(outcome: Outcome, paths: RunPaths) -> None:
    cells = read(paths.root)
    widths = drawn(report_figures(outcome, "fig8")["fig8"])
    for window in (1, 3):
        expected = by_hand(cells, window=window, pathway="question_to_last", task="sight")
        assert widths[f"k = {window}", "question_to_last"] == pytest.approx(expected)
    ways = drawn(report_figures(outcome, "fig13")["fig13"])
    for direction, short in (("audio_to_image", "A to I"), ("image_to_audio", "I to A")):
        expected = by_hand(cells, window=3, direction=direction, pathway="reference_to_last")
        assert ways[f"match ({short})", "reference_to_last"] == pytest.approx(expected)


def test_bands_draw_videos_and_not_questions(outcome: Outcome) -> None:
    sight = outcome.curves.filter(task="sight", window=3)
    assert set(sight["n"]) == {8}
    assert set(sight["videos"]) == {4}


def test_printed_cells_are_the_stores_counts(outcome: Outcome, paths: RunPaths) -> None:
    rows = read(paths.root, "interventions")
    tables = report_tables(outcome)
    late = rows.filter(intervention="late")
    share = f"{100 * cast(float, late['correct'].mean()):.2f}"
    assert tables["table1"].cells[1][:2] == ("late", share)
    assert tables["table1"].cells[1][3:] == (str(late["correct"].sum()), "16")
    assert any("never_run" in note for note in tables["table1"].notes)
    table = tables["table4"]
    assert table.columns[:3] == ("tokens", "match (A to I) (n = 4)", "match (I to A) (n = 4)")
    full, less = table.cells
    base = cast(
        float, rows.filter(intervention="full", direction="audio_to_image")["correct"].mean()
    )
    here = cast(
        float, rows.filter(intervention="less", direction="audio_to_image")["correct"].mean()
    )
    assert full[1] == f"{100 * base:.2f}"
    assert less[1] == f"{100 * here:.2f} ({100 * (here - base):+.2f})"
    latency = cast(float, rows.filter(intervention="less")["prefill_s"].mean())
    assert less[3] == f"{1000 * latency:.2f}"


def test_nothing_stored_is_drawn_as_such(outcome: Outcome) -> None:
    figures = report_figures(outcome, "fig1") | report_figures(outcome, "fig7")
    for figure in figures.values():
        assert "INCOMPLETE: nothing is stored" in figure.get_supxlabel()


def test_a_pathway_or_a_width_that_was_not_run_is_said_in_its_panel(outcome: Outcome) -> None:
    fig8 = next(figure for figure in outcome.figures if figure.name == "fig8")
    more = fig8.model_copy(
        update={"windows": (3, 9), "pathways": (("question_to_last", "cross_audio"),)}
    )
    drawn = replace(
        outcome, figures=(more,), panels={"fig8": outcome.panels["fig8"].filter(window=3)}
    )
    figure = report_figures(drawn, "fig8")["fig8"]
    texts = [text.get_text() for axes in figure.get_axes() for text in axes.texts]
    assert texts == ["no curve is stored of cross-audio", "no curve is stored"]


def test_half_a_run_is_drawn_and_says_so(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    fill(paths, make_plan(), keep=3)
    half = read_outcome(paths, stored_config(paths))
    figure = report_figures(half, "fig3")["fig3"]
    texts = [text.get_text() for axes in figure.get_axes() for text in axes.texts]
    assert texts == ["INCOMPLETE: 6 of 12 samples", "INCOMPLETE: 3 of 4 samples"]
    expected = by_hand(read(paths.root), window=3, pathway="question_to_last", task="both")
    assert drawn(figure)["both", "question_to_last"] == pytest.approx(expected)
    notes = report_tables(half, "table4")["table4"].notes
    assert notes[0] == "match (A to I): INCOMPLETE: 3 of 8 samples"


def test_the_report_is_one_page_with_every_item(outcome: Outcome, paths: RunPaths) -> None:
    write_report(paths, outcome)
    page = (paths.report / "report.html").read_text()
    for figure in FIGURES:
        assert f'id="{figure["name"]}"' in page
    assert page.count("<svg") == 7
    assert "src=" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    for suffix in FORMATS:
        assert (paths.report / f"fig3.{suffix}").is_file()
    stored = pl.read_csv(paths.report / "fig3.csv")
    assert stored["mean"].to_list() == pytest.approx(outcome.panels["fig3"]["mean"].to_list())


def test_one_item_alone(outcome: Outcome, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    written = write_only(paths, outcome, "fig3")
    assert {path.name for path in written} == {"fig3.svg", "fig3.png", "fig3.pdf", "fig3.csv"}
    assert {path.name for path in write_only(paths, outcome, "table4")} == {"table4.csv"}
    with pytest.raises(ConfigError, match="did you mean 'fig3'"):
        write_only(paths, outcome, "fig33")


def test_wrong_samples_on_request(outcome: Outcome, paths: RunPaths) -> None:
    wrong = read_outcome(paths, stored_config(paths), correct=False)
    assert wrong.curves.is_empty()  # each of these was right
    assert "WRONGLY" in report_figures(wrong, "fig3")["fig3"].get_suptitle()
