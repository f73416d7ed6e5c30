"""A sweep of a few seconds on real code: a tiny random checkpoint and a few testbed samples.

Random weights answer wrongly, so the experiment asks for all samples.
"""

from pathlib import Path

import yaml

TASKS = ("sight", "match_image")
PATHWAYS = ("video_to_question", "cross_frame", "question_to_last", "candidates_to_last")


def write_sweep(
    folder: Path,
    *,
    name: str = "sweep",
    samples_per_task: int = 2,
    executor: str = "local",
    **execution: object,
) -> Path:
    """`folder/NAME.yaml`, with checkpoint and media beside it (made once)."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        from avflow.workers.models.tiny import build_tiny_checkpoint

        build_tiny_checkpoint(checkpoint, seed=0, n_layers=4)
    sweep = {
        "name": "tiny",
        "models": [
            {
                "name": "tiny",
                "family": "qwen2_5_omni",
                "path": str(checkpoint),
                "dtype": "float32",
            }
        ],
        "datasets": [
            {
                "name": "testbed",
                "reader": "testbed",
                "root": str(folder / "media"),
                "settings": {
                    "seed": 3,
                    "samples_per_task": samples_per_task,
                    "tasks": list(TASKS),
                },
            }
        ],
        "experiments": [
            {"name": "e", "samples": "all", "windows": [1, 3], "pathways": list(PATHWAYS)}
        ],
        "execution": {"executor": executor, "workers": 2, **execution},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path
