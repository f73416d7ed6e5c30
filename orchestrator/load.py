"""From a sweep file to a checked `SweepConfig`: everything that can be refused is refused here."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from avflow.orchestrator.config import ExperimentConfig, SweepConfig
from avflow.orchestrator.data import chosen_tasks, known_tasks, spellings
from avflow.orchestrator.dataset_config import READERS, TAGGED, DatasetConfig, JsonlDataset
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.extras_check import check_names
from avflow.orchestrator.extras_config import ScopeConfig
from avflow.orchestrator.figure_check import check_figures
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.identity import IDENTITY_VERSION
from avflow.orchestrator.source import FieldPath, Source, read_source, unknown
from avflow.pathways.catalogue import ALL

_Complaint = tuple[FieldPath, str]
_Scope = ExperimentConfig | ScopeConfig | FigureConfig


def load(path: Path) -> SweepConfig:
    """Read and check. Raises ConfigError: one line a complaint, each with file, line and field."""
    config = parse(path)
    found = list(_check(config))
    if found:
        raise ConfigError("\n".join(str(config.error(*complaint)) for complaint in found))
    return config


def parse(path: Path) -> SweepConfig:
    """Read alone: its shape is checked, not whether what it points to is there."""
    source = read_source(path)
    try:
        # As JSON, where strictness still lets a list be a tuple.
        config = SweepConfig.model_validate_json(json.dumps(source.data, default=str))
    except ValidationError as error:
        found = _merged(source, error.errors())
        raise ConfigError("\n".join(str(source.error(*one)) for one in found)) from None
    config = _with_absolute_paths(config, path.parent)
    config.attach(source)
    return config


# -- shape -----------------------------------------------------------------------------------


def _merged(source: Source, errors: Sequence[ErrorDetails]) -> list[_Complaint]:
    """One complaint a field: pydantic reports each branch of a union apart."""
    messages: dict[tuple[str | int, ...], list[str]] = {}
    for error in errors:
        field = _in_file(error)
        known = source.known(field)
        missing = error["type"] in ("missing", "union_tag_not_found")
        extra = error["type"] == "extra_forbidden"
        at = (*known, field[-1]) if missing and known != field else known
        text = _about_extra(error["loc"]) if extra else _message(error)
        messages.setdefault(at, []).append(text)
    return [
        (at, " or: ".join(dict.fromkeys(texts)))
        for at, texts in messages.items()
        # What is wrong inside a list or mapping makes pydantic complain of it as a whole, too.
        if not any(other[: len(at)] == at for other in messages if other != at)
    ]


def _in_file(error: ErrorDetails) -> FieldPath:
    """Where in the file: pydantic adds tags (the reader's name, above all) to a field's path."""
    loc = tuple(part for part in error["loc"] if part not in TAGGED)
    return (*loc, "reader") if error["type"].startswith("union_tag") else loc


def _message(error: ErrorDetails) -> str:
    if error["type"] in ("missing", "union_tag_not_found"):
        return "this field is required"
    if error["type"] == "union_tag_invalid":
        return unknown("reader", error["ctx"]["tag"], READERS)
    text = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    return text if isinstance(given, dict | list) else f"{text} (it is {given!r})"


def _about_extra(field: FieldPath) -> str:
    known: list[str] = []
    kind: type[BaseModel] | None = SweepConfig
    for part in field[:-1]:
        if isinstance(part, str) and kind is not None:
            kind = TAGGED.get(part) or _config_in(kind, part)
    if kind is not None:
        known = list(kind.model_fields)
    return unknown("field", str(field[-1]), known)


def _config_in(kind: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The config class that a field holds, bare, in a tuple or beside None."""
    info = kind.model_fields.get(field)
    pending: list[object] = [info.annotation] if info is not None else []
    while pending:
        at = pending.pop()
        if isinstance(at, type) and issubclass(at, BaseModel):
            return at
        pending.extend(getattr(at, "__args__", ()))
    return None


# -- meaning ---------------------------------------------------------------------------------


def _check(config: SweepConfig) -> Iterator[_Complaint]:
    yield from _check_names(config)
    yield from _check_models(config)
    yield from _check_datasets(config)
    for index, experiment in enumerate(config.experiments):
        yield from _check_experiment(config, index, experiment)
    for section, members in (("interventions", config.interventions), ("probes", config.probes)):
        for index, member in enumerate(members):
            yield from _check_axes(config, member, [((section, index), member)])
    yield from check_names(config)
    yield from check_figures(config, lambda figure: _tasks(config, figure))
    if config.identity is not None and config.identity.version != IDENTITY_VERSION:
        text = f"written by identity version {config.identity.version}, this is {IDENTITY_VERSION}"
        yield ("identity", "version"), f"{text}; take the section out to start anew"


def _check_names(config: SweepConfig) -> Iterator[_Complaint]:
    axes: tuple[tuple[str, Sequence[object]], ...] = (
        ("models", [model.name for model in config.models]),
        ("datasets", [dataset.name for dataset in config.datasets]),
        ("experiments", [experiment.name for experiment in config.experiments]),
        ("pathways", [(pathway.name, pathway.layout) for pathway in config.pathways]),
        ("interventions", [intervention.name for intervention in config.interventions]),
        ("probes", [probe.name for probe in config.probes]),
    )
    for axis, names in axes:
        counts = Counter(names)
        for index, name in enumerate(names):
            if counts[name] > 1 and names.index(name) != index:
                yield (axis, index, "name"), f"{name!r} is there already; names must differ"


def _check_models(config: SweepConfig) -> Iterator[_Complaint]:
    from avflow.workers.models import FAMILIES

    for index, model in enumerate(config.models):
        if model.family not in FAMILIES:
            yield ("models", index, "family"), unknown("model family", model.family, FAMILIES)
        if _is_local(model.path) and not Path(model.path).is_dir():
            text = f"there is no folder {model.path}; give a checkpoint's folder, a hub id, or "
            yield ("models", index, "path"), text + "`testbed` for the one that comes with avflow"


def _check_datasets(config: SweepConfig) -> Iterator[_Complaint]:
    for index, dataset in enumerate(config.datasets):
        known = known_tasks(dataset.reader)
        chosen = () if isinstance(dataset, JsonlDataset) else dataset.settings.tasks
        for at, task in enumerate(() if isinstance(chosen, str) else chosen):
            if task not in known:
                field = ("datasets", index, "settings", "tasks", at)
                yield field, unknown("task", task, known)


def _check_experiment(
    config: SweepConfig, index: int, experiment: ExperimentConfig
) -> Iterator[_Complaint]:
    places: list[tuple[FieldPath, BaseModel]] = [(("experiments", index), experiment)]
    for side in ("include", "exclude"):
        for at, cells in enumerate(getattr(experiment, side)):
            places.append((("experiments", index, side, at), cells))
    yield from _check_axes(config, experiment, places)


def _check_axes(
    config: SweepConfig, scope: _Scope, places: Sequence[tuple[FieldPath, BaseModel]]
) -> Iterator[_Complaint]:
    """Names in the lists of a section, or of its filters, that nothing in the file has."""
    axes: tuple[tuple[str, str, Sequence[str] | None], ...] = (
        ("models", "model", [model.name for model in config.models]),
        ("datasets", "data set", [dataset.name for dataset in config.datasets]),
        ("pathways", "pathway", [pathway.name for pathway in (*config.own_pathways(), *ALL)]),
        ("tasks", "task", _tasks(config, scope)),
    )
    for place, holder in places:
        for axis, what, known in axes:
            names = getattr(holder, axis, None)
            for at, name in enumerate(() if names in ("all", None) else names):
                if known is not None and name not in known:
                    yield (*place, axis, at), unknown(what, name, known)


def _tasks(config: SweepConfig, scope: _Scope) -> Sequence[str] | None:
    """What a section may call tasks; None if that is known only once files have been read."""
    pairs: list[tuple[str, str]] = []
    for dataset in config.datasets:
        if scope.datasets == "all" or dataset.name in scope.datasets:
            tasks = _chosen_tasks(dataset)
            if tasks is None:
                return None
            pairs += [(dataset.name, task) for task in tasks]
    return spellings(pairs)


def _chosen_tasks(dataset: DatasetConfig) -> Sequence[str] | None:
    try:
        return chosen_tasks(dataset)
    except KeyError:  # an unknown name among them, which has a complaint of its own
        return known_tasks(dataset.reader)


# -- paths -----------------------------------------------------------------------------------


def _is_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~"))


def _with_absolute_paths(config: SweepConfig, folder: Path) -> SweepConfig:
    """Local paths, relative to the sweep file, made absolute: the resolved file may lie elsewhere.

    `testbed` and hub ids stay as they are; a bare name or `a/b` is local if that folder is there.
    """
    models = tuple(
        model.model_copy(update={"path": _absolute(model.path, folder)}) for model in config.models
    )
    datasets = tuple(
        dataset
        if dataset.root is None
        else dataset.model_copy(update={"root": _resolved(dataset.root, folder)})
        for dataset in config.datasets
    )
    return config.model_copy(update={"models": models, "datasets": datasets})


def _absolute(path: str, folder: Path) -> str:
    if path == "testbed":
        return path
    resolved = _resolved(path, folder)
    return resolved if _is_local(path) or Path(resolved).is_dir() else path


def _resolved(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())
