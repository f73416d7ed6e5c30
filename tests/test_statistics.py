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
    mean_of_tasks,
    peak_table,
)


def cells(
    deltas: np.ndarray,
    *,
    pathway: str = "video_to_question",
    task: str = "sight",
    model: str = "tiny",
    correct: bool = True,
    of: str = "",
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
            "sample_id": [f"{of}{task}-{i:03d}" for i in sample],
            "delta": deltas.ravel(),
            "p_base": 0.5,
            "p_knockout": 0.5 * (1 + deltas.ravel()),
            "correct_knockout": deltas.ravel() > -0.5,
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
    assert table.columns == [
        *POINT, "n", "videos", "mean", "low", "high", "flip",
        "dp", "log_odds", "accuracy", "p_value", "q_value",
    ]  # fmt: skip
    assert table["n"].to_list() == [4, 4]
    assert table["mean"].to_list() == pytest.approx([-0.1, -0.6])
    assert table["flip"].to_list() == [0.0, 0.75]


def test_the_effect_in_probability_log_odds_and_accuracy() -> None:
    table = curve_table(cells(np.array([[-0.2, -0.8], [-0.4, -1.0]])))
    assert table["dp"].to_list() == pytest.approx([-0.15, -0.45])
    p = np.array([[0.4, 0.1], [0.3, 2.0**-24]])  # base: even odds
    assert table["log_odds"].to_list() == pytest.approx(np.log(p / (1 - p)).mean(axis=0).tolist())
    assert table["accuracy"].to_list() == [0.0, -1.0]


def test_wrong_baselines_have_curves_of_their_own() -> None:
    both = pl.concat([cells(np.zeros((3, 2))), cells(np.full((2, 2), 0.5), correct=False, of="w")])
    assert curve_table(both)["n"].to_list() == [3, 3]
    wrong = curve_table(both, correct=False)
    assert wrong["n"].to_list() == [2, 2]
    assert wrong["mean"].to_list() == [0.5, 0.5]


def test_p_values_are_scipys_and_corrected_over_the_layers_of_a_curve() -> None:
    deltas = np.random.default_rng(7).normal([0, -0.2, -0.4, 0.1], 0.3, (15, 4))
    table = curve_table(pl.concat([cells(deltas), cells(deltas[:, :2], pathway="video_to_last")]))
    one = table.filter(pathway="video_to_question")
    expected = stats.ttest_1samp(deltas, 0, axis=0).pvalue
    assert one["p_value"].to_list() == pytest.approx(expected.tolist())
    corrected = stats.false_discovery_control(expected)
    assert one["q_value"].to_list() == pytest.approx(corrected.tolist())
    two = table.filter(pathway="video_to_last")["q_value"].to_list()
    assert two == pytest.approx(stats.false_discovery_control(expected[:2]).tolist())


def test_no_change_at_all_is_no_effect_and_the_same_change_everywhere_is_one() -> None:
    table = curve_table(cells(np.array([[0.0, -1.0]] * 5)))
    assert table["p_value"].to_list() == [1.0, 0.0]


def test_questions_about_one_video_count_as_one() -> None:
    """Twelve questions that say the same of three videos know no more than three."""
    videos = np.random.default_rng(5).normal(-0.3, 0.2, (3, 2))
    copied = cells(np.repeat(videos, 4, axis=0)).with_columns(
        media_group=pl.col("sample_id").str.slice(-3).cast(pl.Int32) // 4
    )
    together = curve_table(copied)
    alone = curve_table(cells(videos))
    assert together["n"].to_list() == [12, 12]
    assert together["videos"].to_list() == [3, 3]
    for column in ("mean", "low", "high", "p_value", "q_value"):
        assert together[column].to_list() == pytest.approx(alone[column].to_list()), column
    apart = curve_table(copied.drop("media_group"))
    assert (apart["high"] - apart["low"] < together["high"] - together["low"]).all()


def test_the_mean_of_tasks_lets_each_task_count_once_and_the_pooled_mean_each_sample() -> None:
    rng = np.random.default_rng(8)
    many, few = rng.normal(-0.2, 0.1, (30, 3)), rng.normal(-0.8, 0.1, (5, 3))
    table = mean_of_tasks(pl.concat([cells(many), cells(few, task="sound")]))
    tasks, pooled = table.filter(task="mean of tasks"), table.filter(task="pooled")
    expected = (many.mean(axis=0) + few.mean(axis=0)) / 2
    assert tasks["mean"].to_list() == pytest.approx(expected.tolist())
    both = np.concatenate([many, few]).mean(axis=0)
    assert pooled["mean"].to_list() == pytest.approx(both.tolist())
    assert tasks["tasks"].to_list() == pooled["tasks"].to_list() == [2, 2, 2]
    assert tasks["n"].to_list() == pooled["n"].to_list() == [35, 35, 35]
    welch = stats.ttest_ind(many, -few, equal_var=False).pvalue  # that the sum of both is zero
    assert tasks["p_value"].to_list() == pytest.approx(welch.tolist())
    corrected = stats.false_discovery_control(welch)
    assert tasks["q_value"].to_list() == pytest.approx(corrected.tolist())
    # the error of a mean of two independent means
    spread = np.sqrt(many.var(axis=0) / 30 + few.var(axis=0) / 5) / 2
    width = (tasks["high"] - tasks["low"]).to_numpy()
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.15)


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
    loose = np.array([[-0.2], [0.2], [-0.15], [0.17]])  # a small mean, and a wide band
    table = curve_table(
        pl.concat(
            [
                cells(sight),
                cells(sound, task="sound"),
                cells(spared, task="align"),
                cells(unclear, task="order"),
                cells(loose, task="other"),
            ]
        )
    )
    (line,) = findings(table)
    assert line == (
        "video -/-> question: hurts sight by 80% (layers 0-1, 5); "
        "helps sound by 30% (layer 2); spares align; unclear for order, other"
    )
    assert effects(table)["peak"].null_count() == 3


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
