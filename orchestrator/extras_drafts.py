"""MLflow runs of interventions and probes: one a task, as of curves.

`kind = accuracy`: answers under masks and discards, `of` a task, a category of tasks or a whole
data set (the paper's Table 1). `kind = probe`: attention of the last token, norms and sinks by
layer, of a task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import polars as pl

from avflow.orchestrator.accuracy import accuracies
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import names_task
from avflow.orchestrator.drafts import STRIDE, Draft, line, run_name
from avflow.orchestrator.effective import FOUND, RANDOM
from avflow.orchestrator.findings import intervals
from avflow.orchestrator.outcome import Outcome, is_complete
from avflow.orchestrator.results import TaskStatus

Metric = tuple[str, float, int]  # name, value, step

_ACCURACY: Final = (
    ("accuracy", "accuracy", 1.0),
    ("change", "change", 1.0),
    ("change_low", "low", 1.0),
    ("change_high", "high", 1.0),
    ("n", "n", 1.0),
    ("prefill_ms", "prefill_s", 1000.0),
    ("token_layers", "token_layers", 1.0),
)  # name's prefix, column of `accuracies`, unit


def extra_drafts(outcome: Outcome, config: SweepConfig) -> Iterator[Draft]:
    """Of tasks, categories and data sets whose samples have all ended."""
    places: dict[tuple[str, str, str, str], list[TaskStatus]] = {}
    for task in outcome.tasks:
        for of, name in (("task", task.task), ("category", task.category), ("data set", "")):
            places.setdefault((task.model, task.dataset, of, name), []).append(task)
    for (model, dataset, of, name), held in places.items():
        if not all(map(is_complete, held)):
            continue
        here = {"model": model, "dataset": dataset, "of": of} | ({of: name} if name else {})
        rows = outcome.interventions.filter(
            pl.col("task").is_in([task.task for task in held]), model=model, dataset=dataset
        )
        if not rows.is_empty():
            yield _accuracy_draft(outcome, config, here, rows)
        if of == "task":
            yield from _probe_drafts(outcome, config, held[0])


def _accuracy_draft(
    outcome: Outcome, config: SweepConfig, here: Mapping[str, str], rows: pl.DataFrame
) -> Draft:
    named = _named(rows)
    table = pl.concat([_table(named), _directions(named)])
    place = here.get("task") or here.get("category") or ""
    whose = [here["model"]] * (len(config.models) > 1)
    whose += [here["dataset"]] * (len(config.datasets) > 1 or not place)
    shown = f"{place} (category)" if here["of"] == "category" else place
    tags = {"kind": "accuracy", **{key: value for key, value in here.items() if key != "data set"}}
    if here["of"] == "task":
        tags["category"] = next(t.category for t in outcome.tasks if t.task == place)
    return Draft(
        key="{model}/{dataset}/{of} {place}/accuracy".format(place=place, **here),
        name=run_name(config, [*filter(None, [*whose, shown]), "accuracy"]),
        tags=tags,
        line=_line(outcome, config, here),
        params={key: value for key, value in here.items() if key != "of"}
        | {f"layers/{row['metric']}": row["spelled"] for row in _layers(named)}
        | dict(_closed(config, here)),
        metrics=tuple(_accuracy_metrics(named, table)),
        content=table.write_csv(float_precision=12),
        fill=partial(_write, table, "accuracies.csv"),
    )


def _named(rows: pl.DataFrame) -> pl.DataFrame:
    """With `metric`, what MLflow calls an intervention: `mask/NAME`, `discard/NAME`, and its layers
    after it where two have one name."""
    several = (
        rows.group_by("kind", "intervention").agg(lists=pl.col("layers").n_unique())
    ).with_columns(several=pl.col("lists") > 1)
    spelled = pl.col("layers").map_elements(
        lambda layers: "_".join(intervals(layers.to_list())), return_dtype=pl.String
    )
    metric = pl.concat_str("kind", pl.lit("/"), "intervention")
    long = pl.concat_str(metric, pl.lit("/"), "spelled")
    return (
        rows.join(several, on=["kind", "intervention"])
        .with_columns(spelled=spelled)
        .with_columns(metric=pl.when("several").then(long).otherwise(metric))
    )


def _table(rows: pl.DataFrame) -> pl.DataFrame:
    """`accuracies` by `metric`. Discards are compared with the full prefill, where there is one."""
    full = rows.filter(pl.col("layers").list.len() == 0, kind="discard")["intervention"].unique()
    parts = []
    for (kind,), frame in rows.group_by("kind"):
        against = full[0] if kind == "discard" and len(full) == 1 else None
        parts.append(accuracies(frame, ["metric"], against=against))
    return pl.concat(parts).sort("metric")


def _directions(rows: pl.DataFrame) -> pl.DataFrame:
    """The same by direction of the reference, where a task has more than one."""
    directions = rows["direction"].drop_nulls().unique().sort()
    empty = _table(rows).clear()
    if len(directions) < 2:
        return empty
    suffixed = pl.concat_str("metric", pl.lit("/"), "direction")
    return pl.concat(
        [
            empty,
            *(_table(rows.filter(direction=d).with_columns(metric=suffixed)) for d in directions),
        ]
    )


def _accuracy_metrics(rows: pl.DataFrame, table: pl.DataFrame) -> Iterator[Metric]:
    samples = rows.unique(["model", "dataset", "sample_id"])
    yield "accuracy", sum(samples["correct_base"].to_list()) / samples.height, 0
    yield "n", float(samples.height), 0
    for row in table.iter_rows(named=True):
        for prefix, column, unit in _ACCURACY:
            if row[column] is not None:
                yield f"{prefix}/{row['metric']}", unit * float(row[column]), 0
    drawn = table.filter(pl.col("metric").str.starts_with(f"mask/{RANDOM}_"))["accuracy"].to_list()
    kept = table.filter(metric=f"mask/{FOUND}")["accuracy"].to_list()
    if drawn and kept:  # `avflow effective`
        yield "found_over_random", kept[0] - sum(drawn) / len(drawn), 0


def _layers(rows: pl.DataFrame) -> Iterator[dict[str, Any]]:
    yield from rows.select("metric", "spelled").unique().sort("metric").iter_rows(named=True)


def _closed(config: SweepConfig, here: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Which pathways the masks of a task block."""
    if here["of"] != "task":
        return
    for asked in config.interventions:
        of_model = asked.models == "all" or here["model"] in asked.models
        of_data = asked.datasets == "all" or here["dataset"] in asked.datasets
        if of_model and of_data and names_task(asked.tasks, here["dataset"], here["task"]):
            for mask in asked.masks:
                yield f"blocks/mask/{mask.name}", ", ".join(mask.pathways)


def _probe_drafts(outcome: Outcome, config: SweepConfig, task: TaskStatus) -> Iterator[Draft]:
    here = {"model": task.model, "dataset": task.dataset, "task": task.task}
    attention = outcome.last_attention.filter(**here)
    means = outcome.probe_means.filter(**here)
    if attention.is_empty() and means.is_empty():
        return
    metrics = [*_attention_metrics(attention), *_mean_metrics(means)]
    whose = [task.model] * (len(config.models) > 1) + [task.dataset] * (len(config.datasets) > 1)
    yield Draft(
        key="{model}/{dataset}/{task}/probe".format(**here),
        name=run_name(config, [*whose, task.task, "probes"]),
        tags={"kind": "probe", "category": task.category, **here},
        line=_line(outcome, config, here),
        params=here,
        metrics=tuple(metrics),
        content=attention.write_csv(float_precision=12) + means.write_csv(float_precision=12),
        fill=partial(_fill_probe, attention, means),
    )


def _attention_metrics(table: pl.DataFrame) -> Iterator[Metric]:
    """Step = layer; the peak for search."""
    for row in table.iter_rows(named=True):
        yield f"attention/{row['group']}", float(row["attention"]), row["layer"]
    top = table.sort(-pl.col("attention"), "layer").unique("group", keep="first")
    for row in top.sort("group").iter_rows(named=True):
        yield f"peak_attention/{row['group']}", float(row["attention"]), 0
        yield f"peak_attention_layer/{row['group']}", float(row["layer"]), 0
        yield "n/attention", float(row["n"]), 0


def _mean_metrics(table: pl.DataFrame) -> Iterator[Metric]:
    for row in table.iter_rows(named=True):
        name = "sinks" if row["probe"] == "sinks" else f"norm/{row['group']}"
        yield name, float(row["value"]), row["layer"]
    for (probe,), frame in table.group_by("probe", maintain_order=True):
        yield f"n/{probe}", float(max(frame["n"].to_list())), 0


def _fill_probe(attention: pl.DataFrame, means: pl.DataFrame, folder: Path) -> None:
    _write(attention, "last_attention.csv", folder)
    _write(means, "norms_and_sinks.csv", folder)


def _write(table: pl.DataFrame, name: str, folder: Path) -> None:
    if not table.is_empty():
        table.write_csv(folder / name)


def _line(outcome: Outcome, config: SweepConfig, here: Mapping[str, str]) -> int:
    """A task's colour, that of its curves where there is one model and window."""
    models = [model.name for model in config.models]
    mine = [t for t in outcome.tasks if (t.dataset, t.task) == (here["dataset"], here.get("task"))]
    number = line(outcome.tasks, mine[0]) if mine else len(outcome.tasks)
    return number + STRIDE * models.index(here["model"])
