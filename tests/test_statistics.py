"""Means, bands and peaks, against hand-made numbers, scipy, and their own invariants."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from avflow.orchestrator.findings import effects, findings
from avflow.orchestrator.outcome import caveat, is_complete
from avflow.orchestrator.results import TaskStatus
from avflow.orchestrator.statistics import (
    CURVE,
    POINT,
    bootstrap_band,
    curve_table,
    peak_table,
)


def cells(
    deltas: np.ndarray,
    *,
    pathway: str = "video_to_question",
    task: str = "sight",
    model: str = "tiny",
    correct: bool = True,
) -> pl.DataFrame:
    """Cells of one curve: `deltas` is [samples, layers]; a top-1 token changes below -0.5."""
    n, layers = deltas.shape
    sample, layer = (grid.ravel() for grid in np.mgrid[:n, :layers])
    return pl.DataFrame(
        {
            "model": model,
            "dataset": "testbed",
            "task": task,
            "variant": "letter",
            "window": 3,
            "pathway": pathway,
            "center_layer": layer,
            "sample_id": [f"{task}-{i:03d}" for i in sample],
            "delta": deltas.ravel(),
            "base_token": 7,
            "knockout_token": np.where(deltas.ravel() < -0.5, 8, 7),
            "correct_base": correct,
        },
        schema_overrides={"window": pl.Int16, "center_layer": pl.Int16},
    )


def test_a_point_is_the_mean_and_flip_share_of_the_right_samples() -> None:
    right = cells(np.array([[-0.2, -0.8], [-0.4, -1.0], [0.0, 0.0], [0.2, -0.6]]))
    wrong = cells(np.full((3, 2), 9.0), correct=False).with_columns(
        sample_id=pl.lit("wrong-") + pl.col("sample_id")
    )
    table = curve_table(pl.concat([right, wrong]))
    assert table.columns == [*POINT, "n", "mean", "low", "high", "flip"]
    assert table["n"].to_list() == [4, 4]
    assert table["mean"].to_list() == pytest.approx([-0.1, -0.6])
    assert table["flip"].to_list() == [0.0, 0.75]


def test_bands_agree_with_scipys_percentile_bootstrap() -> None:
    deltas = np.random.default_rng(1).normal(-0.3, 0.4, (40, 5))
    low, high = bootstrap_band(deltas)
    expected = stats.bootstrap(
        (deltas,), np.mean, axis=0, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    width = expected.high - expected.low
    assert np.abs(low - expected.low).max() < 0.06 * width.max()
    assert np.abs(high - expected.high).max() < 0.06 * width.max()


def test_one_sample_has_no_band_and_is_no_finding() -> None:
    table = curve_table(cells(np.array([[-0.5, 0.1]])))
    assert table["mean"].to_list() == [-0.5, 0.1]
    assert table["low"].null_count() == table["high"].null_count() == 2
    assert findings(table) == []


def test_no_right_sample_gives_an_empty_table_of_the_same_columns() -> None:
    full = curve_table(cells(np.zeros((2, 2))))
    empty = curve_table(cells(np.zeros((2, 2)), correct=False))
    assert empty.is_empty()
    assert empty.schema == full.schema
    assert findings(empty) == []
    assert peak_table(empty).is_empty()


def test_a_curve_that_lacks_a_sample_is_resampled_over_its_own() -> None:
    rng = np.random.default_rng(3)
    whole, part = rng.normal(size=(6, 2)), rng.normal(size=(4, 2))
    both = pl.concat([cells(whole), cells(part, pathway="audio_to_question")])
    table = curve_table(both).filter(pathway="audio_to_question")
    assert table["n"].to_list() == [4, 4]
    low, high = bootstrap_band(part)
    assert table["low"].to_list() == pytest.approx(low.tolist())
    assert table["high"].to_list() == pytest.approx(high.tolist())


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    layers=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_order_of_rows_changes_nothing_and_the_band_holds_the_mean(
    n: int, layers: int, seed: int, scale: float
) -> None:
    deltas = np.random.default_rng(seed).normal(0, scale, (n, layers))
    table = curve_table(cells(deltas))
    shuffled = cells(deltas).sample(fraction=1, shuffle=True, seed=seed)
    assert curve_table(shuffled).equals(table)
    assert np.allclose(table["mean"], deltas.mean(axis=0))
    if n > 1:
        assert np.all(table["low"].to_numpy() <= table["high"].to_numpy())
        assert np.all(table["low"].to_numpy() >= deltas.min(axis=0) - 1e-12)
        assert np.all(table["high"].to_numpy() <= deltas.max(axis=0) + 1e-12)


def test_the_peak_is_the_largest_change_of_either_sign_and_the_first_of_equals() -> None:
    curves = curve_table(
        pl.concat(
            [
                cells(np.array([[0.1, -0.7, 0.6], [0.1, -0.7, 0.6]])),
                cells(np.array([[0.5, 0.0, -0.5]]), pathway="video_to_last"),
            ]
        )
    )
    peaks = peak_table(curves).sort(CURVE)
    assert peaks["center_layer"].to_list() == [0, 1]
    assert peaks["mean"].to_list() == pytest.approx([0.5, -0.7])


def test_findings_say_who_is_hurt_helped_and_spared_and_where() -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(0, 0.01, (10, 6))
    noise -= noise.mean(axis=0)
    sight = noise + np.array([-0.8, -0.6, 0, 0, 0, -0.2])
    sound = noise + np.array([0, 0, 0.3, 0, 0, 0])
    spared = noise - 0.04  # sure, but small
    unclear = np.array([[-2.0], [2.0], [-1.5], [1.1]])  # large, but unsure
    table = curve_table(
        pl.concat(
            [
                cells(sight),
                cells(sound, task="sound"),
                cells(spared, task="align"),
                cells(unclear, task="order"),
            ]
        )
    )
    (line,) = findings(table)
    assert line == (
        "video -/-> question: hurts sight by 80% (layers 0-1, 5); "
        "helps sound by 30% (layer 2); spares align; unclear for order"
    )
    assert effects(table)["peak"].null_count() == 2


def test_findings_are_headed_by_model_where_there_are_several() -> None:
    flat = np.zeros((3, 2))
    table = curve_table(pl.concat([cells(flat), cells(flat, model="other")]))
    assert findings(table) == [
        "other, testbed, window 3 (letter):",
        "video -/-> question: spares sight",
        "tiny, testbed, window 3 (letter):",
        "video -/-> question: spares sight",
    ]


def test_a_task_is_complete_when_each_sample_has_an_end() -> None:
    def task(right: int, wrong: int, failed: int) -> TaskStatus:
        return TaskStatus(
            model="tiny", dataset="testbed", task="sight", category="sight",
            layout="single_video", planned=10, right=right, wrong=wrong, failed=failed,
        )  # fmt: skip

    assert is_complete(task(7, 3, 0))
    assert caveat(task(7, 3, 0)) == ""
    assert is_complete(task(7, 2, 1))
    assert caveat(task(7, 2, 1)) == "1 failed"
    assert caveat(task(1, 9, 0)) == "one sample: no band"
    assert caveat(task(0, 10, 0)) == "no sample was answered correctly"
    assert not is_complete(task(7, 2, 0))
    assert caveat(task(7, 2, 0)) == "INCOMPLETE: 9 of 10 samples"
