"""docs/mlflow.md: each of its search strings, against a real store that holds a known answer."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from stored_run import INFO, sample, sample_done

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import build_plan
from avflow.orchestrator.run_folder import claim, stored_config
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.tracking import connect, publish
from avflow.workers.protocol import CurveDone, CurveSpec

PAGE = Path(__file__).parents[1] / "docs" / "mlflow.md"
LAYERS = 6
PATHWAYS = ["video_to_question", "audio_to_question", "question_to_last"]
NEEDS = {"sight": {"video_to_question"}, "sound": {"audio_to_question"}}


def answered(unit_id: str, task: str, spec: CurveSpec) -> CurveDone:
    """A pathway that the task needs costs 80% at one layer, and is read late; else nothing."""
    p = np.full(LAYERS, 0.5)
    if spec.pathway.name in NEEDS[task]:
        p[1] = 0.1
    if spec.pathway.name == "question_to_last":
        p[5] = 0.1
    wobble = 0.001 * (sum(unit_id.encode()) % 7)
    return CurveDone(
        unit_id=unit_id, curve=spec.key, center_layer=np.arange(LAYERS, dtype=np.int16),
        p_knockout=p + wobble, p_options=np.full((LAYERS, 4), 0.25),
        knockout_token=np.full(LAYERS, 7, dtype=np.int32),
        n_blocked_edges=np.ones(LAYERS, dtype=np.int64),
        p_base=0.5, base_token=7, correct_base=True, answer_token=7, n_tokens=50,
    )  # fmt: skip


def published(folder: Path, name: str, store: str, models: list[str], windows: list[int]) -> None:
    raw = {
        "name": name,
        "models": [{"name": m, "family": "qwen2_5_omni", "path": "testbed"} for m in models],
        "datasets": [{"name": "world", "reader": "testbed"}],
        "experiments": [{"name": "e", "pathways": PATHWAYS, "windows": windows}],
        "mlflow": {"tracking_uri": store},
    }
    samples = tuple(sample(n, task) for task in NEEDS for n in range(5))
    world = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    infos = {model: type(INFO)(**{**vars(INFO), "n_layers": LAYERS}) for model in models}
    plan = build_plan(SweepConfig.model_validate_json(json.dumps(raw)), {"world": world}, infos)
    paths = RunPaths(folder / name)
    paths.root.mkdir()
    claim(paths, plan)
    results = ResultStore(paths, plan)
    for unit in plan.units:
        for spec in unit.curves:
            results.add_curve(unit, answered(unit.unit_id, unit.sample.task, spec))
        results.add_sample(unit, sample_done(unit), worker="host:1", attempt=1)
    results.commit()
    publish(paths, stored_config(paths))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("questions")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    published(folder, "first", store, ["testbed", "other"], [1, 3])
    published(folder, "second", store, ["third"], [3])
    return connect(store)


def questions() -> list[str]:
    """The search strings of the page, in their order."""
    return re.findall(r"```\n(tags.*?)\n```", PAGE.read_text(), flags=re.DOTALL)


def found(client: MlflowClient, search: str, *experiments: str) -> list[tuple[str, ...]]:
    held = [client.get_experiment_by_name(name) for name in experiments]
    runs = client.search_runs([one.experiment_id for one in held if one is not None], search)
    keys = ("model", "task", "window")
    return sorted(tuple(run.data.params.get(key, "") for key in keys) for run in runs)


def test_the_five_questions_have_their_answers(client: MlflowClient) -> None:
    every = [(m, t, k) for m in ("other", "testbed") for t in ("sight", "sound") for k in "13"]
    sight, sound = ([one for one in every if one[1] == task] for task in ("sight", "sound"))
    expected = [
        sight,
        every,
        sound,
        [("testbed", "sight", "1"), ("testbed", "sight", "3")],
        [("other", "", "3"), ("testbed", "", "3")],
    ]
    asked = questions()
    assert len(asked) == 5
    for search, answer in zip(asked, expected, strict=True):
        assert found(client, search, "first") == answer, search


def test_two_sweeps_are_searched_together(client: MlflowClient) -> None:
    search = "tags.kind = 'cell' and tags.task = 'sight'"
    assert search in PAGE.read_text()
    models = {model for model, _, _ in found(client, search, "first", "second")}
    assert models == {"testbed", "other", "third"}


def test_a_category_pools_the_samples_of_its_tasks(client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name("second")
    assert experiment is not None
    (pooled,) = client.search_runs([experiment.experiment_id], "tags.kind = 'category'")
    assert pooled.data.tags["category"] == "one sense"
    assert pooled.data.metrics["n/video_to_question"] == 10
    points = client.get_metric_history(pooled.info.run_id, "dp/video_to_question")
    at = {point.step: point.value for point in points}
    assert at[1] == pytest.approx(-0.4, abs=0.02)  # half of them lose 80%
