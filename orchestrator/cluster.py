"""Ray's own side: start it on this machine or join a cluster, and see what room there is.

The one module that touches Ray's private parts.
"""

import logging
import os
import secrets
from pathlib import Path
from typing import Any

import yaml

from avflow.orchestrator.errors import ConfigError, SweepAborted

_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` puts it, on the head
_TAIL_LINES = 40
_TAIL_BYTES = 16_384
_TAIL_PATIENCE_S = 10.0


def start_ray(address: str | None) -> bool:
    """Connect to Ray; False when this process is connected already (and should stay so).

    None starts it on this machine: on the loopback interface, with a token of its own, so that
    nobody on the network can run code through it. A cluster is joined with token authentication
    unless RAY_AUTH_MODE says otherwise. Raises ConfigError when it can't be reached, or when one is
    meant (RAY_ADDRESS) and none was asked for.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Else it decodes again for ever what fills a machine's memory, until the unit's deadline: how
    # often is for `policy` to say. Ray asks the process that submits, which is this one.
    os.environ.setdefault("RAY_task_oom_retries", "0")
    import ray

    if ray.is_initialized():
        return False
    if address is None and (meant := os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            f"RAY_ADDRESS is {meant!r}: join that cluster with `--address auto`, or unset it to "
            "run on this machine alone"
        )
    if address is None:
        _start_here()
        return True
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"can't join a Ray cluster at {address!r}: {error}. Give the address that `ray start` "
            "printed; export RAY_AUTH_MODE=token and the token of the cluster, or "
            "RAY_AUTH_MODE=disabled where it was started without one"
        ) from error
    return True


def _start_here() -> None:
    # As on macOS and Windows, nodes then listen on 127.0.0.1 alone.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # When memory runs out: what may be repeated first (decoding), not the models with it.
    os.environ.setdefault("RAY_worker_killing_policy_by_group", "true")
    import ray
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    # Both were read when ray was imported, which may be before the lines above.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    try:
        ray.init(
            address="local",  # not one that happens to run here
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises just that when its processes do not come up
        raise SweepAborted(
            f"Ray does not start on this machine: {error} It waits 30 s, which may be too short on "
            "a machine that is busy: try again, or run with `--executor local`"
        ) from error


def living_nodes() -> dict[str, dict[str, float]]:
    """Each node that Ray holds for alive, and its resources."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray leaves it so
    return {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}


def cluster_room(avoided: frozenset[str] = frozenset()) -> tuple[tuple[int, ...], int]:
    """GPUs of each living node but the `avoided`, and their CPUs together.

    What an autoscaler can add counts as one node more.
    """
    from ray._private.state import state

    nodes = [room for node, room in living_nodes().items() if node not in avoided]
    gpus = [int(node["GPU"]) for node in nodes if node.get("GPU")]
    later = state.get_max_resources_from_cluster_config() or {}  # KubeRay's alone
    most = max(int(later.get("GPU", 0)), _launched_gpus())
    if (more := most - sum(gpus)) > 0:
        gpus.append(more)
    return tuple(gpus), int(sum(node.get("CPU", 0) for node in nodes))


def _launched_gpus() -> int:
    import ray

    address = ray.get_runtime_context().gcs_address
    if address.startswith("127."):  # Ray of this machine's own, which nothing adds to
        return 0
    return most_gpus(_BOOTSTRAP.expanduser())


def most_gpus(bootstrap: Path) -> int:
    """GPUs that the autoscaler of `ray up` may have at a time; 0 without its file.

    Ray itself does not say. The file lies on the cluster's head, where the driver runs.
    """
    if not bootstrap.is_file():
        return 0
    config = yaml.safe_load(bootstrap.read_text(encoding="utf-8"))
    room, gpus = int(config["max_workers"]), 0
    kinds = [
        (int((kind.get("resources") or {}).get("GPU", 0)), int(kind.get("max_workers", room)))
        for kind in config["available_node_types"].values()
    ]
    for each, count in sorted(kinds, reverse=True):
        taken = min(room, count)
        gpus, room = gpus + each * taken, room - taken
    return gpus


def actor_place(actor: Any) -> tuple[str, int]:
    """(node, pid) of an actor, dead or alive; ("", 0) while it waits for room."""
    from ray._private.state import state

    found = state.actor_table(actor._ray_actor_id.hex()) or {}
    address = found.get("Address", {})
    pid = int(found.get("Pid", 0))
    return (str(address["NodeID"]), pid) if pid and address.get("IPAddress") else ("", 0)


def actor_is_dead(actor: Any) -> bool:
    """Whether Ray is sure of it: at once when the process died, after some 15 s when its node did
    so without a word."""
    from ray._private.state import state

    found = state.actor_table(actor._ray_actor_id.hex()) or {}
    return str(found.get("State", "DEAD")) == "DEAD"


def node_is_gone(node: str) -> bool:
    """Whether Ray has given the node up (or never knew it)."""
    return node not in living_nodes()


def log_tail(node: str, pid: int) -> str:
    """The end of what a worker process wrote, read on its node; "" where that can't be had."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not (node and pid):
        return ""
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    read = ray.remote(_log_tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return str(ray.get(read.remote(pid), timeout=_TAIL_PATIENCE_S))
    except ray.exceptions.RayError:  # the node has gone too, or does not answer
        return ""


def _log_tail(pid: int) -> str:
    """On the node. Ray's own marks (`:actor_name:...`) are left out."""
    from pathlib import Path

    from ray._private import worker

    node: Any = worker._global_node
    text = ""
    for kind in ("out", "err"):
        for path in sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.{kind}")):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
            kept = [line for line in lines if not line.startswith(":")][-_TAIL_LINES:]
            text += "".join(f"{line}\n" for line in kept)
    return text


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that are being taken away."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())
