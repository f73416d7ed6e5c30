"""Tables of a run's interventions and probes: accuracies, attention by group, sinks, maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.results import query, read

_TASK = ("model", "dataset", "task")
_INTERVENTION = ("kind", "intervention", "layers")


def intervention_table(
    rows: pl.DataFrame, by: Sequence[str] = (*_TASK, "direction")
) -> pl.DataFrame:
    """Tables 1 and 4, from rows of the `interventions` table: a row an intervention.

    `n` samples, `accuracy` under it and `accuracy_base` of the same samples left alone. Of discards
    (null for masks) the mean `prefill_s` and `token_layers`, and `prefill_full_s`, the same
    samples' full prefill where the sweep timed it too. `by` are columns of the table:
    `("model", "dataset")` pools the tasks, each sample counting once.
    """
    sample = ["model", "dataset", "sample_id"]
    whole = rows.filter(pl.col("layers").list.len() == 0).group_by(sample)
    return (
        rows.join(whole.agg(prefill_full_s=pl.col("prefill_s").mean()), on=sample, how="left")
        .with_columns(pl.when(pl.col("kind") == "discard").then("prefill_full_s"))
        .group_by(*by, *_INTERVENTION)
        .agg(
            n=pl.len(),
            accuracy=pl.col("correct").mean(),
            accuracy_base=pl.col("correct_base").mean(),
            prefill_s=pl.col("prefill_s").mean(),
            prefill_full_s=pl.col("prefill_full_s").mean(),
            token_layers=pl.col("token_layers").mean(),
        )
        .sort(*by, *_INTERVENTION)
    )


def last_attention_table(run: str | Path) -> pl.DataFrame:
    """Fig. 1, left: the last token's mean attention to each group, by layer, over `n` samples.

    Groups overlap (`question` holds the options); system, video, audio, question, last and what
    comes before the media add up to 1.
    """
    return query(
        run,
        """SELECT model, dataset, task, layer, "group", AVG(value) AS attention, COUNT(*) AS n
           FROM probes WHERE probe = 'last_attention'
           GROUP BY model, dataset, task, layer, "group" """,
    ).sort(*_TASK, "layer", "group")


def sink_table(run: str | Path) -> pl.DataFrame:
    """Fig. 2, right: for each layer and group, in which hidden `dimension` its sinks are large.

    `sinks` have it among their top dimensions, of mean `magnitude`, in `n` samples' passes.
    """
    rows = query(run, "SELECT * FROM probes WHERE probe = 'sinks'")
    seen = rows.filter(pl.col("position").is_null()).group_by(*_TASK, "layer").agg(n=pl.len())
    return (
        rows.drop_nulls("position")
        .group_by(*_TASK, "layer", "group", "dimension")
        .agg(sinks=pl.len(), magnitude=pl.col("value").mean())
        .join(seen, on=[*_TASK, "layer"])
        .sort([*_TASK, "layer", "group", "magnitude"], descending=[False] * 5 + [True])
    )


def probe_means(run: str | Path) -> pl.DataFrame:
    """Norms (mean over a group's positions) and numbers of sinks (`group` null), the mean `value`
    over `n` samples that were looked at: a row a (model, data set, task, probe, layer, group)."""
    return query(
        run,
        """SELECT model, dataset, task, probe, layer, "group", AVG(value) AS value,
                  COUNT(DISTINCT sample_id) AS n
           FROM probes WHERE probe = 'norms' OR (probe = 'sinks' AND position IS NULL)
           GROUP BY model, dataset, task, probe, layer, "group" """,
    ).sort(*_TASK, "probe", "layer", "group")


def portraits(run: str | Path) -> pl.DataFrame:
    """Maps, norms and sinks of the first sample by name that has all there are, a model and data
    set: what figures show."""
    rows = query(run, "SELECT * FROM probes WHERE probe <> 'last_attention'")
    scope = ["model", "dataset"]
    held = rows.group_by(*scope, "sample_id").agg(kinds=pl.col("probe").n_unique())
    chosen = held.sort("kinds", "sample_id", descending=[True, False]).unique(
        scope, keep="first", maintain_order=True
    )
    order = [*scope, "probe", "layer", "position", "key", "dimension"]
    return rows.join(chosen, on=[*scope, "sample_id"], how="semi").sort(order)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """Mean attention in bins of `width` positions, queries down and keys across.

    `values` is float64 [B, B], 0 above the diagonal; `edges` int64 [B + 1]: the positions at which
    bins begin, and the prompt's length.
    """

    values: NDArray[np.float64]
    edges: NDArray[np.int64]


def attention_map(run: str | Path, model: str, sample_id: str, layer: int) -> AttentionMap:
    """Fig. 1, middle and right. Raises ConfigError where the run holds no such map."""
    at = (pl.col("model") == model) & (pl.col("sample_id") == sample_id)
    rows = read(run, "probes").filter(at, probe="attention_map", layer=layer)
    samples = read(run, "samples").filter(at)
    if rows.is_empty() or samples.is_empty():
        held = read(run, "probes").filter(probe="attention_map")
        known = held.select("model", "sample_id", "layer").unique().sort("model", "sample_id")
        raise ConfigError(
            f"{run} holds no attention map of {model}, sample {sample_id}, layer {layer}; it holds "
            f"{known.rows() or 'none'}"
        )
    width, n_tokens = int(rows["width"][0]), int(samples["n_tokens"][0])
    bins = -(-n_tokens // width)
    values = np.zeros((bins, bins))
    values[rows["position"].to_numpy() // width, rows["key"].to_numpy() // width] = rows["value"]
    edges = np.append(np.arange(bins) * width, n_tokens).astype(np.int64)
    return AttentionMap(values=values, edges=edges)
