"""From a sweep file to jobs and units. Pure: no Ray, no torch, no clock.

    experiments -> groups (model, dataset, task, kind of prompt), each with its curves and job ids
    groups x samples -> units, each with everything the plan holds for its sample

What two experiments share is run once: centre layers are joined, and a curve is kept for wrong
baselines if any experiment wants `samples: all`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from avflow.datasets.sample import Sample
from avflow.orchestrator.asking import Asked, CurveKey, GroupKey, ask
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.cost import Cost, NominalCost
from avflow.orchestrator.data import LoadedDataset
from avflow.orchestrator.identity import (
    IDENTITY_VERSION,
    METRIC_VERSION,
    digest,
    identity_fields,
)
from avflow.orchestrator.plan_extras import PlannedExtra, extras_of, plan_extras
from avflow.orchestrator.resolve import check, resolve
from avflow.pathways.catalogue import ALL
from avflow.pathways.layout import LayoutKind
from avflow.workers.protocol import CurveSpec, ProbeSpec, UnitSpec

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The card's unit of planning. `samples` is how many the plan has it run on."""

    job_id: str
    model: str
    dataset: str
    task: str
    layout: LayoutKind
    pathway: str
    variant: str
    window: int
    center_layer: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCurve:
    """A curve with its jobs, one a centre layer, in the same order."""

    spec: CurveSpec
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What the samples of one task and kind of prompt run under one model: each all `curves`, and
    those of the `extras` that name it."""

    model: str
    dataset: str
    task: str
    layout: LayoutKind
    curves: tuple[PlannedCurve, ...]
    extras: tuple[PlannedExtra, ...]
    samples: int

    @property
    def key(self) -> GroupKey:
        """How a unit finds its group."""
        return self.model, self.dataset, self.task, self.layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole sweep. `config` is resolved: what RUN/sweep.yaml holds; `datasets` are as read;
    `models` by name, as their config.json describes them."""

    config: SweepConfig
    datasets: Mapping[str, LoadedDataset]
    models: Mapping[str, ModelInfo]
    groups: tuple[Group, ...]
    units: tuple[UnitSpec, ...]
    cost: Cost
    _by_key: dict[GroupKey, dict[str, PlannedCurve]] = field(default_factory=dict)

    def jobs(self) -> Iterator[Job]:
        """Every job, in the plan's order."""
        for group in self.groups:
            for curve in group.curves:
                for center, job_id in zip(curve.spec.center_layers, curve.job_ids, strict=True):
                    yield Job(
                        job_id=job_id,
                        model=group.model,
                        dataset=group.dataset,
                        task=group.task,
                        layout=group.layout,
                        pathway=curve.spec.pathway.name,
                        variant=curve.spec.variant,
                        window=curve.spec.window,
                        center_layer=center,
                        samples=group.samples,
                    )

    @property
    def model_digests(self) -> dict[str, str]:
        """Model -> digest of the checkpoint that was planned for."""
        return self.config.identity.models if self.config.identity is not None else {}

    def curve(self, unit: UnitSpec, key: str) -> PlannedCurve:
        """Raises KeyError for a curve that the plan does not hold for this unit."""
        return self._by_key[group_of(unit)][key]

    def counts(self) -> PlanCounts:
        """How much there is to do."""
        curves = sum(len(unit.curves) for unit in self.units)
        extras = [spec for unit in self.units for spec in unit.extras]
        probes = sum(isinstance(spec, ProbeSpec) for spec in extras)
        cells = sum(len(c.spec.center_layers) * g.samples for g in self.groups for c in g.curves)
        return PlanCounts(
            jobs=sum(len(c.job_ids) for g in self.groups for c in g.curves),
            samples=len({(u.sample.dataset, u.sample.sample_id) for u in self.units}),
            units=len(self.units),
            curves=curves,
            cells=cells,
            interventions=len(extras) - probes,
            probes=probes,
            forward_passes=cells + len(self.units) + len(extras) - probes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCounts:
    """Interventions and probes by sample. `forward_passes`: what the plain way would take, one a
    cell, an intervention and a unit's baseline, if every baseline were right."""

    jobs: int
    samples: int
    units: int
    curves: int
    cells: int
    interventions: int
    probes: int
    forward_passes: int


def group_of(unit: UnitSpec) -> GroupKey:
    """The group that a unit belongs to."""
    sample = unit.sample
    return unit.model, sample.dataset, sample.task, sample.layout


def unit_id(model: str, dataset: str, sample_id: str) -> str:
    """`model/dataset/sample`, as in logs and the failures table."""
    return f"{model}/{dataset}/{sample_id}"


def build_plan(
    config: SweepConfig,
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> Plan:
    """Enumerate everything. Units come costliest first.

    Raises ConfigError (an unknown task, a window larger than a model, a centre layer it lacks, an
    experiment that selects nothing) and IdentityMismatch (a checkpoint or data set that is not
    the one recorded in the sweep file).
    """
    check(config, datasets, models)
    resolved = resolve(config, datasets, models)
    limited = {
        name: _limit(loaded.samples, config.execution.limit) for name, loaded in datasets.items()
    }
    groups = tuple(_groups(resolved, limited, datasets, models))
    units, cost = _units(resolved, groups, limited, datasets, models)
    by_key = {group.key: {c.spec.key: c for c in group.curves} for group in groups}
    return Plan(
        config=resolved,
        datasets=datasets,
        models=models,
        groups=groups,
        units=units,
        cost=cost,
        _by_key=by_key,
    )


def _limit(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` samples of each task."""
    taken: dict[str, int] = {}
    kept = []
    for sample in samples:
        taken[sample.task] = taken.get(sample.task, 0) + 1
        if limit is None or taken[sample.task] <= limit:
            kept.append(sample)
    return kept


# -- groups ----------------------------------------------------------------------------------


def _groups(
    config: SweepConfig,
    samples: Mapping[str, Sequence[Sample]],
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> Iterator[Group]:
    own = config.own_pathways()
    order = {name: at for at, name in enumerate(dict.fromkeys(p.name for p in (*ALL, *own)))}
    sizes = _group_sizes(samples)
    keys: list[GroupKey] = [(model.name, *size) for model in config.models for size in sizes]
    asked: dict[GroupKey, dict[CurveKey, Asked]] = {key: {} for key in keys}
    for experiment in config.experiments:
        for key in keys:
            ask(experiment, key, models[key[0]].n_layers, own, asked[key])
    for key in sorted(asked, key=lambda key: _group_order(config, samples, key)):
        model_name, dataset, task, layout = key
        curves = asked[key]
        extras = plan_extras(
            config, key, models[model_name].n_layers, samples[dataset], datasets[dataset]
        )
        if not curves and not extras:
            continue
        prefix = _identity_of_group(config, key, datasets, models)
        ordered = sorted(curves, key=lambda curve: (order[curve[0]], curve[1], curve[2]))
        yield Group(
            model=model_name,
            dataset=dataset,
            task=task,
            layout=layout,
            curves=tuple(_planned(prefix, curve, curves[curve]) for curve in ordered),
            extras=extras,
            samples=sizes[dataset, task, layout],
        )


def _group_sizes(
    samples: Mapping[str, Sequence[Sample]],
) -> dict[tuple[str, str, LayoutKind], int]:
    sizes: dict[tuple[str, str, LayoutKind], int] = {}
    for dataset, of_dataset in samples.items():
        for sample in of_dataset:
            key = (dataset, sample.task, sample.layout)
            sizes[key] = sizes.get(key, 0) + 1
    return sizes


def _group_order(
    config: SweepConfig, samples: Mapping[str, Sequence[Sample]], key: GroupKey
) -> tuple[int, int, int, str]:
    model, dataset, task, layout = key
    names = [m.name for m in config.models]
    tasks = list(dict.fromkeys(sample.task for sample in samples[dataset]))
    return names.index(model), list(samples).index(dataset), tasks.index(task), layout


# -- identity --------------------------------------------------------------------------------


def _identity_of_group(
    config: SweepConfig,
    key: GroupKey,
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> dict[str, object]:
    model, dataset, task, _ = key
    return {
        "identity_version": IDENTITY_VERSION,
        "metric_version": METRIC_VERSION,
        "model": identity_fields(config.model(model)) | {"digest": models[model].digest},
        "dataset": {"name": dataset, "fingerprint": datasets[dataset].fingerprint},
        "task": task,
        "execution": identity_fields(config.execution),
    }


def _planned(prefix: Mapping[str, object], key: CurveKey, asked: Asked) -> PlannedCurve:
    _, window, span = key
    centers = tuple(sorted(asked.centers))
    spec = CurveSpec(
        pathway=asked.pathway,
        window=window,
        center_layers=centers,
        option_span=span,
        correct_only=asked.correct_only,
    )
    definition = asdict(asked.pathway)
    del definition["figures"]  # where the paper shows it: no part of what it is
    curve = digest({**prefix, "pathway": definition, "variant": spec.variant, "window": window})
    ids = tuple(digest({"curve": curve, "center_layer": center}) for center in centers)
    return PlannedCurve(spec=spec, job_ids=ids)


# -- units -----------------------------------------------------------------------------------


def _units(
    config: SweepConfig,
    groups: Sequence[Group],
    samples: Mapping[str, Sequence[Sample]],
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> tuple[tuple[UnitSpec, ...], Cost]:
    units: list[UnitSpec] = []
    total = Cost()
    for group in groups:
        model = config.model(group.model)
        curves = tuple(curve.spec for curve in group.curves)
        estimate = NominalCost(curves, model, models[group.model])
        for sample in samples[group.dataset]:
            if (sample.task, sample.layout) != (group.task, group.layout):
                continue
            extras = extras_of(group.extras, sample)
            if not curves and not extras:
                continue
            cost = estimate(sample, extras)
            total += cost
            units.append(
                UnitSpec(
                    unit_id=unit_id(group.model, group.dataset, sample.sample_id),
                    model=group.model,
                    data_root=str(datasets[group.dataset].root),
                    sample=sample,
                    curves=curves,
                    wanted=frozenset(spec.key for spec in (*curves, *extras)),
                    byte_budget=config.execution.byte_budget,
                    cost=cost.token_layers,
                    extras=extras,
                    decode_timeout_s=config.execution.decode_timeout_s,
                )
            )
    units.sort(key=lambda unit: (-unit.cost, unit.unit_id))
    return tuple(units), total
