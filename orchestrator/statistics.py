"""From cells to curves: means, bootstrap bands, tests, flips and peaks. Pure: frames in and out.

Curves use the samples that the model answers correctly without knockout (the paper, section 3.2),
or on request the others. Questions about one video are not independent, so whole videos are
resampled and tested: the band is the percentile bootstrap of the mean with videos drawn, the test
Student's t of the videos' means against zero (every change is a pair, the same sample with and
without the knockout), its p values corrected over a curve's centre layers after Benjamini and
Hochberg (they hold for neighbours that move together).

A resample's mean is a ratio of weighted sums, so the curves of a sample set share one matrix of
weights; all curves of a task are resampled alike, and their differences keep their pairing.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

CURVE: Final = ("model", "dataset", "task", "variant", "window", "pathway")
"""What names one curve of a figure."""
POINT: Final = (*CURVE, "center_layer")

VERSION: Final = 3
"""Counted up when the same cells would give other numbers, so that published ones are replaced."""

RESAMPLES: Final = 2_000
CONFIDENCE: Final = 0.95
_SEED: Final = 20_260_610  # any fixed number: the same cells must give the same band
_TINY: Final = 2.0**-24  # p is a float32 softmax: nearer to 0 or 1, odds are rounding alone

Floats = NDArray[np.float64]

_ROUNDING: Final = 1e-12


def curve_table(cells: pl.DataFrame, *, correct: bool = True) -> pl.DataFrame:
    """A row a point of a curve, sorted by POINT; of samples with a right baseline or a wrong one.

    `n` samples about `videos` different media. `mean` of delta (a ratio: -0.5 halves the
    probability), its 95% band `low` to `high`, `p_value` and `q_value` (corrected) of its being
    zero: null where there is one video. `flip`: the share whose top-1 token changed. The same
    effect as a difference: of the probability (`dp`), of its natural log-odds (`log_odds`), of the
    share of right answers (`accuracy`). Cells without `media_group` are each of a video of its own.
    """
    if "media_group" not in cells.columns:
        cells = cells.with_columns(media_group=pl.col("sample_id"))
    chosen = cells.filter(pl.col("correct_base") == correct)
    change = _log_odds(pl.col("p_knockout")) - _log_odds(pl.col("p_base"))
    points = (
        chosen.sort("sample_id")  # sums in one order, whatever the parts' order was
        .group_by(POINT)
        .agg(
            n=pl.len().cast(pl.Int32),
            videos=pl.col("media_group").n_unique().cast(pl.Int32),
            mean=pl.col("delta").mean(),
            flip=(pl.col("knockout_token") != pl.col("base_token")).mean(),
            dp=(pl.col("p_knockout") - pl.col("p_base")).mean(),
            log_odds=change.mean(),
            accuracy=pl.col("correct_knockout").mean() - pl.col("correct_base").mean(),
        )
        .sort(POINT)
    )
    empty = (
        points.select(POINT)
        .clear()
        .with_columns(pl.lit(None, pl.Float64).alias(c) for c in _TESTED)
    )
    tested = [_tested(frame) for _, frame in chosen.group_by(CURVE[:-1], maintain_order=True)]
    table = points.join(pl.concat([empty, *tested]), on=POINT, how="left")
    corrected = [_corrected(frame) for frame in table.partition_by(CURVE, maintain_order=True)]
    none = table.clear().with_columns(q_value=pl.lit(None, pl.Float64))
    return pl.concat([none, *corrected]).select(
        *POINT, "n", "videos", "mean", "low", "high", "flip",
        "dp", "log_odds", "accuracy", "p_value", "q_value",
    )  # fmt: skip


_TESTED: Final = ("low", "high", "p_value")


def _log_odds(p: pl.Expr) -> pl.Expr:
    p = p.clip(_TINY, 1 - _TINY)
    return (p / (1 - p)).log()


def _tested(cells: pl.DataFrame) -> pl.DataFrame:
    """`low`, `high`, `p_value` for each point of one (model, dataset, task, variant, window)."""
    points = cells.select(POINT).unique().sort(POINT).with_row_index("point")
    found = np.full((3, points.height), np.nan)
    for held, deltas, videos in sample_sets(cells, points):
        if len(set(videos.tolist())) > 1:
            found[:2, held] = bootstrap_band(deltas, videos)
            found[2, held] = p_against_zero(deltas, videos)
    low, high, p_value = found
    return points.select(
        *POINT, low=pl.lit(low), high=pl.lit(high), p_value=pl.lit(p_value)
    ).fill_nan(None)


def sample_sets(
    cells: pl.DataFrame, points: pl.DataFrame
) -> Iterator[tuple[NDArray[np.bool_], Floats, NDArray[np.int64]]]:
    """(points [P] that the same samples have, their deltas [n, points], videos [n] by number).

    `points` has the columns POINT and `point`, counted from 0.
    """
    samples = cells.select("sample_id", "media_group").unique().sort("sample_id")
    samples = samples.with_row_index("row")
    names = samples["media_group"].unique(maintain_order=True).to_list()
    number = {name: at for at, name in enumerate(names)}
    of_video = np.array([number[name] for name in samples["media_group"]], dtype=np.int64)
    placed = cells.join(points, on=POINT).join(samples.drop("media_group"), on="sample_id")
    deltas = np.full((samples.height, points.height), np.nan)  # NaN: the sample lacks the point
    deltas[placed["row"], placed["point"]] = placed["delta"]
    present = ~np.isnan(deltas)
    for rows in np.unique(present, axis=1).T:
        alike = (present == rows[:, None]).all(axis=0)
        yield alike, deltas[np.ix_(rows, alike)], of_video[rows]


def _sums(values: Floats, videos: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(sums [videos, points], samples [videos]) of each video that is there."""
    _, inverse = np.unique(videos, return_inverse=True)
    totals = np.zeros((inverse.max() + 1, values.shape[1]))
    np.add.at(totals, inverse, values)
    return totals, np.bincount(inverse).astype(np.float64)


def _video_means(values: Floats, videos: NDArray[np.int64]) -> Floats:
    totals, sizes = _sums(values, videos)
    return np.asarray(totals / sizes[:, None])


def resampled_means(
    values: Floats, videos: NDArray[np.int64] | None = None, stream: int = 0
) -> Floats:
    """Means [resamples, points] of [n, points], whole videos drawn: by their number and `stream`,
    of which sets that are put together need each their own."""
    at = np.arange(len(values)) if videos is None else videos
    totals, sizes = _sums(values, at)
    k = len(sizes)
    drawn = np.random.default_rng((_SEED, stream)).multinomial(k, np.full(k, 1 / k), size=RESAMPLES)
    weights = drawn.astype(np.float64)
    return np.asarray(weights @ totals / (weights @ sizes)[:, None])


def bootstrap_band(
    values: Floats, videos: NDArray[np.int64] | None = None
) -> tuple[Floats, Floats]:
    """The 95% percentile band of the mean over rows: float64 [n, points] -> low, high [points].

    `videos` [n] says which rows belong together; None: none do. Deterministic.
    """
    return band_of(resampled_means(values, videos))


def band_of(means: Floats) -> tuple[Floats, Floats]:
    """Low and high of resampled means [resamples, points]."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return low, high


def p_against_zero(values: Floats, videos: NDArray[np.int64]) -> Floats:
    """Two-sided p [points] of Student's t over the videos' means; videos count alike."""
    means = _video_means(values, videos)
    same = np.ptp(means, axis=0) <= _ROUNDING  # no spread: t would be 0/0, or infinite
    p = np.where(np.abs(means[0]) <= _ROUNDING, 1.0, 0.0)
    if not same.all():
        p[~same] = stats.ttest_1samp(means[:, ~same], 0.0, axis=0).pvalue
    return p


def _corrected(curve: pl.DataFrame) -> pl.DataFrame:
    """With `q_value`: p of one curve's centre layers, corrected for their number."""
    p = curve["p_value"].to_numpy()
    known = ~np.isnan(p)
    q = np.full(len(p), np.nan)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return curve.with_columns(q_value=pl.lit(pl.Series(q))).with_columns(
        pl.col("q_value").fill_nan(None)
    )


def mean_of_tasks(cells: pl.DataFrame, *, correct: bool = True) -> pl.DataFrame:
    """The mean of the tasks' means, each task counting once, as a curve table with two `task`s:
    `mean of tasks` and `pooled`, where each sample counts once.

    The columns of `curve_table`, and `tasks`. The band draws videos within each task; the test is
    Welch's, of the sum of the tasks' means. Points that a task lacks are those of the others.
    """
    chosen = cells.filter(pl.col("correct_base") == correct)
    parts = curve_table(chosen, correct=correct)
    scope = [name for name in CURVE[:-1] if name != "task"]
    frames = [_tested_mean(frame) for _, frame in chosen.group_by(scope, maintain_order=True)]
    shared = [name for name in POINT if name != "task"]
    whole = parts.group_by(shared).agg(
        pl.col("n", "videos").sum(), pl.col(_EFFECTS).mean(), tasks=pl.len().cast(pl.Int32)
    )
    pooled = curve_table(chosen.with_columns(task=pl.lit("pooled")), correct=correct)
    pooled = pooled.with_columns(tasks=pl.lit(chosen["task"].n_unique(), pl.Int32))
    columns = [*parts.columns, "tasks"]
    if not frames:
        return pooled.select(columns)
    tested = whole.join(pl.concat(frames), on=shared).with_columns(task=pl.lit("mean of tasks"))
    curves = tested.sort(POINT).partition_by(CURVE, maintain_order=True)
    means = [_corrected(curve).select(columns) for curve in curves]
    return pl.concat([*means, pooled.select(columns)]).sort(POINT)


_EFFECTS: Final = ("mean", "flip", "dp", "log_odds", "accuracy")


def _tested_mean(cells: pl.DataFrame) -> pl.DataFrame:
    """`low`, `high`, `p_value` of the mean over tasks; of one (model, dataset, variant, window)."""
    if "media_group" not in cells.columns:
        cells = cells.with_columns(media_group=pl.col("sample_id"))
    merged = cells.with_columns(task=pl.lit("mean of tasks"), real=pl.col("task"))
    points = merged.select(POINT).unique().sort(POINT).with_row_index("point")
    means = np.zeros((RESAMPLES, points.height))
    tasks, total, error, spread = np.zeros((4, points.height))
    wide = np.ones(points.height, dtype=bool)  # whether each task has a band
    for stream, of_task in enumerate(merged.sort("real").partition_by("real", maintain_order=True)):
        for held, deltas, numbers in sample_sets(of_task, points):
            means[:, held] += resampled_means(deltas, numbers, stream)
            tasks[held] += 1
            of_videos = _video_means(deltas, numbers)
            total[held] += of_videos.mean(axis=0)
            if len(of_videos) == 1:
                wide[held] = False
                continue
            squared = of_videos.var(axis=0, ddof=1) / len(of_videos)
            error[held] += squared
            spread[held] += squared**2 / (len(of_videos) - 1)
    low, high = band_of(means / np.maximum(tasks, 1))
    p = np.where(np.abs(total) <= _ROUNDING, 1.0, 0.0)
    varied = error > _ROUNDING**2
    t = np.abs(total[varied]) / np.sqrt(error[varied])
    p[varied] = 2 * stats.t.sf(t, error[varied] ** 2 / spread[varied])
    low[~wide] = high[~wide] = p[~wide] = np.nan
    return points.select(
        *(name for name in POINT if name != "task"),
        low=pl.lit(low), high=pl.lit(high), p_value=pl.lit(p),
    ).fill_nan(None)  # fmt: skip


def peak_table(curves: pl.DataFrame) -> pl.DataFrame:
    """Where each curve is furthest from zero, sorted by CURVE; a tie goes to the earlier layer.

    Columns: CURVE, `center_layer`, `mean`, `low`, `high`, `n`.
    """
    return (
        curves.sort(*CURVE, -pl.col("mean").abs(), "center_layer")
        .group_by(CURVE, maintain_order=True)
        .first()
        .select(*POINT, "mean", "low", "high", "n")
    )
