"""The effective-pathway check: are the pathways that a run found all that an answer needs?

For each task a mask is made that closes, at every layer, all pathways but those that have an
effect there, and masks that leave open as many others, drawn at random. The candidates don't
overlap, so that closing one never closes a part of another. They are the ways between media,
question and last token: text among itself, and what comes before the media, stay open.

The pathways were found on samples of the same data: to be shown on others, run the file that this
writes on other data (`datasets`, without `identity`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import polars as pl

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.extras_config import InterventionConfig, MaskConfig
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.findings import effects
from avflow.orchestrator.outcome import Outcome
from avflow.orchestrator.results import TaskStatus
from avflow.pathways.layout import LayoutKind

CANDIDATES: Final[dict[LayoutKind, tuple[str, ...]]] = {
    "single_video": (
        *("cross_frame", "cross_audio", "video_to_audio", "audio_to_video"),
        *("video_to_question", "audio_to_question"),
        *("question_to_last", "video_to_last", "audio_to_last"),
    ),
    "interleaved": (
        *("cross_candidate", "candidates_to_question", "candidates_to_reference"),
        *("question_to_reference", "correct_candidate_to_correct_option"),
        *("incorrect_candidates_to_correct_option", "reference_to_correct_option"),
        *("question_to_correct_option", "reference_to_last", "candidates_to_last"),
        *("question_to_last", "correct_option_to_last", "incorrect_options_to_last"),
    ),
}
MUTUAL: Final = "audio_video_mutual"
DIRECTED: Final = ("video_to_audio", "audio_to_video")
FOUND, RANDOM = "only_found", "only_random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Of one task: the candidates, and those that stay open: what was found, then random ones."""

    task: TaskStatus
    candidates: tuple[str, ...]
    kept: tuple[tuple[str, ...], ...]

    @property
    def found(self) -> tuple[str, ...]:
        """The pathways that have an effect."""
        return self.kept[0]


def effective_sweep(
    config: SweepConfig, outcome: Outcome, *, window: int | None = None, draws: int, seed: int
) -> SweepConfig:
    """The sweep of such masks, on all samples of the tasks that have curves.

    `window`: of the curves that say what was found; None if the run has one width alone. Raises
    ConfigError where the run has no curves to go by, or not of all centre layers.
    """
    if any(asked.center_layers != "all" for asked in config.experiments):
        raise ConfigError(
            "the run has experiments with `center_layers`: a pathway with an effect may be missed, "
            "and how many layers to close is not known; take them out"
        )
    curves = outcome.curves.filter(variant="letter")
    widths = sorted(set(curves["window"]))
    if not widths:
        raise ConfigError(
            "the run has no curves to go by: of rightly answered samples, with "
            "`option_span: letter`"
        )
    if (window or widths[0]) not in widths or (window is None and len(widths) > 1):
        raise ConfigError(f"the run has curves of windows {widths}; say which, with --window")
    curves = curves.filter(window=window or widths[0])
    choices = list(choose(curves, outcome.tasks, draws=draws, seed=seed))
    if not choices:
        raise ConfigError(
            "no task of the run has complete curves of every pathway that is chosen from: "
            "see `avflow status`, and the pathways of its experiments"
        )
    layers = {
        model: max(frame["center_layer"].to_list()) + 1
        for (model,), frame in curves.group_by("model")
    }
    used = list(dict.fromkeys(choice.task.model for choice in choices))
    names = (FOUND, *(f"{RANDOM}_{number}" for number in range(1, draws + 1)))
    return config.model_copy(
        update={
            "name": f"{config.name}-effective",
            "experiments": (),
            "probes": (),
            "interventions": tuple(
                _intervention(choice, layers[choice.task.model], names)
                for choice in choices
                if len(choice.found) < len(choice.candidates)
            ),
            "figures": tuple(_figure(model, choices, names, used) for model in used),
        }
    )


def choose(
    curves: pl.DataFrame, tasks: Sequence[TaskStatus], *, draws: int, seed: int
) -> Iterator[Choice]:
    """What stays open for each task that has curves of all its candidates."""
    found = effects(curves)
    for task in tasks:
        held = found.filter(model=task.model, dataset=task.dataset, task=task.task)
        layout: LayoutKind = "interleaved" if task.layout == "interleaved" else "single_video"
        candidates = _candidates(layout, set(held["pathway"]))
        if candidates is None:
            continue
        with_effect = set(held.drop_nulls("peak")["pathway"])
        kept = tuple(name for name in candidates if name in with_effect)
        others = [c for c in combinations(candidates, len(kept)) if c != kept]
        lots = f"{seed}/{task.model}/{task.dataset}/{task.task}"
        others.sort(key=lambda choice: hashlib.blake2b(f"{lots}/{choice}".encode()).digest())
        yield Choice(task=task, candidates=candidates, kept=(kept, *others[:draws]))


def _candidates(layout: LayoutKind, held: set[str]) -> tuple[str, ...] | None:
    """None if a curve is missing. Where the directions between sound and sight were not looked at
    apart, as the paper does outside its main experiment, both are one candidate."""
    names = CANDIDATES[layout]
    if not held.issuperset(names) and MUTUAL in held:
        names = (*(name for name in names if name not in DIRECTED), MUTUAL)
    return names if held.issuperset(names) else None


def _intervention(choice: Choice, n_layers: int, names: Sequence[str]) -> InterventionConfig:
    task = choice.task
    masks = []
    for name, kept in zip(names, choice.kept, strict=False):
        closed = tuple(pathway for pathway in choice.candidates if pathway not in kept)
        masks.append(MaskConfig(name=name, pathways=closed, layers=tuple(range(n_layers))))
    return InterventionConfig(
        name=f"{task.model}/{task.dataset}/{task.task}"[:100],
        models=(task.model,),
        datasets=(task.dataset,),
        tasks=(task.task,),
        masks=tuple(masks),
    )


def _figure(
    model: str, choices: Sequence[Choice], names: tuple[str, ...], used: Sequence[str]
) -> FigureConfig:
    mine = [choice for choice in choices if choice.task.model == model]
    notes = [
        f"{choice.task.dataset}, {choice.task.task}: found {', '.join(choice.found) or 'nothing'}"
        f" ({len(choice.found)} of {len(choice.candidates)})"
        for choice in mine
    ]
    notes.append("Found on the rightly answered ones among these same samples.")
    number = "" if len(used) == 1 else f"_{used.index(model) + 1}"
    return FigureConfig(
        name=f"effective{number}",
        shows="effective",
        title=f"Only the pathways that were found, {model}",
        model=model,
        datasets=tuple(dict.fromkeys(choice.task.dataset for choice in mine)),
        interventions=names,
        notes=tuple(notes),
    )
