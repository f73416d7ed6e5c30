"""A sweep cut down to what one of its figures needs: `configs/figures/` is written so."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from avflow.orchestrator.config import CellFilter, ExperimentConfig, SweepConfig
from avflow.orchestrator.data import chosen_tasks, names_task
from avflow.orchestrator.dataset_config import DatasetConfig
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.extras_config import InterventionConfig, ProbeConfig
from avflow.orchestrator.figure_config import PROBE_OF, TABLES, FigureConfig, figure_names
from avflow.orchestrator.source import unknown

_AnyScope = ExperimentConfig | InterventionConfig | ProbeConfig
_Scope = TypeVar("_Scope", ExperimentConfig, InterventionConfig, ProbeConfig)


def only(config: SweepConfig, name: str) -> SweepConfig:
    """The same sweep with one item of its `figures` (`fig1`: `fig1_left` and `fig1_maps`), and no
    more than it needs.

    Data sets keep their tasks, so that the fingerprint of their samples, and with it the identity
    of what is measured, stays that of the whole sweep. Raises ConfigError for a figure that the
    sweep lacks, or that nothing in it feeds.
    """
    figures = tuple(figure for figure in config.figures if figure.is_part_of(name))
    if not figures:
        raise ConfigError(unknown("figure", name, figure_names(config.figures)))
    experiments = _distinct(_experiment(config, e, f) for f in figures for e in config.experiments)
    interventions = _distinct(
        _intervention(config, i, f) for f in figures for i in config.interventions
    )
    probes = _distinct(_probe(config, p, f) for f in figures for p in config.probes)
    if not (experiments or interventions or probes):
        raise ConfigError(f"figure {name!r}: nothing in the sweep gives what it shows")
    sections: tuple[_AnyScope, ...] = (*experiments, *interventions, *probes)
    models = {model for section in sections for model in section.models}
    datasets = {dataset for section in sections for dataset in section.datasets}
    return config.model_copy(
        update={
            "experiments": experiments,
            "interventions": interventions,
            "probes": probes,
            "name": f"{config.name}-{name}",
            "models": tuple(m for m in config.models if m.name in models),
            "datasets": tuple(d for d in config.datasets if d.name in datasets),
            "figures": figures,
        }
    )


def _distinct(sections: Iterable[_Scope | None]) -> tuple[_Scope, ...]:
    """Those that are there, each once."""
    return tuple({section.name: section for section in sections if section is not None}.values())


def _datasets(config: SweepConfig, figure: FigureConfig) -> list[DatasetConfig]:
    return [d for d in config.datasets if figure.datasets == "all" or d.name in figure.datasets]


def _scoped(config: SweepConfig, scope: _Scope, figure: FigureConfig) -> _Scope | None:
    """The section on the figure's model, data sets and tasks; None where they don't meet."""
    held = _datasets(config, figure)
    datasets = [d for d in held if scope.datasets == "all" or d.name in scope.datasets]
    if not datasets or (scope.models != "all" and figure.model not in scope.models):
        return None
    tasks = _tasks(scope.tasks, figure.tasks, datasets)
    if not tasks:
        return None
    names = tuple(dataset.name for dataset in datasets)
    return scope.model_copy(update={"models": (figure.model,), "datasets": names, "tasks": tasks})


def _tasks(
    scope: str | Sequence[str], figure: str | Sequence[str], datasets: Sequence[DatasetConfig]
) -> str | tuple[str, ...]:
    """The tasks that both mean, whichever way each spells them: `TASK` or `DATASET/TASK`."""
    if isinstance(scope, str) and isinstance(figure, str):
        return "all"
    given = {name for names in (scope, figure) if not isinstance(names, str) for name in names}
    pairs = [(d.name, task) for d in datasets for task in chosen_tasks(d) or ()]
    both = [pair for pair in pairs if names_task(scope, *pair) and names_task(figure, *pair)]
    spelled = (f"{d}/{task}" if f"{d}/{task}" in given else task for d, task in both)
    return tuple(dict.fromkeys(spelled))


def _both(one: str | Sequence[str], other: str | Sequence[str]) -> str | tuple[str, ...]:
    """Names that two lists share, either of which may be `all`."""
    if isinstance(one, str):
        return other if isinstance(other, str) else tuple(other)
    return tuple(one) if isinstance(other, str) else tuple(n for n in other if n in one)


def _experiment(
    config: SweepConfig, experiment: ExperimentConfig, figure: FigureConfig
) -> ExperimentConfig | None:
    if figure.shows not in ("curves", "windows"):
        return None
    wanted = tuple(dict.fromkeys(name for row in figure.pathways for name in row))
    pathways = _both(experiment.pathways, wanted)
    windows = tuple(k for k in experiment.windows if k in figure.windows)
    scoped = _scoped(config, experiment, figure)
    if scoped is None or not pathways or not windows:
        return None
    kept = scoped.model_copy(update={"pathways": pathways, "windows": windows})
    include = [_filter(cells, kept) for cells in kept.include]
    exclude = [_filter(cells, kept) for cells in kept.exclude]
    if include and not any(include):
        return None
    return kept.model_copy(
        update={
            "include": tuple(cells for cells in include if cells is not None),
            "exclude": tuple(cells for cells in exclude if cells is not None),
        }
    )


def _filter(cells: CellFilter, kept: ExperimentConfig) -> CellFilter | None:
    """What a filter still says of the experiment that is kept; None if it can match nothing."""
    changed: dict[str, object] = {}
    for axis in ("models", "datasets", "tasks", "pathways", "windows"):
        named, held = getattr(cells, axis), getattr(kept, axis)
        if named is None:
            continue
        left = tuple(named) if held == "all" else tuple(value for value in named if value in held)
        if not left:
            return None
        changed[axis] = left
    return cells.model_copy(update=changed)


def _intervention(
    config: SweepConfig, intervention: InterventionConfig, figure: FigureConfig
) -> InterventionConfig | None:
    scoped = _scoped(config, intervention, figure)
    if scoped is None or figure.shows not in TABLES:
        return None
    masks = tuple(m for m in scoped.masks if figure.shows != "discards")
    discards = tuple(d for d in scoped.discards if figure.shows == "discards")
    masks = tuple(m for m in masks if m.name in figure.interventions)
    discards = tuple(d for d in discards if d.name in figure.interventions)
    if not masks and not discards:
        return None
    return scoped.model_copy(update={"masks": masks, "discards": discards})


def _probe(config: SweepConfig, probe: ProbeConfig, figure: FigureConfig) -> ProbeConfig | None:
    wanted = {PROBE_OF.get(figure.shows)}
    if figure.shows in ("maps", "norms"):
        wanted.add("sinks")  # they are marked there
    return _scoped(config, probe, figure) if probe.probe in wanted else None
