"""What `avflow plan` prints: what would run, and what it takes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table

from avflow.orchestrator.cost import CLIP_S, PICTURE
from avflow.orchestrator.estimate import CARDS, UTILISATION, Estimate, estimate, gpu_hours
from avflow.orchestrator.views import heading, open_console, plain_table, thousands

if TYPE_CHECKING:
    from avflow.orchestrator.measure import Measurement
    from avflow.orchestrator.plan import Plan

SHOWN_CARDS = ("A100", "H100", "H200")


def show_plan(
    plan: "Plan",
    *,
    as_json: bool,
    missing: Sequence[str] = (),
    accuracy: float = 1.0,
    measured: "Measurement | None" = None,
) -> None:
    """Counts by task, then costs by model and data set.

    `missing`: what was planned without its files. `accuracy`: the share of right baselines.
    """
    from avflow.orchestrator.data import all_warnings
    from avflow.orchestrator.memory import needs, too_small_here
    from avflow.orchestrator.refusals import cautions

    memory = needs(plan.config, plan.models)
    warnings = [*missing, *all_warnings(plan.datasets), *cautions(plan)]
    warnings += too_small_here(memory)
    costs = estimate(plan, accuracy)
    total = sum(costs.values(), Estimate())
    if as_json:
        needed = {need.model: {"weights": need.weights, "peak": need.peak} for need in memory}
        more = {"memory_bytes": needed, "warnings": warnings}
        print(json.dumps(_numbers(plan, costs, total, measured) | more))
        return
    console = open_console()
    console.print(_tasks_table(plan))
    if any(group.extras for group in plan.groups):
        console.print("", _extras_table(plan))
    console.print("\nA plain forward pass a cell -> with shared prefixes:")
    for table in _costs_tables(costs, total):
        console.print(table, "")
    console.print(
        *_words(plan, total, accuracy, measured),
        *map(str, memory),
        *(f"warning: {warning}" for warning in warnings),
        sep="\n",
    )


def _numbers(
    plan: "Plan",
    costs: dict[tuple[str, str], Estimate],
    total: Estimate,
    measured: "Measurement | None",
) -> dict[str, object]:
    return {
        **asdict(plan.counts()),
        "token_layers_plain": plan.cost.plain,
        "token_layers": plan.cost.token_layers,
        "reuse": total.plain / total.shared if total.shared else 1.0,
        "gpu_hours": {card: gpu_hours(total.shared, card) for card in CARDS},
        "gpu_hours_plain": {card: gpu_hours(total.plain, card) for card in CARDS},
        "costs": [
            {"model": model, "dataset": dataset, "forward_equivalents": cost.equivalents}
            | asdict(cost)
            for (model, dataset), cost in costs.items()
        ],
        "measured": None
        if measured is None
        else {**asdict(measured), "hours": measured.hours(total)},
    }


def _tasks_table(plan: "Plan") -> Table:
    table = plain_table("task", "#samples", "#pathways", "#jobs", "#cells")
    for (model, dataset), groups in groupby(plan.groups, key=lambda g: (g.model, g.dataset)):
        heading(table, f"{model}, {dataset}")
        for group in groups:
            jobs = sum(len(curve.job_ids) for curve in group.curves)
            names = {curve.spec.pathway.name for curve in group.curves}
            row = (group.samples, len(names), jobs, jobs * group.samples)
            table.add_row(f"  {group.task}", *map(thousands, row))
    return table


def _extras_table(plan: "Plan") -> Table:
    """Interventions and probes, on how many tasks and samples."""
    table = plain_table("intervention or probe", "layers", "#tasks", "#samples")
    for (model, dataset), groups in groupby(plan.groups, key=lambda g: (g.model, g.dataset)):
        counts: dict[tuple[str, str], list[int]] = {}
        for extra in (extra for group in groups for extra in group.extras):
            key = extra.spec.key, _layers(extra.spec.layers)
            counts.setdefault(key, []).append(len(extra.samples))
        if counts:
            heading(table, f"{model}, {dataset}")
        for (name, layers), samples in counts.items():
            table.add_row(f"  {name}", layers, thousands(len(samples)), thousands(sum(samples)))
    return table


def _layers(layers: Sequence[int]) -> str:
    """`0-3 7 9-10`; `-` for none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return " ".join(texts) or "-"


def _costs_tables(costs: dict[tuple[str, str], Estimate], total: Estimate) -> tuple[Table, Table]:
    """Counts and forward passes; FLOPs and hours: two, as one would not fit into 80 columns."""
    cards = _alike(SHOWN_CARDS)
    counts = plain_table("", "#samples", "#jobs", "#cells", "#forwards", "#reuse")
    hours = plain_table("", "#FLOPs", *(f"#{', '.join(names)} h" for names in cards))
    tables = (counts, hours)
    for model, keys in groupby(costs, key=lambda key: key[0]):
        for table in tables:
            heading(table, model)
        for key in keys:
            _add_cost(tables, f"  {key[1]}", costs[key], cards)
    _add_cost(tables, "all", total, cards)
    return tables


def _add_cost(
    tables: tuple[Table, Table], name: str, cost: Estimate, cards: Sequence[Sequence[str]]
) -> None:
    counts, hours = tables
    counts.add_row(
        name,
        *map(thousands, (cost.samples, cost.jobs, cost.cells)),
        f"{cost.forwards:,.0f} -> {cost.equivalents:,.0f}",
        f"{cost.plain / cost.shared:.1f}x" if cost.shared else "-",
    )
    hours.add_row(
        name,
        f"{cost.plain:.3g} -> {cost.shared:.3g}",
        *(
            f"{gpu_hours(cost.plain, names[0]):.3g} -> {gpu_hours(cost.shared, names[0]):.3g}"
            for names in cards
        ),
    )


def _alike(cards: Sequence[str]) -> list[list[str]]:
    """Cards of one peak together: their hours are the same."""
    return [list(names) for _, names in groupby(cards, key=lambda card: CARDS[card])]


def _words(
    plan: "Plan", total: Estimate, accuracy: float, measured: "Measurement | None"
) -> list[str]:
    counts = plan.counts()
    hours = ", ".join(f"{card} {gpu_hours(total.shared, card):.3g}" for card in CARDS)
    right = "every baseline right" if accuracy == 1 else f"{accuracy:.0%} of the baselines right"
    lines = [
        f"{counts.jobs:,} jobs over {counts.samples:,} samples: {counts.cells:,} cells, "
        f"{counts.curves:,} curves in {counts.units:,} units (a sample under a model)",
        f"{counts.interventions:,} interventions and {counts.probes:,} probes, each on one sample",
        f"Plain: {total.forwards:,.0f} forward passes, {total.plain:.3g} FLOPs; with shared "
        f"prefixes the work of {total.equivalents:,.0f}, {total.shared:.3g} FLOPs "
        f"({total.floor:.3g} at the least). Nominal prompts (clips of {CLIP_S} s, pictures of "
        f"{PICTURE[0]}x{PICTURE[1]} within each model's budget), {right}, encoders and decoding "
        "apart",
        f"GPU-hours with shared prefixes, at {UTILISATION:.0%} of the cards' bfloat16 peaks: "
        f"{hours}",
    ]
    if measured is not None:
        lines.append(
            f"Measured: {measured.sample_id} of {measured.dataset} under {measured.model}, "
            f"{measured.n_tokens:,} tokens, on {measured.device}: decode {measured.decode_s:.3g} s,"
            f" encode {measured.encode_s:.3g} s, prefill {measured.prefill_s:.3g} s, replay "
            f"{measured.replay_s:.3g} s ({measured.flops_per_s:.3g} FLOP/s; "
            f"{measured.flops / measured.nominal_flops:.2f} times the nominal FLOPs). At this "
            f"rate the whole takes {measured.hours(total):.3g} hours of such a device"
        )
    return lines
