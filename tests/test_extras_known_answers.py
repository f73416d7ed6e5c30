"""Interventions on the shipped checkpoint: what is known to be passed on early can go late.

Its media reach the question in the first layers and the question the last token in the last ones
(the model card), so the paper's Tables 1 and 4 have an expected shape here.
"""

import json

import polars as pl
import pytest
from test_known_answers import small

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.extras_results import intervention_table
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.results import read
from avflow.orchestrator.sweep import run_sweep

EARLY, LATE = [0, 1, 2, 3, 4], [6, 7]
INTERVENTIONS = [
    {
        "name": "masks",
        "tasks": ["sight", "sound"],
        "masks": [
            {"name": "video_early", "pathways": ["video_to_question", "video_to_last"],
             "layers": EARLY},
            {"name": "video_late", "pathways": ["video_to_question", "video_to_last"],
             "layers": LATE},
            {"name": "media_late", "pathways": ["video_audio_to_question", "video_audio_to_last"],
             "layers": LATE},
            {"name": "question_late", "pathways": ["question_to_last"], "layers": [4, 5, 6, 7]},
        ],
        "discards": [
            {"name": "full", "steps": []},
            {"name": "video_first", "steps": [{"after_layer": 0, "groups": ["video"]}]},
            {"name": "all_late", "steps": [
                {"after_layer": 5, "groups": ["video", "audio"]},
                {"after_layer": 6, "groups": ["non_option_question"]},
            ]},
        ],
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    folder = tmp_path_factory.mktemp("known") / "run"
    whole = small(8).model_dump(mode="json") | {"experiments": [], "interventions": INTERVENTIONS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
        config = SweepConfig.model_validate_json(json.dumps(whole))
        run_sweep(config, folder, progress=Silent())
    return intervention_table(read(folder, "interventions"))


def accuracy(table: pl.DataFrame, task: str, name: str) -> float:
    return float(table.filter(task=task, intervention=name)["accuracy"].item())


def test_late_masks_and_discards_cost_nothing(table: pl.DataFrame) -> None:
    base = {task: accuracy(table, task, "full") for task in ("sight", "sound")}
    assert min(base.values()) > 0.8, "the checkpoint answers"
    for task, unmasked in base.items():
        for name in ("video_late", "media_late", "all_late"):
            assert accuracy(table, task, name) == unmasked, (task, name)


def test_what_comes_too_early_takes_the_task_that_needs_it_and_no_other(
    table: pl.DataFrame,
) -> None:
    for name in ("video_early", "video_first"):
        assert accuracy(table, "sight", name) < 0.6
        assert accuracy(table, "sound", name) > 0.8
    for task in ("sight", "sound"):
        assert accuracy(table, task, "question_late") < 0.6


def test_discarding_runs_fewer_token_layers(table: pl.DataFrame) -> None:
    for task in ("sight", "sound"):
        of_task = table.filter(task=task, kind="discard")
        done = dict(of_task.select("intervention", "token_layers").rows())
        assert done["video_first"] < done["all_late"] < done["full"]
