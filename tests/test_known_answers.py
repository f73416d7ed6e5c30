"""What the shipped checkpoint is for: a sweep over the testbed must find the flow it was given.

The world says which sense each task needs, and the training which way it goes (the checkpoint's
model card): inside the media in the first layers, to the question in the middle, to the last token
in the end. So each pathway has tasks that it must hurt and tasks that it must spare, whatever the
engine, the store and the statistics between the mp4 file and the curve.
"""

from pathlib import Path

import polars as pl
import pytest

from avflow.datasets.testbed.questions import TASKS
from avflow.orchestrator.config import SweepConfig, load_config
from avflow.orchestrator.results import read
from avflow.orchestrator.statistics import curve_table
from avflow.orchestrator.sweep import run_sweep

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
HURT, SPARED = -0.3, 0.1  # the deepest point of a curve; the furthest from zero anywhere

CLIP_TASKS = {task.name for task in TASKS if task.layout == "single_video"}
MATCHING = {task.name for task in TASKS if task.layout == "interleaved"}

# Pathway -> the tasks that it hurts; all others of its kind of prompt are spared.
# `colour_when_sound` goes both ways into the question: the sound's tokens know the colour, and the
# colour's own tokens are read too.
HURTS: dict[str, set[str]] = {
    "cross_frame": {"colour_after_colour"},
    "cross_audio": {"sound_after_sound"},
    "video_to_audio": {"colour_when_sound", "sound_when_colour"},
    "audio_to_video": {"colour_after_sound"},
    "audio_video_mutual": {"colour_when_sound", "sound_when_colour", "colour_after_sound"},
    "video_to_question": {
        "sight",
        "colour_after_colour",
        "colour_after_sound",
        "colour_when_sound",
    },
    "audio_to_question": {"sound", "sound_after_sound", "colour_when_sound", "sound_when_colour"},
    "video_audio_to_question": CLIP_TASKS,
    "video_to_last": set(),
    "audio_to_last": set(),
    "video_audio_to_last": set(),
    "candidates_to_reference": MATCHING,
    "reference_to_last": MATCHING,
    "candidates_to_last": set(),
}
EARLY, LATE = range(0, 3), range(4, 8)  # centre layers, of 8, with a window of 3


def small(samples_per_task: int) -> SweepConfig:
    config = load_config(DEMO).with_execution(executor="local")
    (dataset,) = config.datasets
    settings = dataset.settings.model_copy(update={"samples_per_task": samples_per_task})
    return config.model_copy(
        update={"datasets": (dataset.model_copy(update={"settings": settings}),)}
    )


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    run = tmp_path_factory.mktemp("known") / "run"
    outcome = run_sweep(small(8), run)
    assert outcome.exit_status == 0, outcome.summary
    return curve_table(read(run))


def peaks(curves: pl.DataFrame, pathway: str) -> dict[str, tuple[float, float]]:
    """task -> (deepest, highest) mean change of the pathway's curve."""
    rows = curves.filter(pathway=pathway).group_by("task")
    frame = rows.agg(low=pl.col("mean").min(), high=pl.col("mean").max())
    return {row["task"]: (row["low"], row["high"]) for row in frame.iter_rows(named=True)}


def test_nearly_every_sample_is_answered(curves: pl.DataFrame) -> None:
    answered = curves.group_by("task").agg(pl.col("n").max())
    assert set(answered["task"]) == CLIP_TASKS | MATCHING
    assert answered["n"].min() >= 6  # of 8


@pytest.mark.parametrize("pathway", HURTS)
def test_a_pathway_hurts_the_tasks_that_use_it_and_spares_the_others(
    curves: pl.DataFrame, pathway: str
) -> None:
    found = peaks(curves, pathway)
    hurt = {task for task, (low, _) in found.items() if low < HURT}
    spared = {t for t, (low, high) in found.items() if max(-low, high) < SPARED}
    assert hurt == HURTS[pathway], found
    assert spared == set(found) - HURTS[pathway], found


def test_the_question_passes_every_answer_on_late(curves: pl.DataFrame) -> None:
    found = curves.filter(pl.col("pathway") == "question_to_last", pl.col("task").is_in(CLIP_TASKS))
    for (task,), of_task in found.group_by("task"):
        deepest = of_task.sort("mean").row(0, named=True)
        assert deepest["mean"] < HURT, task
        assert deepest["center_layer"] in LATE, task
        early = of_task.filter(pl.col("center_layer") < EARLY.stop)["mean"]
        assert early.abs().max() < SPARED, task


@pytest.mark.parametrize(
    ("pathway", "task"),
    [("cross_frame", "colour_after_colour"), ("cross_audio", "sound_after_sound"),
     ("video_to_audio", "sound_when_colour"), ("audio_to_video", "colour_after_sound")],
)  # fmt: skip
def test_pathways_inside_the_media_act_early(curves: pl.DataFrame, pathway: str, task: str) -> None:
    points = curves.filter(pathway=pathway, task=task).sort("center_layer")
    assert points.sort("mean")["center_layer"][0] in EARLY
    assert points["mean"][LATE.start :].abs().max() < SPARED
