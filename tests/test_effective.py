"""From a run's curves to what may be closed: on the shipped checkpoint, whose flow is known.

What the curves say is taken at its word. Where they show no effect, masks and discards must cost
nothing; with the pathways found alone, answers must stand, and with as many others fall.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from in_process import avflow
from test_known_answers import small

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.effective import CANDIDATES, choose, effective_sweep
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.findings import effects
from avflow.orchestrator.outcome import Outcome, read_outcome
from avflow.orchestrator.paper_figures import report_tables
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.results import TaskStatus, read
from avflow.orchestrator.run_folder import stored_config
from avflow.orchestrator.sweep import run_sweep
from avflow.pathways.catalogue import SINGLE_VIDEO

TASKS = ("sight", "sound", "sound_when_colour")
LAYERS, WINDOW = 8, 3
NEEDED = {
    "sight": {"video_to_question", "question_to_last"},
    "sound": {"audio_to_question", "question_to_last"},
    "sound_when_colour": {"video_to_audio", "audio_to_question", "question_to_last"},
}


def sweep(folder: Path, config: SweepConfig) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
        run_sweep(config, folder, progress=Silent())
    paths = RunPaths(folder)
    return read_outcome(paths, stored_config(paths))


def asked(**sections: Any) -> SweepConfig:
    whole = small(12).model_dump(mode="json")
    whole["datasets"][0]["settings"]["tasks"] = list(TASKS)
    return SweepConfig.model_validate_json(json.dumps(whole | {"experiments": []} | sections))


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepConfig, Outcome]:
    experiment = {
        "name": "e", "windows": [WINDOW], "pathways": list(CANDIDATES["single_video"]),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("curves") / "run"
    outcome = sweep(folder, asked(experiments=[experiment]))
    return stored_config(RunPaths(folder)), outcome


def last_read(outcome: Outcome, pathways: list[str]) -> int:
    """The last layer that any window with an effect of these reaches into."""
    found = effects(outcome.curves.filter(pl.col("pathway").is_in(pathways)))
    return max(max(layers) for layers in found["layers"].to_list() if layers) + WINDOW // 2


def test_each_task_goes_the_ways_it_must(curves: tuple[SweepConfig, Outcome]) -> None:
    outcome = curves[1]
    found = {
        c.task.task: set(c.found) for c in choose(outcome.curves, outcome.tasks, draws=1, seed=0)
    }
    assert found == NEEDED


def test_after_the_last_effect_masks_and_discards_cost_nothing(
    curves: tuple[SweepConfig, Outcome], tmp_path: Path
) -> None:
    ways = ["video_to_question", "audio_to_question", "video_to_last", "audio_to_last"]
    last = last_read(curves[1], ways)
    assert last < LAYERS - 2, "the curves of this checkpoint end before the last layers"
    interventions = {
        "name": "late",
        "masks": [
            {"name": "late", "pathways": ["video_audio_to_question", "video_audio_to_last"],
             "layers": list(range(last + 1, LAYERS))},
            {"name": "early", "pathways": ["video_audio_to_question"],
             "layers": list(range(last + 1))},
        ],
        "discards": [
            {"name": "full", "steps": []},
            {"name": "media", "steps": [{"after_layer": last, "groups": ["video", "audio"]}]},
        ],
    }  # fmt: skip
    outcome = sweep(tmp_path / "run", asked(interventions=[interventions]))
    rows = outcome.interventions
    right = {name: int(f["correct"].sum()) for (name,), f in rows.group_by("intervention")}
    assert right["full"] > 0.9 * 12 * len(TASKS)
    assert right["late"] == right["media"] == right["full"]
    assert right["early"] < 0.6 * right["full"]
    work = {name: f["token_layers"].sum() for (name,), f in rows.group_by("intervention")}
    assert work["media"] < 0.95 * work["full"]


def test_what_was_found_is_enough_and_as_many_others_are_not(
    curves: tuple[SweepConfig, Outcome], tmp_path: Path
) -> None:
    made = effective_sweep(*curves, draws=2, seed=0)
    outcome = sweep(tmp_path / "run", made)
    share = {
        name: float(np.mean(frame["correct"].to_numpy()))
        for (name,), frame in outcome.interventions.group_by("intervention")
    }
    base = float(np.mean(outcome.interventions["correct_base"].to_numpy()))
    assert share["only_found"] >= base - 0.1
    assert max(share["only_random_1"], share["only_random_2"]) < 0.6
    table = report_tables(outcome)["effective"]
    assert [row[0] for row in table.cells] == list(TASKS)
    for row in table.cells:
        of_task = outcome.interventions.filter(task=row[0], intervention="only_found")
        assert row[3].startswith(f"{100 * np.mean(of_task['correct'].to_numpy()):.2f} (")
    assert "found video_to_question, question_to_last (2 of 9)" in table.notes[0]
    assert read(tmp_path / "run", "interventions").height == 3 * 12 * len(TASKS)


def curve(pathway: str, peak: float) -> pl.DataFrame:
    low, high = sorted((peak * 0.9, peak * 1.1))
    return pl.DataFrame(
        {
            "model": "m", "dataset": "d", "task": "t", "variant": "letter", "window": 3,
            "pathway": pathway, "center_layer": [0, 1], "mean": [0.0, peak], "low": [0.0, low],
            "high": [0.0, high], "q_value": [1.0, 0.001],
        }
    )  # fmt: skip


def status() -> TaskStatus:
    return TaskStatus(
        model="m", dataset="d", task="t", category="c", layout="single_video",
        planned=1, right=1, wrong=0, failed=0,
    )  # fmt: skip


def test_random_choices_are_as_large_differ_and_follow_from_the_seed() -> None:
    kept = {"video_to_question": -0.8, "question_to_last": -0.5}
    table = pl.concat([curve(name, kept.get(name, 0.0)) for name in CANDIDATES["single_video"]])
    (one,), (same,), (other,) = (
        list(choose(table, [status()], draws=4, seed=s)) for s in (1, 1, 2)
    )
    assert one.found == tuple(kept)
    assert len(set(one.kept)) == 5
    assert {len(choice) for choice in one.kept} == {2}
    assert one == same
    assert one.kept != other.kept


def test_both_directions_are_one_candidate_where_they_were_not_looked_at_apart() -> None:
    names = [p.name for p in SINGLE_VIDEO if p.name not in ("video_to_audio", "audio_to_video")]
    (choice,) = choose(pl.concat([curve(n, -0.5) for n in names]), [status()], draws=1, seed=0)
    assert "audio_video_mutual" in choice.candidates
    assert len(choice.candidates) == 8
    some = [curve(name, -0.5) for name in names if name != "video_to_last"]
    assert list(choose(pl.concat(some), [status()], draws=1, seed=0)) == []


def test_several_windows_ask_for_one(curves: tuple[SweepConfig, Outcome]) -> None:
    config, outcome = curves
    wider = outcome.curves.with_columns(window=pl.lit(5).cast(outcome.curves.schema["window"]))
    both = replace(outcome, curves=pl.concat([outcome.curves, wider]))
    with pytest.raises(ConfigError, match=r"windows \[3, 5\]; say which, with --window"):
        effective_sweep(config, both, draws=1, seed=0)
    assert effective_sweep(config, both, window=5, draws=1, seed=0).interventions


def test_a_width_that_was_not_run_is_refused(curves: tuple[SweepConfig, Outcome]) -> None:
    with pytest.raises(ConfigError, match=r"windows \[3\]; say which, with --window"):
        effective_sweep(*curves, window=7, draws=1, seed=0)
    nothing = replace(curves[1], curves=curves[1].curves.clear())
    with pytest.raises(ConfigError, match="no curves to go by"):
        effective_sweep(curves[0], nothing, draws=1, seed=0)


def test_where_the_file_cannot_be_written_is_said(
    curves: tuple[SweepConfig, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.orchestrator.run_folder.stored_config", lambda paths: curves[0])
    monkeypatch.setattr("avflow.orchestrator.outcome.read_outcome", lambda paths, of: curves[1])
    (tmp_path / "file").touch()
    done = avflow("effective", str(tmp_path), "--out", str(tmp_path / "file" / "out.yaml"))
    assert done.returncode == 2
    assert "out.yaml can't be written" in done.stderr
    assert avflow("effective", str(tmp_path), "--out", str(tmp_path / "a/b.yaml")).returncode == 0


def test_curves_of_some_layers_do_not_say_what_was_found(
    curves: tuple[SweepConfig, Outcome],
) -> None:
    config, outcome = curves
    some = config.experiments[0].model_copy(update={"center_layers": (0, 1)})
    with pytest.raises(ConfigError, match="center_layers"):
        effective_sweep(
            config.model_copy(update={"experiments": (some,)}), outcome, draws=1, seed=0
        )
