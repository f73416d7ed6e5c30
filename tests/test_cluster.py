"""cluster.yaml is what `ray up` takes, and a sweep runs on a cluster that is there already."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.results import status

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def test_cluster_yaml_passes_rays_own_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(prepare_config(config))


def test_the_head_has_no_gpu_and_workers_do() -> None:
    types = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    assert types["head"]["resources"]["GPU"] == 0
    assert types["gpu"]["resources"]["GPU"] >= 1


@pytest.mark.ray
def test_a_cluster_that_is_there_is_not_joined_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is '10\.0\.0\.1:6379': join that cluster"):
        start_ray(None)
    assert not asked
    start_ray("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    start_ray(None)
    assert [options["address"] for options in asked] == ["auto", "local"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_joins_a_running_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    demo, run = CLUSTER.parent / "configs" / "demo.yaml", tmp_path / "run"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        words = ["sweep", demo, "--run", run, "--limit", "1", "--workers", "2"]
        command = [sys.executable, "-m", "avflow", *words, "--address", cluster.address]
        subprocess.run(list(map(str, command)), check=True, timeout=300)
    finally:
        cluster.shutdown()
    now = status(run)
    assert (now.samples_done, now.samples_failed, now.driver) == (9, 0, None)
