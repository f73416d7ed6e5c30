"""Accuracies under masks and discards, and how sure their change is. Pure: frames in and out.

Each answer is compared with the same sample's without the change (or under a named intervention),
so bands are of paired differences; whole videos are drawn, as for curves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from avflow.orchestrator.statistics import CONFIDENCE, bootstrap_band

_SAMPLE = ("model", "dataset", "sample_id")


def accuracies(rows: pl.DataFrame, by: Sequence[str], against: str | None = None) -> pl.DataFrame:
    """From rows of `interventions`, a row a group, sorted by `by`.

    `n` samples about `videos` different media, `right` of them, `right_base` without the change or
    under the intervention `against`; `accuracy`, `accuracy_base`; of the samples that have both,
    the mean difference `change` and its 95% band `low` to `high` (null of one video), `lost` and
    `gained` answers; of discards the mean `prefill_s` and `token_layers`. Rows without
    `media_group` are each of a video of its own.
    """
    if "media_group" not in rows.columns:
        rows = rows.with_columns(media_group=pl.col("sample_id"))
    compared = rows.with_columns(compared="correct_base")
    if against is not None:
        base = rows.filter(intervention=against).select(*_SAMPLE, compared="correct")
        compared = rows.join(base.unique(_SAMPLE), on=_SAMPLE, how="left")
    moved = compared.with_columns(
        moved=pl.col("correct").cast(pl.Int8) - pl.col("compared").cast(pl.Int8)
    ).sort("sample_id")
    table = moved.group_by(by).agg(
        n=pl.len(),
        videos=pl.col("media_group").n_unique(),
        right=pl.col("correct").sum(),
        right_base=pl.col("compared").sum(),
        accuracy=pl.col("correct").mean(),
        accuracy_base=pl.col("compared").mean(),
        change=pl.col("moved").mean(),
        lost=(pl.col("moved") < 0).sum(),
        gained=(pl.col("moved") > 0).sum(),
        prefill_s=pl.col("prefill_s").mean(),
        token_layers=pl.col("token_layers").mean(),
    )
    bands = [dict(zip(by, key, strict=True)) | _band(frame) for key, frame in moved.group_by(by)]
    schema = {name: rows.schema[name] for name in by} | {"low": pl.Float64, "high": pl.Float64}
    return table.join(pl.DataFrame(bands, schema=schema), on=by, nulls_equal=True).sort(by)


def _band(rows: pl.DataFrame) -> dict[str, float | None]:
    rows = rows.drop_nulls("moved")
    videos = rows["media_group"].rank("dense").to_numpy().astype(np.int64)
    if len(set(videos.tolist())) < 2:
        return {"low": None, "high": None}
    low, high = bootstrap_band(rows["moved"].to_numpy().astype(np.float64)[:, None], videos)
    return {"low": float(low[0]), "high": float(high[0])}


def change_words(row: Mapping[str, Any]) -> str:
    """How far an accuracy of `accuracies` is from the other, and how sure.

    `-12.5 points, 95% band -20.0 to -5.0; 3 answers lost, none gained`. Where no answer changed
    there is no spread to draw from: then, how often answers could change and none be seen to (95%).
    """
    if row["change"] is None:
        return "nothing to compare with is stored"
    if not row["lost"] and not row["gained"]:
        unseen = 1 - (1 - CONFIDENCE) ** (1 / row["videos"])
        return f"no answer is lost or gained; a rate of up to {unseen:.1%} could go unseen"
    counts = f"{_count(row['lost'])} lost, {_count(row['gained'])} gained"
    points = f"{100 * row['change']:+.1f} points"
    if row["low"] is None:
        return f"{points}; {counts}; one video: no band"
    return f"{points}, 95% band {100 * row['low']:+.1f} to {100 * row['high']:+.1f}; {counts}"


def _count(number: int) -> str:
    return str(number) if number else "none"


def intervention_words(rows: pl.DataFrame) -> list[str]:
    """A line an intervention of each model and data set, its tasks pooled.

    `mask video_for_last (layers 31-35): 42.2% of 3212 right, 42.2% without (+0.1 points, ...)`
    """
    scope = ["model", "dataset"]
    table = accuracies(rows, [*scope, "kind", "intervention", "layers"])
    full = rows.filter(pl.col("layers").list.len() == 0, kind="discard")
    timed = full.select(*_SAMPLE, prefill_full_s="prefill_s").unique(_SAMPLE)
    against = (
        rows.join(timed, on=_SAMPLE)
        .group_by(*scope, "kind", "intervention", "layers")
        .agg(pl.col("prefill_full_s").mean())
    )
    keys = [*scope, "kind", "intervention", "layers"]
    table = table.join(against, on=keys, how="left", maintain_order="left")
    several = table.select(scope).n_unique() > 1
    return [_line(row, several) for row in table.iter_rows(named=True)]


def _line(row: Mapping[str, Any], several: bool) -> str:
    scope = f"{row['model']}, {row['dataset']}: " if several else ""
    place = "after layer" if row["kind"] == "discard" else "layers"
    layers = f" ({place} {', '.join(map(str, row['layers']))})" if row["layers"] else ""
    text = (
        f"{scope}{row['kind']} {row['intervention']}{layers}: {row['accuracy']:.1%} of "
        f"{row['n']} right, {row['accuracy_base']:.1%} without ({change_words(row)})"
    )
    if row["prefill_s"] is not None:
        text += f"; prefill {row['prefill_s'] * 1000:.4g} ms"
    if row["kind"] == "discard" and row["prefill_full_s"] is not None and row["layers"]:
        text += f", {row['prefill_full_s'] * 1000:.4g} ms in full"
    return text
