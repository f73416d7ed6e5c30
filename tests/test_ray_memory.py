"""Ray ends what fills a machine's memory: for decoding, and does not go on trying by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import bare_cluster

DRIVER = """
import sys, time
from pathlib import Path
import ray
from avflow.orchestrator.cluster import start_ray
from avflow.workers import actor
sys.path.insert(0, {tests!r})
from faulty import SPEC, unit

def decode(unit, spec):
    time.sleep(60)

start_ray({address!r})
actor.decode_unit = decode
try:
    ray.get(actor.decode_ahead(unit("u0", Path({root!r})), SPEC), timeout=20)
except ray.exceptions.RayError as error:
    print(type(error).__name__)
"""


def ends_with(root: Path, address: str | None) -> str:
    code = DRIVER.format(tests=str(Path(__file__).parent), address=address, root=str(root))
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(autouse=True)
def _memory_is_always_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)  # of Ray in this process
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")


@pytest.mark.slow
@pytest.mark.ray
def test_decoding_that_fills_the_memory_is_not_tried_for_ever(tmp_path: Path) -> None:
    assert ends_with(tmp_path, None) == "OutOfMemoryError"


@pytest.mark.slow
@pytest.mark.ray
def test_so_it_is_on_a_cluster_that_was_joined(tmp_path: Path) -> None:
    with bare_cluster() as cluster:
        cluster.add_node(num_cpus=1)
        assert ends_with(tmp_path, cluster.address) == "OutOfMemoryError"
