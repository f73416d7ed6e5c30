"""A sweep file against what it points to: refuse what does not fit, spell out the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from avflow.orchestrator.config import ExperimentConfig, RecordedIdentity, SweepConfig
from avflow.orchestrator.data import LoadedDataset, names_task, resolved, spellings
from avflow.orchestrator.errors import ConfigError, IdentityMismatch
from avflow.orchestrator.extras_check import check_layers, check_layouts
from avflow.orchestrator.extras_config import InterventionConfig, ProbeConfig, ScopeConfig
from avflow.orchestrator.identity import differences
from avflow.orchestrator.source import FieldPath, unknown
from avflow.pathways.catalogue import ALL, find
from avflow.pathways.layout import LayoutKind

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo

_Scope = ExperimentConfig | ScopeConfig
_AnyScope = TypeVar("_AnyScope", ExperimentConfig, InterventionConfig, ProbeConfig)


def check(
    config: SweepConfig,
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> None:
    """Raises ConfigError, or IdentityMismatch against what the file has recorded."""
    for index, experiment in enumerate(config.experiments):
        _check_layers(config, index, experiment, models)
        _check_tasks(config, ("experiments", index), experiment, datasets)
        if not _selects_anything(config, experiment, datasets):
            what = f"experiment {experiment.name!r} selects nothing"
            raise config.error(
                ("experiments", index),
                f"{what}: no chosen pathway is for the kind of prompt of a chosen task",
            )
    for section, members in (("interventions", config.interventions), ("probes", config.probes)):
        for index, member in enumerate(members):
            _check_tasks(config, (section, index), member, datasets)
    complaints = (
        *check_layers(config, models),
        *check_layouts(config, lambda scope: _layouts(config, scope, datasets)),
    )
    if complaints:
        raise ConfigError("\n".join(str(config.error(*one)) for one in complaints))
    if config.identity is not None:
        found = _recorded(config, datasets, models)
        _check_recorded(config.identity, found)


def resolve(
    config: SweepConfig,
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> SweepConfig:
    """The same sweep with `all` spelled out (centre layers apart) and digests recorded."""
    sections: dict[str, object] = {
        "experiments": tuple(_spelled_out(config, e, datasets) for e in config.experiments),
        "interventions": tuple(_spelled_out(config, i, datasets) for i in config.interventions),
        "probes": tuple(_spelled_out(config, p, datasets) for p in config.probes),
    }
    recorded = _recorded(config, datasets, models)
    return config.model_copy(
        update={
            **sections,
            "datasets": tuple(resolved(dataset) for dataset in config.datasets),
            "identity": recorded,
        }
    )


def _check_layers(
    config: SweepConfig, index: int, experiment: ExperimentConfig, models: Mapping[str, ModelInfo]
) -> None:
    for name in _names(experiment.models, [model.name for model in config.models]):
        layers = models[name].n_layers
        for at, window in enumerate(experiment.windows):
            if window > layers:
                raise config.error(
                    ("experiments", index, "windows", at),
                    f"a window of {window} layers does not fit model {name!r}, which has {layers}",
                )
        centers = () if experiment.center_layers == "all" else experiment.center_layers
        for at, center in enumerate(centers):
            if center >= layers:
                raise config.error(
                    ("experiments", index, "center_layers", at),
                    f"model {name!r} has no layer {center}; its layers are 0 to {layers - 1}",
                )


def _check_tasks(
    config: SweepConfig, field: FieldPath, scope: _Scope, datasets: Mapping[str, LoadedDataset]
) -> None:
    known = spellings(
        (dataset, sample.task)
        for dataset in _datasets_of(config, scope)
        for sample in datasets[dataset].samples
    )
    for at, task in enumerate(_names(scope.tasks, ())):
        if task not in known:
            raise config.error((*field, "tasks", at), unknown("task", task, known))


def _selects_anything(
    config: SweepConfig, experiment: ExperimentConfig, datasets: Mapping[str, LoadedDataset]
) -> bool:
    own = config.own_pathways()
    layouts = _layouts(config, experiment, datasets)
    names = _names(experiment.pathways, [pathway.name for pathway in (*ALL, *own)])
    return any(pathway.layout in layouts for name in names for pathway in find(name, own))


def _layouts(
    config: SweepConfig, scope: _Scope, datasets: Mapping[str, LoadedDataset]
) -> set[LayoutKind]:
    """The kinds of prompt of a section's tasks."""
    return {
        sample.layout
        for name in _datasets_of(config, scope)
        for sample in datasets[name].samples
        if names_task(scope.tasks, name, sample.task)
    }


def _spelled_out(
    config: SweepConfig, scope: _AnyScope, datasets: Mapping[str, LoadedDataset]
) -> _AnyScope:
    axes = {
        "models": _names(scope.models, [model.name for model in config.models]),
        "datasets": _datasets_of(config, scope),
        "tasks": _names(scope.tasks, _tasks_of(config, scope, datasets)),
    }
    if isinstance(scope, ExperimentConfig):
        pathways = [pathway.name for pathway in (*ALL, *config.own_pathways())]
        axes["pathways"] = tuple(dict.fromkeys(_names(scope.pathways, pathways)))
    return scope.model_copy(update=axes)


def _datasets_of(config: SweepConfig, scope: _Scope) -> tuple[str, ...]:
    return _names(scope.datasets, [dataset.name for dataset in config.datasets])


def _tasks_of(
    config: SweepConfig, scope: _Scope, datasets: Mapping[str, LoadedDataset]
) -> tuple[str, ...]:
    """The tasks of a section's data sets, in their order."""
    return tuple(
        dict.fromkeys(
            sample.task for name in _datasets_of(config, scope) for sample in datasets[name].samples
        )
    )


def _names(chosen: str | tuple[str, ...], everything: Sequence[str]) -> tuple[str, ...]:
    return tuple(everything) if isinstance(chosen, str) else chosen


def _recorded(
    config: SweepConfig,
    datasets: Mapping[str, LoadedDataset],
    models: Mapping[str, ModelInfo],
) -> RecordedIdentity:
    return RecordedIdentity(
        models={model.name: models[model.name].digest for model in config.models},
        datasets={dataset.name: datasets[dataset.name].fingerprint for dataset in config.datasets},
    )


def _check_recorded(theirs: RecordedIdentity, mine: RecordedIdentity) -> None:
    found = list(differences(mine.model_dump(mode="json"), theirs.model_dump(mode="json")))
    if found:
        raise IdentityMismatch(
            "the sweep file was recorded with another checkpoint or data set "
            "(this machine's, then the file's):\n  "
            + "\n  ".join(found)
            + "\nput the recorded one in place, or take out `identity` to run a new sweep"
        )
