"""Ray's own side: start it on this machine or join a cluster, and see what room there is.

The one module that touches Ray's private parts.
"""

import logging
import os
import secrets

from avflow.orchestrator.errors import ConfigError, SweepAborted


def start_ray(address: str | None) -> bool:
    """Connect to Ray; False when this process is connected already (and should stay so).

    None starts it on this machine: on the loopback interface, with a token of its own, so that
    nobody on the network can run code through it. A cluster is joined with token authentication
    unless RAY_AUTH_MODE says otherwise. Raises ConfigError when it can't be reached.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        return False
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
    import ray
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    # Both were read when ray was imported, which may be before the lines above.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    try:
        ray.init(
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


def cluster_room() -> tuple[int, int]:
    """(GPUs, CPUs) the cluster has; GPUs also those that an autoscaler can add."""
    import ray
    from ray._private.state import state

    later = state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(max(now.get("GPU", 0), later.get("GPU", 0))), int(now.get("CPU", 1))


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that are being taken away."""
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())
