"""Tables of interventions and probes, from rows that one can add up by hand."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from stored_run import INFO, config, make_plan, sample, sample_done

from avflow.orchestrator.accuracy import intervention_words
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.extras_figures import portrait_figure, probe_figures
from avflow.orchestrator.extras_results import (
    attention_map,
    intervention_table,
    last_attention_table,
    sink_table,
)
from avflow.orchestrator.outcome import read_outcome
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import build_plan
from avflow.orchestrator.report import write_report
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import claim, stored_config
from avflow.orchestrator.store import ResultStore
from avflow.workers.protocol import InterventionDone, ProbeDone, ProbeName, UnitSpec

INTERVENTIONS = [
    {
        "name": "i",
        "masks": [{"name": "late", "pathways": ["video_to_last"], "layers": [2, 3]}],
        "discards": [
            {"name": "full", "steps": []},
            {"name": "video", "steps": [{"after_layer": 1, "groups": ["video"]}]},
        ],
    }
]
PROBES = [
    {"name": "a", "probe": "last_attention"},
    {"name": "m", "probe": "attention_map", "layers": [1]},
    {"name": "s", "probe": "sinks", "layers": [1, 2]},
]


def intervened(
    unit: UnitSpec, key: str, *, correct: bool, seconds: float | None = None
) -> InterventionDone:
    (spec,) = (spec for spec in unit.extras if spec.key == key)
    return InterventionDone(
        unit_id=unit.unit_id,
        curve=key,
        layers=spec.layers,
        p=0.5,
        p_options=np.array([0.5, 0.2, 0.1, 0.1]),
        token=7 if correct else 8,
        predicted="A" if correct else None,
        correct=correct,
        p_base=0.6,
        correct_base=True,
        token_layers=None if seconds is None else 100,
        prefill_s=seconds,
    )


def probed(unit: UnitSpec, name: ProbeName, rows: list[tuple[object, ...]]) -> ProbeDone:
    """rows: (layer, group, position, key, width, dimension, value)."""
    layer, group, position, key, width, dimension, value = zip(*rows, strict=True)
    return ProbeDone(
        unit_id=unit.unit_id,
        curve=f"probe/{name}",
        layer=np.array(layer, dtype=np.int16),
        group=tuple(map(str, group)),
        position=np.array(position, dtype=np.int32),
        key=np.array(key, dtype=np.int32),
        width=np.array(width, dtype=np.int32),
        dimension=np.array(dimension, dtype=np.int32),
        value=np.array(value, dtype=np.float64),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("run"))


def stored(root: Path, *, whole: bool = False) -> Path:
    """Two samples of `sight` and one of `sound`, which lacks a discard unless `whole`."""
    samples = (sample(0), sample(1), sample(2, task="sound"))
    loaded = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    asked = config(interventions=INTERVENTIONS, probes=PROBES, experiments=[])
    plan = build_plan(asked, {"world": loaded}, {"tiny": INFO})
    paths = RunPaths(root)
    claim(paths, plan)
    store = ResultStore(paths, plan)
    for number, unit in enumerate(sorted(plan.units, key=lambda unit: unit.unit_id)):
        store.add_curve(unit, intervened(unit, "mask/late", correct=number > 0))
        store.add_curve(unit, intervened(unit, "discard/full", correct=True, seconds=1.0 + number))
        if number < 2 or whole:
            done = intervened(unit, "discard/video", correct=number == 0, seconds=0.5)
            store.add_curve(unit, done)
        attention = [(0, "video", -1, -1, -1, -1, 0.25 * number), (0, "last", -1, -1, -1, -1, 0.5)]
        store.add_curve(unit, probed(unit, "last_attention", attention))
        store.add_curve(
            unit,
            probed(
                unit,
                "attention_map",
                [
                    (1, "", q, k, 20, -1, q + k / 100)
                    for q in (0, 20, 40)
                    for k in range(0, q + 1, 20)
                ],
            ),
        )
        sinks = [(1, "", -1, -1, -1, -1, 0.0), (2, "", -1, -1, -1, -1, 1.0)]
        sinks += [(2, "system", 3, -1, -1, d, 100.0 * d + number) for d in (5, 9)]
        store.add_curve(unit, probed(unit, "sinks", sinks))
        store.add_sample(unit, sample_done(unit), worker="h:1", attempt=1)
    store.commit()
    return paths.root


def test_accuracies_pooled_or_by_task_and_times_against_the_same_samples(run: Path) -> None:
    rows = read(run, "interventions")
    pooled = intervention_table(rows, by=["model"])
    columns = ["kind", "intervention", "layers", "n", "accuracy", "prefill_s", "prefill_full_s"]
    assert pooled.select(columns).rows() == [
        ("discard", "full", [], 3, 1.0, 2.0, 2.0),
        ("discard", "video", [1], 2, 0.5, 0.5, 1.5),
        ("mask", "late", [2, 3], 3, pytest.approx(2 / 3), None, None),
    ]
    assert pooled["accuracy_base"].to_list() == [1.0] * 3
    by_task = intervention_table(rows).filter(kind="mask")
    assert by_task.select("task", "n", "accuracy").rows() == [("sight", 2, 0.5), ("sound", 1, 1.0)]
    assert intervention_words(rows) == [
        "discard full: 100.0% of 3 right, 100.0% without (no answer is lost or gained; a rate of "
        "up to 63.2% could go unseen); prefill 2000 ms",
        "discard video (after layer 1): 50.0% of 2 right, 100.0% without (-50.0 points, 95% band "
        "-100.0 to +0.0; 1 lost, none gained); prefill 500 ms, 1500 ms in full",
        "mask late (layers 2, 3): 66.7% of 3 right, 100.0% without (-33.3 points, 95% band -100.0 "
        "to +0.0; 1 lost, none gained)",
    ]


def test_attention_by_group_is_the_mean_over_samples(run: Path) -> None:
    table = last_attention_table(run).filter(group="video")
    assert table.select("task", "layer", "attention", "n").rows() == [
        ("sight", 0, 0.125, 2),
        ("sound", 0, 0.5, 1),
    ]


def test_sinks_by_dimension_the_largest_first(run: Path) -> None:
    table = sink_table(run).filter(task="sight")
    assert table.select("layer", "group", "dimension", "sinks", "magnitude", "n").rows() == [
        (2, "system", 9, 2, 900.5, 2),
        (2, "system", 5, 2, 500.5, 2),
    ]


def test_a_map_comes_back_as_a_matrix_with_its_edges(run: Path) -> None:
    found = attention_map(run, "tiny", "sight-0", 1)
    assert found.edges.tolist() == [0, 20, 40, 50]
    np.testing.assert_allclose(found.values, [[0, 0, 0], [20, 20.2, 0], [40, 40.2, 40.4]])
    with pytest.raises(ConfigError, match=r"no attention map .* layer 7; it holds \[\('tiny'"):
        attention_map(run, "tiny", "sight-0", 7)


def test_the_report_draws_and_lists_what_was_asked(run: Path) -> None:
    paths = RunPaths(run)
    outcome = read_outcome(paths, stored_config(paths))
    write_report(paths, outcome)
    drawn = {path.name for path in paths.report.glob("*.svg")}
    assert drawn == {"fig1-last_attention.svg", "fig1-maps.svg", "fig2-sinks.svg"}
    assert "dimension" in (paths.report / "fig2-sinks.svg").read_text()
    assert "mask,late,2 3,2,0.5,1.0" in (paths.report / "interventions.csv").read_text()
    assert (paths.report / "findings.txt").read_text().startswith("discard full: 100.0% of 3")
    (figure,) = [
        figure
        for name, figure in probe_figures(
            outcome.last_attention, outcome.portraits, outcome.tasks
        ).items()
        if name == "fig1-last_attention"
    ]
    (axes,) = figure.get_axes()
    lines = {str(line.get_label()): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_allclose(lines["video"], [0.25])  # of 0, 0.25 and 0.5
    np.testing.assert_allclose(lines["last"], [0.5])
    np.testing.assert_allclose(lines["other"], [0.25])  # the rest, so that shares add up to 1


def test_a_map_norms_and_sinks_are_drawn_as_they_are_stored(run: Path) -> None:
    paths = RunPaths(run)
    rows = read_outcome(paths, stored_config(paths)).portraits
    figure = portrait_figure("attention_map", rows, "map")
    assert "sample sight-0" in figure.get_suptitle()
    (image,) = figure.get_axes()[0].get_images()
    drawn = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
    np.testing.assert_allclose(drawn[np.tril_indices(3)], [0, 20, 20.2, 40, 40.2, 40.4])
    assert np.isnan(drawn[0, 1])  # what causality closes is not drawn
    (line,) = portrait_figure("sinks", rows, "sinks").get_axes()[0].get_lines()
    assert line.get_label() == "system, position 3"
    assert sorted(map(tuple, np.asarray(line.get_xydata()).tolist())) == [(5, 500), (9, 900)]
    norms = pl.DataFrame(
        [("norms", "s", 0, 3, "video", 2.5), ("norms", "s", 0, 4, "audio", 7.0)],
        schema=["probe", "sample_id", "layer", "position", "group", "value"],
        orient="row",
    )
    dots = portrait_figure("norms", norms, "norms").get_axes()[0].collections
    points = np.concatenate([np.asarray(part.get_offsets()) for part in dots])
    assert points.tolist() == [[3, 2.5], [4, 7.0]]


def test_a_run_without_extras_has_empty_tables(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    claim(paths, make_plan())
    rows = read(tmp_path, "interventions")
    assert intervention_table(rows).is_empty()
    assert intervention_words(rows) == []
    assert last_attention_table(tmp_path).is_empty()
    assert sink_table(tmp_path).is_empty()
    assert isinstance(rows, pl.DataFrame)


def test_what_was_not_planned_is_not_stored(run: Path, tmp_path: Path) -> None:
    plan = make_plan()
    store = ResultStore(RunPaths(tmp_path), plan)
    with pytest.raises(KeyError):
        store.add_curve(
            plan.units[0], probed(plan.units[0], "norms", [(0, "", 1, -1, -1, -1, 1.0)])
        )
