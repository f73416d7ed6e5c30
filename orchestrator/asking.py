"""What a sweep's experiments ask of one group: curves, and the centre layers of each."""

from dataclasses import dataclass

from avflow.orchestrator.config import CellFilter, ExperimentConfig
from avflow.orchestrator.data import names_task
from avflow.pathways.catalogue import ALL, find
from avflow.pathways.layout import LayoutKind, OptionSpan
from avflow.pathways.pathway import Pathway

GroupKey = tuple[str, str, str, LayoutKind]
CurveKey = tuple[str, int, OptionSpan]  # pathway, window, option span


@dataclass(slots=True)
class Asked:
    """What the experiments ask of one curve, joined."""

    pathway: Pathway
    centers: set[int]
    correct_only: bool


def ask(
    experiment: ExperimentConfig,
    key: GroupKey,
    n_layers: int,
    own: tuple[Pathway, ...],
    into: dict[CurveKey, Asked],
) -> None:
    """Add what one experiment asks of the group to `into`."""
    model, dataset, task, layout = key
    if not (
        _among(model, experiment.models)
        and _among(dataset, experiment.datasets)
        and names_task(experiment.tasks, dataset, task)
    ):
        return
    centers = range(n_layers) if experiment.center_layers == "all" else experiment.center_layers
    for pathway in _pathways_of(experiment.pathways, layout, own):
        for window in experiment.windows:
            if not _selected(experiment, key, pathway.name, window):
                continue
            curve = (pathway.name, window, experiment.option_span)
            correct_only = experiment.samples == "correct"
            one = into.setdefault(curve, Asked(pathway, set(), correct_only))
            one.centers.update(centers)
            one.correct_only = one.correct_only and correct_only


def _among(name: str, names: str | tuple[str, ...]) -> bool:
    return names == "all" or name in names


def _pathways_of(
    names: str | tuple[str, ...], layout: LayoutKind, own: tuple[Pathway, ...]
) -> list[Pathway]:
    chosen = [p.name for p in (*ALL, *own)] if isinstance(names, str) else names
    found = (pathway for name in dict.fromkeys(chosen) for pathway in find(name, own))
    return [pathway for pathway in found if pathway.layout == layout]


def _selected(experiment: ExperimentConfig, key: GroupKey, pathway: str, window: int) -> bool:
    def matches(cells: CellFilter) -> bool:
        axes = (
            (key[0], cells.models),
            (key[1], cells.datasets),
            (pathway, cells.pathways),
            (window, cells.windows),
        )
        of_task = cells.tasks is None or names_task(cells.tasks, key[1], key[2])
        return of_task and all(values is None or value in values for value, values in axes)

    if experiment.include and not any(map(matches, experiment.include)):
        return False
    return not any(map(matches, experiment.exclude))
