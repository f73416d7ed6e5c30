"""From scenes and questions to samples: prompts in the benchmarks' wording, media by path."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from avflow.datasets.prompts import option_list
from avflow.datasets.sample import MediaKind, MediaPart, Part, Sample, TextPart
from avflow.datasets.testbed.questions import (
    N_OPTIONS,
    TASKS,
    TaskInfo,
    ask,
    matching_options,
    matching_text,
)
from avflow.datasets.testbed.render import render_clip, render_image, render_sound
from avflow.datasets.testbed.world import COLOURS, N_CLASSES, SOUNDS, sample_scene

CUE = "The best answer is:"
N_VARIANTS = 12  # standalone files a class, shared by the matching samples


def load(
    root: Path, *, seed: int, samples_per_task: int, tasks: tuple[str, ...] | None = None
) -> list[Sample]:
    """Render what is missing under `root` and return the samples, task by task.

    The same arguments give the same samples and files; more samples a task only append. Correct
    letters are balanced to within one. All tasks about clips share the clips.
    """
    known = {task.name: task for task in TASKS}
    unknown = sorted(set(tasks or ()) - set(known))
    if unknown:
        raise ValueError(f"unknown testbed tasks {unknown}; known: {list(known)}")
    chosen = [task for task in TASKS if tasks is None or task.name in tasks]
    return [
        sample for task in chosen for sample in _task_samples(root, task, seed, samples_per_task)
    ]


def _task_samples(root: Path, task: TaskInfo, seed: int, n: int) -> Iterator[Sample]:
    answers = _balanced_answers(f"{seed}:{task.name}", n)
    for index, answer in enumerate(answers):
        if task.layout == "single_video":
            yield _clip_sample(root, task, seed, index, answer)
        else:
            yield _matching_sample(root, task, seed, index, answer)


def _clip_sample(root: Path, task: TaskInfo, seed: int, index: int, answer: int) -> Sample:
    scene = sample_scene(Random(f"{seed}:scene:{index}"))
    path = f"seed-{seed}/clips/{index:05d}.mp4"
    if not (root / path).exists():
        render_clip(scene, root / path)
    question = ask(task.name, scene, Random(f"{seed}:{task.name}:{index}"), answer=answer)
    return Sample(
        sample_id=f"{task.name}-{seed}-{index:05d}",
        dataset="testbed",
        task=task.name,
        category=task.category,
        layout=task.layout,
        parts=(
            MediaPart(kind="video", path=path, with_audio=True),
            TextPart(role="question", text=question.text),
            *option_parts(question.option_words),
        ),
        answer=answer,
        media_group=f"clip-{seed}-{index:05d}",
    )


def _matching_sample(root: Path, task: TaskInfo, seed: int, index: int, answer: int) -> Sample:
    rng = Random(f"{seed}:{task.name}:{index}")
    images_are_candidates = task.name == "match_image"
    kinds: tuple[MediaKind, MediaKind] = ("image", "audio")
    kind, other = kinds if images_are_candidates else kinds[::-1]
    classes = rng.sample(range(N_CLASSES), N_OPTIONS)
    candidates = [_standalone(root, seed, images_are_candidates, c, rng) for c in classes]
    reference = _standalone(root, seed, not images_are_candidates, classes[answer], rng)
    parts: list[Part] = []
    for number, path in enumerate(candidates):
        parts.append(TextPart(role="other", text=f"{number + 1}."))
        parts.append(MediaPart(kind=kind, path=path, role="candidate", index=number))
    parts.append(TextPart(role="question", text=matching_text(task.name)))
    parts.append(MediaPart(kind=other, path=reference, role="reference"))
    return Sample(
        sample_id=f"{task.name}-{seed}-{index:05d}",
        dataset="testbed",
        task=task.name,
        category=task.category,
        layout=task.layout,
        parts=(*parts, *option_parts(matching_options(task.name))),
        answer=answer,
        media_group=f"{task.name}-{seed}-{index:05d}",
        direction="audio_to_image" if images_are_candidates else "image_to_audio",
        ordering="candidates-question-reference",
        correct_candidate=answer,
    )


def option_parts(words: tuple[str, ...]) -> tuple[TextPart, ...]:
    """The list of options ("A. red"), one a line, and the cue for the answer."""
    return option_list(words, closing=CUE)


def _standalone(root: Path, seed: int, is_image: bool, class_: int, rng: Random) -> str:
    """The path of one of the standalone files of a class, rendered if it is missing."""
    variant = rng.randrange(N_VARIANTS)
    name = COLOURS[class_] if is_image else SOUNDS[class_]
    path = f"seed-{seed}/" + (
        f"images/{name}-{variant:02d}.png" if is_image else f"sounds/{name}-{variant:02d}.wav"
    )
    if not (root / path).exists():
        render = render_image if is_image else render_sound
        render(class_, seed * N_VARIANTS + variant, root / path)
    return path


def _balanced_answers(key: str, n: int) -> list[int]:
    """`n` answers in which every run of four, from the start, holds each letter once."""
    rng = Random(f"{key}:answers")
    return [a for _ in range(0, n, N_OPTIONS) for a in rng.sample(range(N_OPTIONS), N_OPTIONS)][:n]
