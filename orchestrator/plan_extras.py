"""From the interventions and probes of a sweep file to what each sample runs beside its curves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from avflow.datasets.sample import Sample
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, names_task
from avflow.orchestrator.extras_check import discards_from, mask_pathways
from avflow.orchestrator.extras_config import InterventionConfig, ProbeConfig
from avflow.orchestrator.source import FieldPath
from avflow.pathways.layout import LayoutKind
from avflow.pathways.pathway import Pathway
from avflow.workers.protocol import ExtraSpec, MaskSpec, ProbeSpec

if TYPE_CHECKING:
    from avflow.orchestrator.asking import GroupKey


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedExtra:
    """An intervention or a probe, and the ids of the samples of its group that it is run on."""

    spec: ExtraSpec
    samples: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    field: FieldPath
    spec: ExtraSpec
    samples: frozenset[str]


def plan_extras(
    config: SweepConfig,
    key: GroupKey,
    n_layers: int,
    planned: Sequence[Sample],
    dataset: LoadedDataset,
) -> tuple[PlannedExtra, ...]:
    """The extras of one group, of which `planned` are the samples (after `limit`).

    What two sections ask alike is run once. Raises ConfigError where they ask differently under
    one name.
    """
    found: dict[str, _Asked] = {}
    ids = frozenset(sample.sample_id for sample in planned)
    for asked in _asked(config, key, n_layers, dataset):
        name = asked.spec.key
        before = found.get(name)
        if before is None:
            found[name] = asked
            continue
        correct_only = before.spec.correct_only and asked.spec.correct_only
        spec = replace(before.spec, correct_only=correct_only)
        if spec != replace(asked.spec, correct_only=correct_only):
            kind, _, what = name.partition("/")
            model, of, task, _ = key
            raise config.error(
                asked.field,
                f"{kind} {what!r} is asked of {model}, {of}, {task} twice, each time in another "
                f"way (first at {'.'.join(map(str, before.field))}); make it one, or keep the "
                "models, data sets and tasks of the two apart",
            )
        found[name] = replace(before, spec=spec, samples=before.samples | asked.samples)
    extras = (PlannedExtra(spec=one.spec, samples=one.samples & ids) for one in found.values())
    return tuple(extra for extra in extras if extra.samples)


def _asked(
    config: SweepConfig, key: GroupKey, n_layers: int, dataset: LoadedDataset
) -> Iterator[_Asked]:
    _, _, task, layout = key
    of_group = [s for s in dataset.samples if (s.task, s.layout) == (task, layout)]
    everyone = frozenset(sample.sample_id for sample in of_group)
    own = config.own_pathways()
    for at, intervention in enumerate(config.interventions):
        if _concerns(intervention, key):
            for field, spec in _interventions(intervention, layout, own):
                yield _Asked(field=("interventions", at, *field), spec=spec, samples=everyone)
    for at, probe in enumerate(config.probes):
        if _concerns(probe, key):
            layers = range(n_layers) if probe.layers == "all" else probe.layers
            spec = ProbeSpec(
                name=probe.probe,
                layers=tuple(layers),
                top_dimensions=probe.top_dimensions,
                correct_only=probe.samples == "correct",
            )
            yield _Asked(field=("probes", at), spec=spec, samples=_drawn(probe, of_group))


def _concerns(scope: InterventionConfig | ProbeConfig, key: GroupKey) -> bool:
    model, dataset, task, _ = key
    return (
        (scope.models == "all" or model in scope.models)
        and (scope.datasets == "all" or dataset in scope.datasets)
        and names_task(scope.tasks, dataset, task)
    )


def _interventions(
    intervention: InterventionConfig, layout: LayoutKind, own: tuple[Pathway, ...]
) -> Iterator[tuple[FieldPath, ExtraSpec]]:
    span, correct_only = intervention.option_span, intervention.samples == "correct"
    for number, mask in enumerate(intervention.masks):
        pathways = mask_pathways(mask, layout, own)
        if pathways is not None:
            spec = MaskSpec(
                name=mask.name,
                pathways=pathways,
                layers=mask.layers,
                option_span=span,
                correct_only=correct_only,
            )
            yield ("masks", number), spec
    for number, discard in enumerate(intervention.discards):
        if discards_from(discard, layout):
            yield ("discards", number), discard.spec(option_span=span, correct_only=correct_only)


def _drawn(probe: ProbeConfig, samples: Sequence[Sample]) -> frozenset[str]:
    """Drawn from all of the task's samples, so that a run with `limit` draws none but these."""
    ids = [sample.sample_id for sample in samples]
    if probe.samples_per_task is not None:
        ids = sorted(ids, key=lambda name: _lot(probe.seed, name))[: probe.samples_per_task]
    return frozenset(ids)


def _lot(seed: int, sample_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=16).digest()


def extras_of(extras: Sequence[PlannedExtra], sample: Sample) -> tuple[ExtraSpec, ...]:
    """Those of a group that this sample runs."""
    return tuple(extra.spec for extra in extras if sample.sample_id in extra.samples)
