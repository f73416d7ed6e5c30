"""Figures of probes, after the paper's 1, 2 and 7: attention by group, maps, norms, sinks.

Attention by group is a mean over samples; maps, norms and sinks are of one sample, the first by
name that the sweep looked at, which the title names.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl

from avflow.orchestrator.paths import slug
from avflow.orchestrator.results import TaskStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS: Final = "os^DvPX"
_WARNING: Final = "#B00020"
_STYLES: Final = ("-", "--", ":")
_APART: Final = ("system", "video", "audio", "candidates", "reference", "question",
                 "correct_option", "incorrect_options", "last")  # fmt: skip
"""Groups that share no position; what is in none of them is drawn as `other`, so that shares add
up to 1. Parts of these (`true_option`) and `template`, which overlaps `question`, are not drawn."""
_PANEL_INCHES: Final = (3.2, 2.6)


def probe_figures(
    last_attention: pl.DataFrame, portraits: pl.DataFrame, tasks: Sequence[TaskStatus]
) -> dict[str, Figure]:
    """Figures by file stem; model and data set are added to it where there is more than one.

    `last_attention` as of `last_attention_table`; `portraits` are rows of the `probes` table of
    one sample a (model, data set, probe).
    """
    makers = {
        "attention_map": ("fig1-maps", "attention map", _maps),
        "norms": ("fig7-norms", "norm of the hidden state", _norms),
        "sinks": ("fig2-sinks", "sinks by hidden dimension", _sinks),
    }
    figures: dict[str, Figure] = {}
    layouts = {task.task: task.layout for task in tasks}
    for suffix, title, table in _views(last_attention):
        whole = f"attention of the last token, {title}"
        figures[f"fig1-last_attention{suffix}"] = _attention(_apart(table), whole, layouts)
    for suffix, title, table in _views(portraits):
        circled = _sink_positions(table)
        for probe, (stem, what, make) in makers.items():
            rows = table.filter(probe=probe)
            if rows["position"].drop_nulls().is_empty():
                continue
            sample = rows["sample_id"][0]
            whole = f"{what}, {title}: {sample}"
            figures[f"{stem}{suffix}"] = make(rows, whole, circled.get(sample, {}))
    return figures


def portrait_figure(probe: str, rows: pl.DataFrame, title: str, note: str = "") -> Figure:
    """One probe of one sample, which the title names; `rows` hold its sinks, too, to be marked.

    `note` is written on its face; without rows there is nothing else.
    """
    makers = {"attention_map": _maps, "norms": _norms, "sinks": _sinks}
    held = rows.filter(probe=probe)
    if held["position"].drop_nulls().is_empty():
        return _noted(_panels(1, title)[0], note or "the sample has none: no sink at these layers")
    sample = held["sample_id"][0]
    circled = _sink_positions(rows).get(sample, {})
    return _noted(makers[probe](held, f"{title}: sample {sample}", circled), note)


def shares_figure(table: pl.DataFrame, title: str, note: str = "") -> Figure:
    """The last token's attention by group, from `attention_shares`."""
    if table.is_empty():
        return _noted(_panels(1, title)[0], note)
    most = max(table["n"].to_list())
    named = table.with_columns(task=pl.lit(""), attention="share")
    return _noted(_attention(named, f"{title} (mean of {most} samples)", {}), note)


def _apart(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of groups that don't overlap, and of `other`, the rest."""
    kept = table.filter(pl.col("group").is_in(_APART))
    by = ["model", "dataset", "task", "layer"]
    rest = kept.group_by(by).agg(
        group=pl.lit("other"),
        attention=(1 - pl.col("attention").sum()).clip(0),
        n=pl.col("n").max(),
    )
    return pl.concat([kept, rest.select(kept.columns)])


def attention_shares(table: pl.DataFrame) -> pl.DataFrame:
    """A row a layer and group, of `last_attention_table` of one model: the mean over all samples,
    with the question and what follows it as `user text`, as the paper has it.

    Columns: `layer`, `group`, `share`, `n` samples.
    """
    whole = _apart(table).with_columns(
        group=pl.col("group").replace({"question": "user text", "last": "user text"})
    )
    of_task = whole.group_by("dataset", "task", "layer", "group").agg(
        pl.col("attention").sum(), pl.col("n").max()
    )
    return (
        of_task.group_by("layer", "group")
        .agg(
            share=(pl.col("attention") * pl.col("n")).sum() / pl.col("n").sum(), n=pl.col("n").sum()
        )
        .sort("group", "layer")
    )


def _noted(figure: Figure, note: str) -> Figure:
    if note:
        figure.supxlabel(note, fontsize=8, color=_WARNING)
    if not any(axes.has_data() for axes in figure.get_axes()):
        for axes in figure.get_axes():
            axes.set_axis_off()
    return figure


def _views(rows: pl.DataFrame) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """(suffix of the stem, title, rows) of each model and data set."""
    views = rows.select("model", "dataset").unique().sort(pl.all())
    for view in views.iter_rows(named=True):
        several = views.height > 1
        suffix = "".join(f"-{slug(name)}" for name in view.values()) if several else ""
        yield suffix, "{model} on {dataset}".format(**view), rows.filter(**view)


def _sink_positions(rows: pl.DataFrame) -> dict[str, dict[int, list[int]]]:
    """Sample -> layer -> the sinks' positions."""
    found: dict[str, dict[int, list[int]]] = {}
    sinks = rows.filter(pl.col("position").is_not_null(), probe="sinks")
    for sample, layer, position in sinks.select("sample_id", "layer", "position").unique().rows():
        found.setdefault(sample, {}).setdefault(layer, []).append(position)
    return found


def _attention(table: pl.DataFrame, title: str, layouts: Mapping[str, str]) -> Figure:
    """A panel a kind of prompt."""
    kind = pl.col("task").replace_strict(layouts, default="")
    whole = table.with_columns(layout=kind)
    kinds = sorted(set(whole["layout"]), reverse=True)
    figure, panels = _panels(len(kinds), title, (5.2, 3.0))
    for axes, layout in zip(panels, kinds, strict=True):
        lines = (
            whole.filter(layout=layout)
            .group_by("group", "layer")
            .agg(share=(pl.col("attention") * pl.col("n")).sum() / pl.col("n").sum())
            .sort("group", "layer")
        )
        for number, group in enumerate(dict.fromkeys(lines["group"])):
            line = lines.filter(group=group)
            x, y = line["layer"].to_numpy(), line["share"].to_numpy()
            axes.plot(
                x, y, color=_colour(number), ls=_STYLES[number % len(_STYLES)],
                marker=_MARKERS[number % len(_MARKERS)], ms=3, lw=1.2, label=group,
            )  # fmt: skip
        axes.set_title(layout.replace("_", " "), fontsize=9)
        axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1))
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _maps(rows: pl.DataFrame, title: str, circled: dict[int, list[int]]) -> Figure:
    from matplotlib.colors import LogNorm

    layers = sorted(set(rows["layer"]))
    figure, panels = _panels(len(layers), title)
    for axes, layer in zip(panels, layers, strict=True):
        of_layer = rows.filter(layer=layer)
        width = int(of_layer["width"][0])
        bins = int(of_layer["position"].to_numpy().max()) // width + 1
        values = np.full((bins, bins), np.nan)
        at = of_layer["position"].to_numpy() // width, of_layer["key"].to_numpy() // width
        values[at] = of_layer["value"].to_numpy()
        span = (0, bins * width)
        image = axes.imshow(
            values, norm=LogNorm(vmin=1e-5, vmax=1), extent=(*span, *span[::-1]), cmap="viridis"
        )
        for position in circled.get(layer, []):
            axes.annotate(
                "", (position, span[1]), (0, -12), textcoords="offset points",
                arrowprops={"color": _COLOURS[1], "arrowstyle": "->"}, annotation_clip=False,
            )  # fmt: skip
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set(xlabel="key", ylabel="query")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _norms(rows: pl.DataFrame, title: str, circled: dict[int, list[int]]) -> Figure:
    layers = sorted(set(rows["layer"]))
    groups = list(dict.fromkeys(rows.sort("layer", "position")["group"]))
    figure, panels = _panels(len(layers), title)
    for axes, layer in zip(panels, layers, strict=True):
        for number, group in enumerate(groups):
            dots = rows.filter(layer=layer, group=group)
            x, y = dots["position"].to_numpy(), dots["value"].to_numpy()
            marker = _MARKERS[number % len(_MARKERS)]
            axes.scatter(x, y, s=6, color=_colour(number), marker=marker, label=group)
        sinks = rows.filter(pl.col("position").is_in(circled.get(layer, [])), layer=layer)
        axes.scatter(
            sinks["position"].to_numpy(), sinks["value"].to_numpy(), s=60, facecolors="none",
            edgecolors="#B00020",
        )  # fmt: skip
        axes.set_title(f"entering layer {layer}", fontsize=9)
        axes.set(xlabel="position", yscale="log")
    panels[0].legend(fontsize=6, frameon=False)
    return figure


def _sinks(rows: pl.DataFrame, title: str, _circled: dict[int, list[int]]) -> Figure:
    """Of each layer and group the sink with the largest activation."""
    held = rows.drop_nulls("position")
    layers = sorted(set(held["layer"]))
    figure, panels = _panels(len(layers), title)
    for axes, layer in zip(panels, layers, strict=True):
        of_layer = held.filter(layer=layer).sort("value", descending=True)
        for number, group in enumerate(dict.fromkeys(of_layer["group"])):
            position = of_layer.filter(group=group)["position"][0]
            bars = of_layer.filter(group=group, position=position)
            x, y = bars["dimension"].to_numpy(), bars["value"].to_numpy()
            axes.vlines(x, 0, y, color=_colour(number), alpha=0.6)
            axes.plot(x, y, _MARKERS[number % len(_MARKERS)], ms=3, color=_colour(number),
                      label=f"{group}, position {position}")  # fmt: skip
        axes.set_title(f"entering layer {layer}", fontsize=9)
        axes.set(xlabel="hidden dimension", ylabel="magnitude", ylim=(0, None))
        axes.legend(fontsize=6, frameon=False)
    return figure


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _panels(
    number: int, title: str, inches: tuple[float, float] = _PANEL_INCHES
) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    columns = min(4, number)
    lines = -(-number // columns)
    figure = Figure(figsize=(inches[0] * columns, inches[1] * lines + 0.4))
    figure.set_layout_engine("constrained")
    most = max(30, int(13 * inches[0] * columns))
    figure.suptitle(textwrap.fill(title, most), fontsize=10)
    panels: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels:
        axes.tick_params(labelsize=7)
    for unused in panels[number:]:
        unused.set_axis_off()
    return figure, panels[:number]
