"""From cells to curves: means, bootstrap bands, flip shares and peaks. Pure: frames in, frames out.

Curves use the samples that the model answers correctly without knockout (the paper, section 3.2).
The band is the percentile bootstrap of the mean over samples. A resample's mean is a weighted mean,
so the curves of a sample set share one matrix of weights and their bootstrap is a matrix product;
all curves of a task are thereby resampled alike, and their differences keep their pairing.
"""

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

CURVE: Final = ("model", "dataset", "task", "variant", "window", "pathway")
"""What names one curve of a figure."""
POINT: Final = (*CURVE, "center_layer")

VERSION: Final = 1
"""Counted up when the same cells would give other numbers, so that published ones are replaced."""

RESAMPLES: Final = 2_000
CONFIDENCE: Final = 0.95
_SEED: Final = 20_260_610  # any fixed number: the same cells must give the same band


def curve_table(cells: pl.DataFrame) -> pl.DataFrame:
    """A row a point of a curve, sorted by POINT.

    Columns: POINT; `n` samples; `mean` of delta (a ratio: -0.5 halves the probability); `low` and
    `high` of the mean's 95% band, null where n is 1; `flip`, the share of samples whose top-1 token
    changed. Samples with a wrong baseline do not count; without a right one the table is empty.
    """
    right = cells.filter(pl.col("correct_base"))
    points = (
        right.group_by(POINT)
        .agg(
            n=pl.len().cast(pl.Int32),
            mean=pl.col("delta").sort_by("sample_id").mean(),
            flip=(pl.col("knockout_token") != pl.col("base_token")).mean(),
        )
        .sort(POINT)
    )
    bands = [_bands(frame) for _, frame in right.group_by(CURVE[:-1], maintain_order=True)]
    empty = (
        points.select(POINT)
        .clear()
        .with_columns(low=pl.lit(None, pl.Float64), high=pl.lit(None, pl.Float64))
    )
    return points.join(pl.concat([empty, *bands]), on=POINT, how="left").select(
        *POINT, "n", "mean", "low", "high", "flip"
    )


def _bands(cells: pl.DataFrame) -> pl.DataFrame:
    """`low` and `high` for each point of one (model, dataset, task, variant, window)."""
    points = cells.select(POINT).unique().sort(POINT).with_row_index("point")
    samples = cells.select("sample_id").unique().sort("sample_id").with_row_index("row")
    placed = cells.join(points, on=POINT).join(samples, on="sample_id")
    deltas = np.full((samples.height, points.height), np.nan)  # NaN: the sample lacks the point
    deltas[placed["row"], placed["point"]] = placed["delta"]
    present = ~np.isnan(deltas)
    low, high = np.full((2, points.height), np.nan)
    for rows in np.unique(present, axis=1).T:
        alike = (present == rows[:, None]).all(axis=0)
        if rows.sum() > 1:
            low[alike], high[alike] = bootstrap_band(deltas[np.ix_(rows, alike)])
    return points.select(*POINT, low=pl.lit(low), high=pl.lit(high)).fill_nan(None)


def bootstrap_band(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 95% percentile band of the mean over rows: float64 [n, points] -> low, high [points].

    Deterministic: the resamples depend on n alone.
    """
    n = len(values)
    drawn = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    means = drawn.astype(np.float64) @ values / n  # [resamples, points]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return low, high


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
