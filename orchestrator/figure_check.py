"""What is wrong with the `figures` of a sweep file, by field; and the kind of prompt of each."""

from collections.abc import Callable, Iterator, Sequence

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.source import FieldPath, unknown
from avflow.pathways.catalogue import ALL, find
from avflow.pathways.layout import LayoutKind
from avflow.pathways.pathway import Pathway

Complaint = tuple[FieldPath, str]


def layouts_of(figure: FigureConfig, own: Sequence[Pathway]) -> set[LayoutKind] | None:
    """The kinds of prompt that have all of its pathways; None where it shows none."""
    names = [name for row in figure.pathways for name in row]
    if not names:
        return None
    kinds = ({pathway.layout for pathway in find(name, tuple(own))} for name in names)
    return set.intersection(*kinds)


def check_figures(
    config: SweepConfig, tasks_of: Callable[[FigureConfig], Sequence[str] | None]
) -> Iterator[Complaint]:
    """Names that nothing in the file has. `tasks_of` a figure: what it may call its tasks, None if
    that is not known before files are read."""
    own = config.own_pathways()
    masks = [mask.name for one in config.interventions for mask in one.masks]
    given = masks + [discard.name for one in config.interventions for discard in one.discards]
    models = [model.name for model in config.models]
    datasets = [dataset.name for dataset in config.datasets]
    pathways = [pathway.name for pathway in (*own, *ALL)]
    stems = [figure.name for figure in config.figures]
    for at, figure in enumerate(config.figures):
        place = ("figures", at)
        if stems.index(figure.name) != at:
            yield (*place, "name"), f"{figure.name!r} is there already; names must differ"
        if figure.model not in models:
            yield (*place, "model"), unknown("model", figure.model, models)
        yield from _listed(place, "datasets", "data set", figure.datasets, datasets)
        yield from _listed(place, "tasks", "task", figure.tasks, tasks_of(figure))
        yield from _listed(place, "interventions", "intervention", figure.interventions, given)
        strange = False
        for number, row in enumerate(figure.pathways):
            found = list(_listed((*place, "pathways"), number, "pathway", row, pathways))
            strange = strange or bool(found)
            yield from found
        if not strange and layouts_of(figure, own) == set():
            yield (*place, "pathways"), "no kind of prompt has all of these pathways"


def _listed(
    place: FieldPath,
    field: str | int,
    what: str,
    names: str | Sequence[str],
    known: Sequence[str] | None,
) -> Iterator[Complaint]:
    for at, name in enumerate(() if isinstance(names, str) else names):
        if known is not None and name not in known:
            yield (*place, field, at), unknown(what, name, known)
