"""From a data set's config to its samples, wherever they come from."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import assert_never

from avflow.datasets.reading import AnnotationError, LeftOut
from avflow.datasets.sample import LayoutKind, Sample
from avflow.datasets.selections import (
    AV_ODYSSEY,
    AV_SPEAKERBENCH,
    SELECTIONS,
    UNDER_A_MINUTE,
    WORLDSENSE,
    CountCheck,
    Task,
    check_counts,
)
from avflow.datasets.stored_media import coarse_tables
from avflow.orchestrator.dataset_config import (
    READERS,
    AvOdysseyDataset,
    AvSpeakerBenchDataset,
    DatasetConfig,
    JsonlDataset,
    TestbedDataset,
    TestbedSettings,
    WorldSenseDataset,
    prompt_template,
    spelled_out,
)
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.identity import digest
from avflow.orchestrator.paths import cache_folder

MOST_WARNINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDataset:
    """Samples in the reader's order; media lie under `root`.

    `fingerprint` is of the questions, answers and file names, not of the files' bytes: a mended
    file is the same sample. `left_out` are questions that can't be asked; `checks` compare the
    samples with the paper's tables, where it has any for this selection; `notes` say what else a
    person should know.
    """

    root: Path
    samples: tuple[Sample, ...]
    fingerprint: str
    left_out: tuple[LeftOut, ...] = ()
    checks: tuple[CountCheck, ...] = ()
    notes: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """What is not as it should be, a line each; of many rows left out, the first.

        Directions and orderings of a task are told only where its total is right.
        """
        bad = [check for check in self.checks if not check.good]
        totals = {check.task for check in bad if not check.part}
        counts = [str(c) for c in bad if not c.part or c.task not in totals]
        rows = [f"left out: {row}" for row in self.left_out[:MOST_WARNINGS]]
        more = len(self.left_out) - len(rows)
        return [
            *self.notes,
            *counts,
            *rows,
            *([f"left out: {more} questions more"] if more else []),
        ]


def all_warnings(datasets: Mapping[str, LoadedDataset]) -> list[str]:
    """The same of several data sets, by name."""
    return [
        f"data set {name}: {warning}"
        for name, loaded in datasets.items()
        for warning in loaded.warnings()
    ]


def load_samples(config: DatasetConfig) -> LoadedDataset:
    """Read, or render, a data set. Raises ConfigError when its folder can't be used."""
    root = Path(config.root) if config.root is not None else cache_folder(config.reader)
    try:
        read = list(_read(root, config))
    except OSError as error:
        raise ConfigError(f"data set {config.name}: {root} can't be used: {error}") from error
    except AnnotationError as error:
        raise ConfigError(f"data set {config.name}: {error}") from error
    samples = tuple(replace(s, dataset=config.name) for s in read if isinstance(s, Sample))
    left_out = tuple(row for row in read if isinstance(row, LeftOut))
    if not samples:
        why = f"; {len(left_out)} can't be asked, the first: {left_out[0]}" if left_out else ""
        raise ConfigError(
            f"data set {config.name}: {root} holds no question of those selected{why}"
        )
    doubles = len(samples) - len({sample.sample_id for sample in samples})
    if doubles:
        twice = Counter(sample.sample_id for sample in samples).most_common(1)[0][0]
        raise ConfigError(
            f"data set {config.name}: {doubles} sample ids are there twice, {twice!r} among them"
        )
    return LoadedDataset(
        root=root,
        samples=samples,
        fingerprint=fingerprint(samples),
        left_out=left_out,
        checks=_checks(config, samples),
        notes=tuple(coarse_tables(root, (part.path for s in samples for part in s.media))),
    )


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
    return READERS


def about_tasks(reader: str) -> tuple[KnownTask, ...]:
    """The tasks that a reader offers; none where the file decides. Raises KeyError."""
    if reader == "testbed":
        from avflow.datasets.testbed.questions import TASKS

        return tuple(KnownTask(name=t.name, layout=t.layout, about=t.about) for t in TASKS)
    if reader == "jsonl":
        return ()
    selection = SELECTIONS[reader]
    return tuple(
        KnownTask(name=task.name, layout=selection.layout, about=_about(task))
        for task in selection.tasks
    )


_USES = {"knockout": "attention knockout", "cross_task": "cross-task evaluation"}


def _about(task: Task) -> str:
    """What the paper does with it, and with how many questions."""
    count = "not in the paper" if task.count is None else f"{task.count} questions"
    return f"{_USES[task.use]}, {count}" if task.use in _USES else count


def known_tasks(reader: str) -> tuple[str, ...]:
    """Their names. Raises KeyError for an unknown reader."""
    return tuple(task.name for task in about_tasks(reader))


def chosen_tasks(config: DatasetConfig) -> tuple[str, ...] | None:
    """The tasks that a data set's settings choose; None: whatever its file holds.

    Raises KeyError for an unknown name.
    """
    match config:
        case JsonlDataset():
            return None
        case TestbedDataset(settings=settings):
            return known_tasks("testbed") if isinstance(settings.tasks, str) else settings.tasks
        case _:
            return SELECTIONS[config.reader].names(config.settings.tasks)


def names_task(names: str | Sequence[str], dataset: str, task: str) -> bool:
    """Whether a list of tasks in a sweep file, or `all`, means this one: by its name, or by
    `dataset/task` where data sets share a name."""
    return names == "all" or task in names or f"{dataset}/{task}" in names


def spellings(tasks: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """All that a sweep file may call these (dataset, task), each once: bare names first."""
    pairs = list(dict.fromkeys(tasks))
    both = (*(task for _, task in pairs), *(f"{dataset}/{task}" for dataset, task in pairs))
    return tuple(dict.fromkeys(both))


def resolved(config: DatasetConfig) -> DatasetConfig:
    """The same data set with its tasks and the texts of its prompt spelled out."""
    changed: dict[str, object] = {}
    if not isinstance(config, JsonlDataset):
        changed["tasks"] = chosen_tasks(config)
    if not isinstance(config, TestbedDataset):
        changed["prompt"] = spelled_out(config.settings.prompt)
    return config.model_copy(update={"settings": config.settings.model_copy(update=changed)})


def _read(root: Path, config: DatasetConfig) -> Iterable[Sample | LeftOut]:
    match config:
        case TestbedDataset(settings=settings):
            return _testbed(root, settings)
        case AvSpeakerBenchDataset(settings=settings):
            from avflow.datasets import av_speakerbench

            return av_speakerbench.read(
                root,
                tasks=AV_SPEAKERBENCH.names(settings.tasks),
                template=prompt_template(settings.prompt),
            )
        case WorldSenseDataset(settings=settings):
            from avflow.datasets import worldsense

            return worldsense.read(
                root,
                tasks=WORLDSENSE.names(settings.tasks),
                durations=settings.durations,
                template=prompt_template(settings.prompt),
            )
        case AvOdysseyDataset(settings=settings):
            from avflow.datasets import av_odyssey

            return av_odyssey.read(
                root,
                tasks=AV_ODYSSEY.names(settings.tasks),
                directions=settings.directions,
                orderings=settings.orderings,
                template=prompt_template(settings.prompt),
            )
        case JsonlDataset(settings=settings):
            from avflow.datasets import jsonl

            return jsonl.read(root, file=settings.file, template=prompt_template(settings.prompt))
        case _:
            assert_never(config)


def _testbed(root: Path, settings: TestbedSettings) -> Sequence[Sample]:
    from avflow.datasets.testbed.samples import load

    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        raise PermissionError("it is not writable, and clips are rendered into it")
    tasks = None if settings.tasks == "all" else settings.tasks
    return load(root, seed=settings.seed, samples_per_task=settings.samples_per_task, tasks=tasks)


def _checks(config: DatasetConfig, samples: Sequence[Sample]) -> tuple[CountCheck, ...]:
    """None where the settings select otherwise than the paper."""
    match config:
        case TestbedDataset() | JsonlDataset():
            return ()
        case WorldSenseDataset(settings=settings) if settings.durations != (UNDER_A_MINUTE,):
            return ()
        case AvOdysseyDataset(settings=settings) if (settings.directions, settings.orderings) != (
            "all",
            "all",
        ):
            return ()
        case _:
            names = SELECTIONS[config.reader].names(config.settings.tasks)
            return check_counts(SELECTIONS[config.reader], names, samples)
