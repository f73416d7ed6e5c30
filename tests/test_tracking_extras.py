"""MLflow of interventions and probes: a run a task, with numbers that one can add up by hand."""

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from test_extras_results import stored

from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.run_folder import stored_config
from avflow.orchestrator.tracking import connect, publish


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = RunPaths(stored(tmp_path_factory.mktemp("extras"), whole=True))
    publish(paths, stored_config(paths))
    return paths


@pytest.fixture(scope="module")
def client(paths: RunPaths) -> MlflowClient:
    return connect(f"sqlite:///{paths.mlflow}")


def found(client: MlflowClient, search: str) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], search)
    return {run.info.run_name: run for run in runs}


def test_answers_are_a_run_a_task_a_category_and_a_data_set(client: MlflowClient) -> None:
    runs = found(client, "tags.kind = 'accuracy'")
    assert set(runs) == {
        "sight · accuracy",
        "sound · accuracy",
        "one sense (category) · accuracy",
        "world · accuracy",
    }
    sight = runs["sight · accuracy"].data
    assert sight.tags["task"] == "sight"
    assert sight.tags["category"] == "one sense"
    assert sight.params["layers/mask/late"] == "2-3"
    assert sight.params["blocks/mask/late"] == "video_to_last"
    expected = {"accuracy": 1.0, "n": 2, "accuracy/mask/late": 0.5, "change/mask/late": -0.5,
                "n/mask/late": 2, "change_low/mask/late": -1.0, "change_high/mask/late": 0.0,
                "prefill_ms/discard/full": 1500.0, "token_layers/discard/full": 100.0}  # fmt: skip
    assert {name: sight.metrics[name] for name in expected} == pytest.approx(expected)
    whole = runs["world · accuracy"].data  # as Table 1 pools
    assert whole.metrics["accuracy/mask/late"] == pytest.approx(2 / 3)
    assert whole.metrics["n/mask/late"] == 3
    assert found(client, "tags.kind = 'accuracy' and tags.of = 'data set'").keys() == {
        "world · accuracy"
    }


def test_tasks_are_found_by_what_a_mask_costs(client: MlflowClient) -> None:
    search = "tags.kind = 'accuracy' and tags.of = 'task' and metrics.`change/mask/late` < -0.1"
    assert set(found(client, search)) == {"sight · accuracy"}


def test_probes_are_a_run_a_task_with_a_point_a_layer(client: MlflowClient) -> None:
    runs = found(client, "tags.kind = 'probe'")
    assert set(runs) == {"sight · probes", "sound · probes"}
    sight = runs["sight · probes"]
    (point,) = client.get_metric_history(sight.info.run_id, "attention/video")
    assert (point.step, point.value) == (0, 0.125)  # the mean of 0 and 0.25
    assert sight.data.metrics["peak_attention/last"] == 0.5
    assert sight.data.metrics["n/attention"] == 2
    sinks = client.get_metric_history(sight.info.run_id, "sinks")
    assert sorted((p.step, p.value) for p in sinks) == [(1, 0.0), (2, 1.0)]


def test_publishing_again_changes_nothing(paths: RunPaths) -> None:
    again = publish(paths, stored_config(paths))
    assert (again.created, again.replaced) == (0, 0)
