"""A plan says what in it is hardly meant."""

from pathlib import Path

import yaml
from in_process import avflow
from salmonn import tiny_checkpoint

from avflow.orchestrator.load import load
from avflow.orchestrator.refusals import cautions, refused_prompts
from avflow.orchestrator.sweep import plan_sweep


def sweep_file(tmp_path: Path, **experiment: object) -> Path:
    models = [
        {"name": "omni", "family": "qwen2_5_omni", "path": "testbed", "dtype": "float32"},
        {
            "name": "salmonn",
            "family": "video_salmonn2",
            "path": str(tiny_checkpoint(tmp_path / "salmonn")),
        },
    ]
    settings = {"seed": 0, "samples_per_task": 2, "tasks": ["sight", "match_image"]}
    data = {"name": "testbed", "reader": "testbed", "root": str(tmp_path), "settings": settings}
    config = {
        "name": "refused",
        "models": models,
        "datasets": [data],
        "experiments": [
            {
                "name": "e",
                "pathways": ["video_to_question", "question_to_last"],
                "windows": [1],
                **experiment,
            }
        ],
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_tasks_that_a_family_can_not_take_are_warned_of(tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    (warning,) = refused_prompts(plan_sweep(load(file)))
    assert warning.startswith("model salmonn: video_salmonn2 takes no interleaved prompts")
    assert "testbed/match_image (2 samples)" in warning
    said = avflow("plan", file).stdout
    assert "takes no interleaved prompts" in " ".join(said.split())


def test_what_is_excluded_is_not_warned_of(tmp_path: Path) -> None:
    left_out = [{"models": ["salmonn"], "tasks": ["match_image"]}]
    plan = plan_sweep(load(sweep_file(tmp_path, exclude=left_out)))
    assert refused_prompts(plan) == []


def test_a_pathway_in_the_place_of_the_papers_is_warned_of(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, models=["omni"])
    raw = yaml.safe_load(file.read_text())
    own = {"layout": "single_video", "sources": ["video"], "targets": ["last"]}
    raw["pathways"] = [{"name": "video_to_question", **own}, {"name": "mine", **own}]
    file.write_text(yaml.safe_dump(raw))
    (warning,) = cautions(plan_sweep(load(file)))
    assert warning.startswith("pathway video_to_question: the sweep's own definition takes")
    assert "the place of the paper's" in " ".join(avflow("plan", file).stdout.split())
