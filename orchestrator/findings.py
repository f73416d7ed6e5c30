"""What a sweep found, in words: which pathway hurts which task, by how much, at which layers.

A pathway hurts (or helps) a task at a layer where the mean change is over 5%, its 95% band excludes
zero, and so does the test, at 5% after correction over the curve's centre layers; it spares a task
whose bands stay within 5% at every layer; all else is unclear. The number given is the largest
change of the mean at such a layer; layers are window centres. Nothing is corrected for the many
curves.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import polars as pl

from avflow.orchestrator.statistics import CURVE
from avflow.pathways import catalogue
from avflow.pathways.pathway import Pathway

THRESHOLD: Final = 0.05
LEVEL: Final = 0.05

_SCOPE = ("model", "dataset", "variant", "window")


def findings(curves: pl.DataFrame, own: Sequence[Pathway] = ()) -> list[str]:
    """A line a pathway, in the catalogue's order, from `statistics.curve_table`.

    `video -/-> question: hurts sight by 76% (layers 0-2); spares sound`. Where the sweep has more
    than one model, data set, variant or window, a heading stands before the lines of each. Curves
    of one sample have no band, and nothing is said of them.
    """
    order = {p.name: i for i, p in enumerate((*catalogue.ALL, *own))}
    labels = {p.name: p.label for p in (*catalogue.ALL, *own)}
    curves = curves.filter(pl.col("n") > 1)
    scopes = curves.select(_SCOPE).unique().sort(_SCOPE)
    lines = []
    for scope in scopes.iter_rows(named=True):
        if scopes.height > 1:
            lines.append("{model}, {dataset}, window {window} ({variant}):".format(**scope))
        by_pathway = curves.filter(**scope).partition_by("pathway", as_dict=True)
        for (name,) in sorted(by_pathway, key=lambda key: order.get(key[0], len(order))):
            lines.append(f"{labels.get(name, name)}: {_sentence(by_pathway[(name,)])}")
    return lines


def has_effect() -> pl.Expr:
    """Of a point: whether its mean is large enough, and surely of its sign."""
    sure = (pl.col("low") * pl.col("high") > 0) & (pl.col("q_value") < LEVEL)
    return (pl.col("mean").abs() > THRESHOLD) & sure.fill_null(False)


def effects(curves: pl.DataFrame) -> pl.DataFrame:
    """A row a curve, sorted by CURVE: `peak`, the mean change furthest from zero among the layers
    that have an effect (null where none has), `layers`, those of the peak's sign, and `reach`, how
    far from zero the band gets at any layer."""
    effect = has_effect()
    peak = pl.col("mean").filter(effect).sort_by(pl.col("mean").filter(effect).abs()).last()
    at = pl.col("center_layer").filter(effect & (pl.col("mean").sign() == peak.sign()))
    return (
        curves.sort(*CURVE, "center_layer").group_by(CURVE, maintain_order=True)
        .agg(peak=peak, layers=at, reach=_reach())
    )  # fmt: skip


def _reach() -> pl.Expr:
    return pl.max_horizontal(pl.col("low").abs(), pl.col("high").abs()).max()


def verdicts(curves: pl.DataFrame) -> pl.DataFrame:
    """What may be said of each curve, sorted by CURVE.

    `verdict`: `falls` or `rises`, a row each where a curve has an effect of that sign; else one of
    `little` (no mean change over the threshold), `unclear` (a larger one, but not a sure one) and
    `single` (one sample or video: there is no band). `center_layer`, `n`, `videos`, `mean`, `low`,
    `high`, `q_value`: of the mean change furthest from zero, among the layers that have the effect
    where there is one. `layers`: those, spelled `3-9, 12`. `reach`: how far from zero the band gets
    at any layer.
    """
    point = ("center_layer", "n", "videos", "mean", "low", "high", "q_value")
    effect = curves.filter(has_effect()).with_columns(sign=pl.col("mean").sign())
    sure = (
        effect.sort(*CURVE, "sign", -pl.col("mean").abs(), "center_layer")
        .group_by(*CURVE, "sign", maintain_order=True)
        .agg(pl.col(point).first(), held=pl.col("center_layer").sort())
        .with_columns(verdict=pl.when(pl.col("sign") < 0).then(pl.lit("falls")).otherwise(
            pl.lit("rises")
        ))
    )  # fmt: skip
    small = pl.col("mean").abs() <= THRESHOLD
    other = (
        curves.join(effect, on=CURVE, how="anti")
        .sort(*CURVE, -pl.col("mean").abs(), "center_layer")
        .group_by(CURVE, maintain_order=True)
        .agg(pl.col(point).first())
        .with_columns(
            held=pl.lit([], pl.List(curves.schema["center_layer"])),
            verdict=pl.when(pl.col("low").is_null()).then(pl.lit("single"))
            .when(small).then(pl.lit("little")).otherwise(pl.lit("unclear")),
        )
    )  # fmt: skip
    rows = pl.concat([sure.drop("sign").select(other.columns), other])
    rows = rows.join(curves.group_by(CURVE).agg(reach=_reach()), on=CURVE)
    spelled = [", ".join(intervals(layers)) for layers in rows["held"].to_list()]
    named = rows.with_columns(layers=pl.Series(spelled, dtype=pl.String)).drop("held")
    return named.sort(*CURVE, "verdict")


def evidence(curves: pl.DataFrame) -> pl.DataFrame:
    """A row a curve: where it is furthest from zero, how sure that is, and in what units.

    Columns: CURVE; `center_layer`, `n`, `videos`, `mean`, `low`, `high`, `q_value`, `dp`,
    `log_odds`, `accuracy`, `flip` of that point; `layers`, the centres that have an effect of its
    sign, spelled `3-9, 12`; "" for none.
    """
    held = effects(curves).select(*CURVE, "layers")
    peaks = (
        curves.sort(*CURVE, -pl.col("mean").abs(), "center_layer")
        .group_by(CURVE, maintain_order=True)
        .first()
        .join(held, on=CURVE, how="left")
    )
    spelled = [", ".join(intervals(layers)) for layers in peaks["layers"].to_list()]
    return peaks.with_columns(layers=pl.Series(spelled, dtype=pl.String)).drop("p_value")


def _sentence(curves: pl.DataFrame) -> str:
    """About one pathway; `curves` holds its tasks."""
    rows = sorted(effects(curves).iter_rows(named=True), key=lambda row: row["peak"] or 0)
    parts = []
    for verb, sign in (("hurts", -1), ("helps", 1)):
        tasks = [_effect(row) for row in rows if (row["peak"] or 0) * sign > 0]
        if tasks:
            parts.append(f"{verb} {', '.join(tasks)}")
    none = [row for row in rows if row["peak"] is None]
    close = [row["reach"] is not None and row["reach"] <= THRESHOLD for row in none]
    spared = [row["task"] for row, is_close in zip(none, close, strict=True) if is_close]
    unclear = [row["task"] for row, is_close in zip(none, close, strict=True) if not is_close]
    if spared:
        parts.append(f"spares {'all' if len(spared) == len(rows) > 1 else ', '.join(spared)}")
    if unclear:
        parts.append(f"unclear for {', '.join(unclear)}")
    return "; ".join(parts)


def _effect(row: dict[str, Any]) -> str:
    layers = ", ".join(intervals(row["layers"]))
    return f"{row['task']} by {abs(row['peak']):.0%} (layer{'s' * (not layers.isdigit())} {layers})"


def intervals(layers: Sequence[int] | None) -> Iterator[str]:
    """[0, 1, 2, 5] -> "0-2", "5"."""
    if not layers:
        return
    start = previous = layers[0]
    for layer in [*layers[1:], None]:
        if layer is not None and layer == previous + 1:
            previous = layer
            continue
        yield str(start) if start == previous else f"{start}-{previous}"
        if layer is not None:
            start = previous = layer
