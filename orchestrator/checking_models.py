"""`avflow models check`: a checkpoint loaded and put through the conformance suite."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from avflow.datasets import decode_sample
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.testbed.samples import load as testbed_samples
from avflow.orchestrator.errors import ConfigError
from avflow.workers.models import FAMILIES, describe, load
from avflow.workers.models.base import LoadedModel, ModelInfo, ModelSpec, UnsupportedModelError
from avflow.workers.models.checkpoint import model_type
from avflow.workers.models.conformance import Case, Check, conformance

# A video with its sound, and candidates of each kind with a reference of the other.
TASKS = ("sight", "match_image", "match_sound")


def recognise(spec: ModelSpec) -> tuple[ModelSpec, ModelInfo]:
    """The spec with its family found by config.json, unless it is given, and what planning knows.

    Raises ConfigError when it is no checkpoint, or of no known family.
    """
    try:
        if spec.family:
            return spec, describe(spec)
        kind = model_type(spec)
    except UnsupportedModelError as error:
        raise ConfigError(str(error)) from error
    refusals = []
    for name, family in FAMILIES.items():
        if kind in family.model_types:
            try:
                return replace(spec, family=name), describe(replace(spec, family=name))
            except UnsupportedModelError as error:
                refusals.append(str(error))
    if refusals:
        raise ConfigError("\n".join(refusals))
    known = sorted({kind for family in FAMILIES.values() for kind in family.model_types})
    raise ConfigError(
        f"{spec.path}: model_type is {kind!r}, which no family knows; known: {', '.join(known)}"
    )


def load_checked(spec: ModelSpec, devices: tuple[str, ...]) -> LoadedModel:
    """Raises ConfigError where `load` refuses."""
    try:
        return load(spec, *devices)
    except UnsupportedModelError as error:
        raise ConfigError(str(error)) from error


def checks(model: LoadedModel, samples_per_task: int) -> Iterator[Check]:
    """The suite on samples of the testbed's world, rendered for the purpose, and on the same with
    a part of their media alone, for families that see or hear only."""
    with tempfile.TemporaryDirectory(prefix="avflow-") as folder:
        root = Path(folder)
        made = testbed_samples(root, seed=0, samples_per_task=samples_per_task, tasks=TASKS)
        samples = [*made, *(one for sample in made for one in _in_part(sample))]
        media = [decode_sample(root, sample, model.media_spec) for sample in samples]
    yield from conformance(
        model, [Case(sample=s, media=m) for s, m in zip(samples, media, strict=True)]
    )


def _in_part(sample: Sample) -> Iterator[Sample]:
    """A clip seen alone and heard alone; of candidates and their reference the pictures alone,
    first in the prompt, as families that take only pictures want them."""
    texts = tuple(part for part in sample.parts if not isinstance(part, MediaPart))
    if sample.layout == "single_video":
        (clip,) = sample.media
        seen, heard = replace(clip, with_audio=False), replace(clip, kind="audio", with_audio=False)
        yield replace(sample, sample_id=f"{sample.sample_id}-seen", parts=(seen, *texts))
        yield replace(sample, sample_id=f"{sample.sample_id}-heard", parts=(heard, *texts))
    elif all(part.kind == "image" for part in sample.media if part.role == "candidate"):
        pictures = tuple(part for part in sample.media if part.kind == "image")
        yield replace(sample, sample_id=f"{sample.sample_id}-pictures", parts=(*pictures, *texts))
