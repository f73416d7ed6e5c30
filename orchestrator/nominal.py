"""Planning without data and without checkpoints: counts from the paper, shapes as published.

What stands here has the right numbers of questions, options and media, and no content: enough to
count and to estimate, never to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from avflow.datasets.prompts import PromptTemplate, interleaved, single_video
from avflow.datasets.sample import MediaKind, MediaPart, Part, Sample, TextPart
from avflow.datasets.selections import CQR, IMAGE_TO_AUDIO, SELECTIONS, Selection, Task
from avflow.orchestrator.config import ModelConfig, SweepConfig
from avflow.orchestrator.data import LoadedDataset, load_samples
from avflow.orchestrator.dataset_config import (
    AvOdysseyDataset,
    DatasetConfig,
    JsonlDataset,
    TestbedDataset,
    prompt_template,
)
from avflow.orchestrator.identity import digest
from avflow.orchestrator.plan import Plan, build_plan

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo

QUESTION = "x" * 100
OPTION = "x" * 40
N_OPTIONS = N_CANDIDATES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class NominalPlan:
    """A plan, and what in it is not as read from files: nothing if `missing` is empty."""

    plan: Plan
    missing: tuple[str, ...]


def plan_anyway(config: SweepConfig) -> NominalPlan:
    """The plan of what is there, and of what is not with the paper's counts and published shapes.

    Raises ConfigError where neither is known.
    """
    missing: list[str] = []
    models, datasets = {}, {}
    for index, model in enumerate(config.models):
        models[model.name], note = _describe(config, index, model)
        missing += note
    for index, dataset in enumerate(config.datasets):
        root = dataset.root
        if isinstance(dataset, TestbedDataset | JsonlDataset) or (root and Path(root).exists()):
            datasets[dataset.name] = load_samples(dataset)
        else:
            datasets[dataset.name] = _nominal_dataset(config, index, dataset)
            missing.append(
                f"data set {dataset.name}: counted from the paper's tables, as {root} is not there"
            )
    return NominalPlan(plan=build_plan(config, datasets, models), missing=tuple(missing))


def _describe(
    config: SweepConfig, index: int, model: ModelConfig
) -> tuple[ModelInfo, tuple[str, ...]]:
    from avflow.orchestrator.known_models import PUBLISHED
    from avflow.workers.models import describe

    known = {one.checkpoint: one.info for one in PUBLISHED}
    if model.path in known:  # whether it was fetched or not, its shape is this
        return known[model.path], (
            f"model {model.name}: counted from the published shape of {model.path}; "
            "no file was read",
        )
    try:
        return describe(model.spec()), ()
    except (ValueError, OSError) as error:
        raise config.error(("models", index, "path"), str(error)) from error


def _nominal_dataset(config: SweepConfig, index: int, dataset: DatasetConfig) -> LoadedDataset:
    selection = SELECTIONS[dataset.reader]
    assert not isinstance(dataset, TestbedDataset | JsonlDataset)
    tasks = [selection.task(name) for name in selection.names(dataset.settings.tasks)]
    uncounted = [task.name for task in tasks if task.count is None]
    if uncounted:
        raise config.error(
            ("datasets", index, "root"),
            f"{dataset.root} is not there, and the paper has no counts of {', '.join(uncounted)}; "
            "fetch the data, or leave these tasks out",
        )
    template = prompt_template(dataset.settings.prompt)
    wanted = dataset.settings if isinstance(dataset, AvOdysseyDataset) else None
    samples = tuple(
        sample
        for task in tasks
        for sample in _samples(dataset.name, selection, task, template)
        if wanted is None
        or (
            (wanted.directions == "all" or sample.direction in wanted.directions)
            and (wanted.orderings == "all" or sample.ordering in wanted.orderings)
        )
    )
    if not samples:
        raise config.error(("datasets", index, "settings"), "no question is selected")
    made_up = digest(["nominal", dataset.name])
    return LoadedDataset(root=Path(str(dataset.root)), samples=samples, fingerprint=made_up)


def _samples(
    dataset: str, selection: Selection, task: Task, template: PromptTemplate
) -> Iterator[Sample]:
    """As many as the paper counts. Directions and orderings are dealt out apart from each other:
    how they go together is not in the paper."""
    directions = _dealt(task.directions) if selection.layout == "interleaved" else repeat(None)
    orderings = _dealt(task.orderings or {CQR: task.count or 0})
    for number in range(task.count or 0):
        direction = next(directions, None)
        ordering = next(orderings, CQR) if selection.layout == "interleaved" else None
        yield Sample(
            sample_id=f"{task.name}-{number}",
            dataset=dataset,
            task=task.name,
            category=task.category or task.name,
            layout=selection.layout,
            parts=_parts(template, direction, ordering),
            answer=0,
            media_group=f"{task.name}-{number}",
            direction=direction,
            ordering=ordering,
            correct_candidate=0 if ordering else None,
        )


def _dealt(counts: object) -> Iterator[str]:
    assert isinstance(counts, dict)
    return (name for name, count in counts.items() for _ in range(count))


def _parts(
    template: PromptTemplate, direction: str | None, ordering: str | None
) -> tuple[Part, ...]:
    if ordering is None:
        clip = MediaPart(kind="video", path="clip.mp4", with_audio=True)
        return single_video(template, clip, QUESTION, [OPTION] * N_OPTIONS)
    candidate: MediaKind = "audio" if direction == IMAGE_TO_AUDIO else "image"
    reference: MediaKind = "image" if direction == IMAGE_TO_AUDIO else "audio"
    pieces: dict[str, list[Part]] = {
        "candidates": [
            MediaPart(kind=candidate, path="item", role="candidate", index=number)
            for number in range(N_CANDIDATES)
        ],
        "question": [TextPart(role="question", text=QUESTION)],
        "reference": [MediaPart(kind=reference, path="item", role="reference")],
    }
    question = [part for name in ordering.split("-") for part in pieces[name]]
    return interleaved(template, question, [OPTION] * N_OPTIONS)
