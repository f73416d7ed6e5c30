"""Ray clusters of several nodes on this machine, for the tests that break them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def bare_cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` whose head runs nothing; `add_node` gives it room.

    This process is not connected to it (`start_ray(cluster.address)` does that), nor to any other
    Ray; what it is connected to at the end, it leaves. Tokens are off within.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_MODE", "disabled")
        patched.delenv("RAY_AUTH_TOKEN", raising=False)
        import ray
        from ray.cluster_utils import Cluster

        if ray.is_initialized():
            ray.shutdown()  # of another module's tests
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
