"""From a data set's config to its samples, wherever they come from."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from avflow.datasets.sample import LayoutKind, Sample
from avflow.orchestrator.config import DatasetConfig
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.identity import digest
from avflow.orchestrator.paths import cache_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDataset:
    """Samples in the reader's order; media lie under `root`.

    `fingerprint` is of the questions, answers and file names, not of the files' bytes: a mended
    file is the same sample.
    """

    root: Path
    samples: tuple[Sample, ...]
    fingerprint: str


def load_samples(config: DatasetConfig) -> LoadedDataset:
    """Read, or render, a data set. Raises ConfigError when its folder can't be used."""
    root = Path(config.root) if config.root is not None else cache_folder(config.reader)
    try:
        samples = _READERS[config.reader](root, config)
    except OSError as error:
        raise ConfigError(f"data set {config.name}: {root} can't be used: {error}") from error
    named = tuple(replace(sample, dataset=config.name) for sample in samples)
    doubles = len(named) - len({sample.sample_id for sample in named})
    if doubles:
        raise ConfigError(f"data set {config.name}: {doubles} sample ids are there twice")
    return LoadedDataset(root=root, samples=named, fingerprint=fingerprint(named))


def fingerprint(samples: Sequence[Sample]) -> str:
    """32 hexadecimal digits; the same questions in the same order give the same."""
    return digest([asdict(replace(sample, dataset="")) for sample in samples])


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTask:
    """A task that a reader offers."""

    name: str
    layout: LayoutKind
    about: str


def readers() -> tuple[str, ...]:
    """The names of the readers."""
    return tuple(_READERS)


def about_tasks(reader: str) -> tuple[KnownTask, ...]:
    """The tasks that a reader offers. Raises KeyError for an unknown reader."""
    return _TASKS[reader]()


def known_tasks(reader: str) -> tuple[str, ...]:
    """Their names. Raises KeyError for an unknown reader."""
    return tuple(task.name for task in about_tasks(reader))


def _testbed(root: Path, config: DatasetConfig) -> Sequence[Sample]:
    from avflow.datasets.testbed.samples import load

    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        raise PermissionError("it is not writable, and clips are rendered into it")
    settings = config.settings
    tasks = None if settings.tasks == "all" else settings.tasks
    return load(root, seed=settings.seed, samples_per_task=settings.samples_per_task, tasks=tasks)


def _testbed_tasks() -> tuple[KnownTask, ...]:
    from avflow.datasets.testbed.questions import TASKS

    return tuple(KnownTask(name=t.name, layout=t.layout, about=t.about) for t in TASKS)


_READERS: Mapping[str, Callable[[Path, DatasetConfig], Sequence[Sample]]] = {"testbed": _testbed}
_TASKS: Mapping[str, Callable[[], tuple[KnownTask, ...]]] = {"testbed": _testbed_tasks}
