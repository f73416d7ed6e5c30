"""cluster.yaml is what `ray up` takes, and a sweep runs on a cluster that is there already."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from avflow.orchestrator.cluster import most_gpus, start_ray
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


def test_gpus_that_the_autoscaler_may_add_are_known(tmp_path: Path) -> None:
    """Else a sweep on a fresh cluster, whose GPUs are yet to come, would run on the head's CPUs."""
    assert most_gpus(CLUSTER) == 8
    assert most_gpus(tmp_path / "none") == 0
    config = yaml.safe_load(CLUSTER.read_text())
    config["available_node_types"]["large"] = {"resources": {"GPU": 4}, "max_workers": 1}
    config["available_node_types"]["plain"] = {}
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert most_gpus(file) == 4 + 7, "eight machines in all"


def test_no_node_takes_rays_own_image() -> None:
    """It is Ubuntu 18.04, for which there is no PyTorch any more."""
    for kind in yaml.safe_load(CLUSTER.read_text())["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("ami-")


def test_what_travels_is_small_and_made_by_make_wheel() -> None:
    """Ray reads every file below a mount at each `ray up`; a checkout holds .venv and runs."""
    config = yaml.safe_load(CLUSTER.read_text())
    assert set(config["file_mounts"].values()) == {"dist", "configs", "~/.ray/auth_token"}
    made = subprocess.run(
        ["make", "--dry-run", "--always-make", "wheel"],
        cwd=CLUSTER.parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "--wheel-dir dist" in made
    assert "cp constraints.txt dist/" in made


def test_every_command_says_that_ray_asks_for_a_token() -> None:
    """Without the mode `ray status` on the head waits for ever, and a worker does not join."""
    config = yaml.safe_load(CLUSTER.read_text())
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert any("export RAY_AUTH_MODE=token" in command for command in config["setup_commands"])


@pytest.mark.parametrize("number", range(3))
def test_the_setup_commands_are_valid_bash(number: int) -> None:
    command = yaml.safe_load(CLUSTER.read_text())["setup_commands"][number]
    subprocess.run(["bash", "-n", "-c", command], check=True)


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
