"""Real sweeps on several Ray nodes: what dies, hangs or goes leaves the same cells to the bit.

Each fault strikes in the middle, when the first results are stored; workers are found by the
process that `samples` names, nodes are Ray's own raylets.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal
from ray_cluster import bare_cluster
from tiny_sweep import write_sweep

from avflow.orchestrator.parts import find_parts
from avflow.orchestrator.paths import RunPaths, TableName
from avflow.orchestrator.results import read, status

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SAMPLES = 40  # enough for a quick machine to be still at work when the fault is over
# Commits every unit, so that a fault finds something stored; MLflow has tests of its own.
DRIVER = """
import sys
from avflow.orchestrator import store, sweep
store.COMMIT_UNITS = 1
sweep._Tracker.request = sweep._Tracker.finish = lambda self: None
from avflow.orchestrator.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    write_sweep(
        folder,
        samples_per_task=SAMPLES // 2,
        executor="ray",
        workers=2,
        unit_deadline_s=30,  # a busy machine is no fault
        decode_timeout_s=20,
    )
    assert drive(folder, "undisturbed", "--executor", "local").wait() == 0
    return folder


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and two nodes."""
    with bare_cluster() as made:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made


def drive(place: Path, run: str, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", DRIVER, "sweep", place / "sweep.yaml", "--run", place / run]
    return subprocess.Popen([*map(str, command), *words], env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows(run: Path, table: TableName) -> int:
    """With doubles, if there are any."""
    parts = find_parts(RunPaths(run).table(table))
    return sum(pl.read_parquet(part, hive_partitioning=False).height for part in parts)


def until_stored(run: Path, samples: int, driver: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300  # the machine may be busy
    while rows(run, "samples") < samples:
        assert time.monotonic() < until
        assert driver.poll() is None, "it ended before the fault"
        time.sleep(0.05)


def a_worker(run: Path) -> int:
    """The process of a worker that lives."""
    found = read(run, "samples").sort("finished_at")["worker"].reverse().to_list()
    pids = [int(where.rpartition(":")[2]) for where in found]
    return next(pid for pid in pids if psutil.pid_exists(pid))


def kill_a_worker(cluster: Any, run: Path) -> None:
    os.kill(a_worker(run), signal.SIGKILL)


def hang_a_worker(cluster: Any, run: Path) -> None:
    os.kill(a_worker(run), signal.SIGSTOP)


def slow_a_worker(cluster: Any, run: Path) -> None:
    worker = a_worker(run)
    for _ in range(3):
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.8)
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.2)


def kill_a_node(cluster: Any, run: Path) -> None:
    node = sorted(cluster.worker_nodes, key=lambda one: str(one.node_id))[0]
    cluster.remove_node(node, allow_graceful=False)


def change_nodes(cluster: Any, run: Path) -> None:
    kill_a_node(cluster, run)
    cluster.add_node(num_cpus=1)


Fault = Callable[[Any, Path], None]


# A worker holds two samples, one of which is recorded; both workers may sit on the node that goes.
# Media that go with it are decoded again.
@pytest.mark.parametrize(
    ("fault", "blamed", "again"),
    [
        (kill_a_worker, 1, 2),
        (hang_a_worker, 1, 2),
        (slow_a_worker, 0, 0),
        (kill_a_node, 2, 4),
        (change_nodes, 2, 4),
    ],
)
def test_a_fault_in_the_middle(
    cluster: Any, place: Path, fault: Fault, blamed: int, again: int
) -> None:
    run = place / fault.__name__
    driver = drive(place, run.name, "--address", cluster.address)
    until_stored(run, 3, driver)
    fault(cluster, run)
    assert driver.wait(timeout=240) == 0
    check(run, place / "undisturbed", blamed, again)


def test_a_driver_that_is_killed(cluster: Any, place: Path) -> None:
    run = place / "driver"
    driver = drive(place, run.name, "--address", cluster.address)
    until_stored(run, 3, driver)
    driver.kill()
    driver.wait()
    assert drive(place, run.name, "--address", cluster.address).wait(timeout=240) == 0
    check(run, place / "undisturbed", 0, 0)


def test_an_object_store_that_others_have_filled(cluster: Any, place: Path) -> None:
    small = 80 * 1024 * 1024
    cluster.add_node(num_cpus=1, object_store_memory=small, resources={"small": 1})
    for node in list(cluster.worker_nodes)[:]:
        if "small" not in str(node._ray_params.resources):
            cluster.remove_node(node)
    code = (
        f"import ray, numpy, time; ray.init({cluster.address!r}, logging_level=40)\n"
        "@ray.remote(resources={'small': 0.1}, num_cpus=0)\n"
        "class Hoarder:\n"
        "    def fill(self):\n"
        "        self.held = [ray.put(numpy.zeros(1 << 22, numpy.uint8)) for _ in range(40)]\n"
        "        self.pinned = [ray.get(one) for one in self.held[-17:]]\n"
        "hoarder = Hoarder.remote(); ray.get(hoarder.fill.remote())\n"
        "print('full', flush=True); time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as hoarder:
        assert hoarder.stdout is not None
        assert hoarder.stdout.readline() == b"full\n"
        try:
            driver = drive(place, "hoarded", "--address", cluster.address)
            assert driver.wait(timeout=240) == 0
        finally:
            hoarder.kill()
    check(place / "hoarded", place / "undisturbed", 0, 0)


def check(run: Path, undisturbed: Path, blamed: int, again: int) -> None:
    """Nothing lost, nothing stored twice, nothing tried more often than the fault explains."""
    now = status(run)
    assert (now.samples_done, now.samples_failed) == (SAMPLES, 0)
    ours, theirs = (read(one).sort("job_id", "sample_id") for one in (run, undisturbed))
    assert_frame_equal(ours, theirs, check_exact=True)
    assert rows(run, "cells") == theirs.height
    assert rows(run, "samples") == SAMPLES, "a sample ran to its end twice"
    failures = read(run, "failures")
    assert not failures["terminal"].any()
    found = failures.filter(pl.col("unit_id").is_not_null())
    assert found.height <= blamed, found
    assert read(run, "samples").filter(pl.col("attempt") > 1).height <= again
