"""A small planned run with made-up results, for tests of what a run folder holds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl

from avflow.datasets.prompts import option_list
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.policy import Action, Decision, FailureKind
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import (
    claim,
)
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import remaining, stored_state
from avflow.workers.protocol import CurveDone, SampleDone, UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo


# Not a ModelInfo itself: drivers are started by the dozen below, and torch takes seconds to import.
_SIZES = {"hidden_size": 8, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 16}
INFO = cast("ModelInfo", SimpleNamespace(**_SIZES, n_layers=4, digest="d1"))


def sample(number: int, task: str = "sight") -> Sample:
    return Sample(
        sample_id=f"{task}-{number}",
        dataset="world",
        task=task,
        category="one sense",
        layout="single_video",
        parts=(
            MediaPart(kind="video", path=f"{number}.mp4", with_audio=True),
            TextPart(role="question", text="Which?"),
            *option_list(["x"] * 4),
        ),
        answer=number % 4,
        media_group=str(number),
    )


def config(**changes: object) -> SweepConfig:
    raw = {
        "name": "test",
        "models": [{"name": "tiny", "family": "qwen2_5_omni", "path": "testbed"}],
        "datasets": [{"name": "world", "reader": "testbed"}],
        "experiments": [
            {"name": "e", "pathways": ["video_to_question", "question_to_last"], "windows": [3]}
        ],
    }
    return SweepConfig.model_validate_json(json.dumps(raw | changes))


def make_plan(n_samples: int = 4, **changes: object) -> Plan:
    samples = tuple(sample(n) for n in range(n_samples))
    loaded = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    return build_plan(config(**changes), {"world": loaded}, {"tiny": INFO})


def curve_done(unit: UnitSpec, key: str) -> CurveDone:
    """Numbers that follow from the unit and the curve alone, as a worker's do."""
    spec = next(curve for curve in unit.curves if curve.key == key)
    n = len(spec.center_layers)
    rng = np.random.default_rng(list(f"{unit.unit_id}{key}".encode()))
    return CurveDone(
        unit_id=unit.unit_id,
        curve=key,
        center_layer=np.array(spec.center_layers, dtype=np.int16),
        p_knockout=rng.random(n),
        p_options=rng.random((n, 4)),
        knockout_token=np.array([7 + i % 2 for i in range(n)], dtype=np.int32),
        n_blocked_edges=np.arange(n, dtype=np.int64),
        p_base=0.5,
        base_token=7,
        correct_base=True,
        answer_token=7,
        n_tokens=50,
    )


def sample_done(unit: UnitSpec, *, correct: bool = True) -> SampleDone:
    return SampleDone(
        unit_id=unit.unit_id,
        answer="A",
        predicted="A" if correct else None,
        base_token=7,
        p_base=0.5,
        p_options=np.array([0.5, 0.2, 0.1, 0.1]),
        correct=correct,
        n_tokens=50,
        group_spans={"video": [[3, 9], [12, 15]], "last": [[49, 50]]},
        decode_s=0.1,
        encode_s=0.1,
        prefill_s=0.1,
        replay_s=0.1,
        token_layers=10,
        flops=1e6,
        flops_lower_bound=9e5,
        split_batches=0,
        peak_bytes=1 << 20,
    )


def failure(unit: UnitSpec, curve: str | None, *, terminal: bool = True) -> Decision:
    return Decision(
        action=Action.QUARANTINE if terminal else Action.RETRY,
        kind=FailureKind.EXCEPTION,
        model=unit.model,
        unit=unit,
        failure=UnitFailure(
            unit_id=unit.unit_id,
            curve=curve,
            stage="decode",
            error="MediaError",
            message="no sound track",
            traceback="Traceback ...",
        ),
        attempt=1,
    )


def write_unit(store: ResultStore, unit: UnitSpec) -> None:
    for curve in unit.curves:
        if curve.key in unit.wanted:
            store.add_curve(unit, curve_done(unit, curve.key))
    store.add_sample(unit, sample_done(unit), worker="host:1", attempt=1)


def fill(paths: RunPaths, plan: Plan) -> None:
    """What a session does: claim, then run what is left."""
    claim(paths, plan)
    store = ResultStore(paths, plan)
    for unit in remaining(plan, stored_state(paths)):
        write_unit(store, unit)
    store.commit()


def sorted_cells(paths: RunPaths) -> pl.DataFrame:
    return read(paths.root).sort("job_id", "sample_id")
