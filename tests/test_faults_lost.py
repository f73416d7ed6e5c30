"""A machine that goes without a word, and what lay on it: nobody's fault, and seen in seconds.

Real Ray nodes, killed: one holds the worker, another decodes. The first Ray knows of a lost node
is that it does not answer, some 15 s later that it is gone.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import coordinate, faulty_worker, once, unit
from ray_cluster import bare_cluster

from avflow.datasets.media import MediaSpec
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.policy import Action, Budgets, FailureKind
from avflow.orchestrator.progress import Silent, Snapshot
from avflow.orchestrator.ray_executor import RayExecutor
from avflow.workers.decode import Decoded
from avflow.workers.protocol import UnitSpec

pytestmark = [pytest.mark.slow, pytest.mark.ray]
DEADLINE_S = 300.0  # nobody waits for it
SEEN_S = 120.0  # 20 to 40 on a quiet machine


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs nothing, a node with a GPU that can't decode, and one that only decodes."""
    with bare_cluster() as made:
        made.gpu = made.add_node(num_cpus=0, num_gpus=1)
        made.cpu = made.add_node(num_cpus=2)
        start_ray(made.address)
        yield made


class Strike(Silent):
    """Does something to the cluster once it is time, on the driver's own thread."""

    def __init__(self, due: Callable[[], bool], blow: Callable[[], None]) -> None:
        self._due, self._blow = due, blow
        self.at: float | None = None

    def show(self, snapshot: Snapshot, now: float) -> None:
        if self.at is None and self._due():
            self._blow()
            self.at = time.monotonic()


def slow_decoding() -> Callable[[UnitSpec, MediaSpec], Decoded]:
    """Media that Ray keeps in its object store. In a function, so that Ray sends it along."""

    def decode(unit: UnitSpec, spec: MediaSpec) -> Decoded:
        root = Path(unit.data_root)
        (root / f"{unit.unit_id}.begun").touch()
        while (root / "hangs").exists():
            time.sleep(0.1)
        (root / f"{unit.unit_id}.ended").touch()
        media: Any = (np.zeros(1 << 22, np.uint8),)
        return Decoded(unit_id=unit.unit_id, media=media, seconds=0.0)

    return decode


def there(root: Path, pattern: str, count: int) -> Callable[[], bool]:
    return lambda: len(list(root.glob(pattern))) >= count


def run(root: Path, strike: Strike, budgets: Budgets | None = None, fault: str = "") -> list[Any]:
    """Four units; returns the failed attempts."""
    units = [unit(f"u{n}", root, fault) for n in range(4)]
    executor = RayExecutor(workers=1, threads=1, worker_class=faulty_worker())
    outcome, notes = coordinate(
        units, executor, deadline_s=DEADLINE_S, progress=strike, budgets=budgets
    )
    assert strike.at is not None
    assert time.monotonic() - strike.at < SEEN_S, "it was seen by the deadline alone"
    assert notes.curves == once([one.unit_id for one in units])
    assert (outcome.failures, outcome.given_up) == (0, {})
    return notes.failures


@pytest.mark.parametrize("retries", [1, 0])
def test_a_node_that_dies_while_it_decodes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    monkeypatch.setattr("avflow.workers.actor.decode_unit", slow_decoding())
    monkeypatch.setattr("avflow.workers.actor.DECODE_RETRIES", retries)
    (tmp_path / "hangs").touch()

    def blow() -> None:
        (tmp_path / "hangs").unlink()
        cluster.remove_node(cluster.cpu, allow_graceful=False)
        cluster.add_node(num_cpus=2)

    failures = run(tmp_path, Strike(there(tmp_path, "*.begun", 2), blow), Budgets(transient=1))
    if retries:
        assert failures == [], "Ray decodes again, and nobody notices"
    else:  # what is left when Ray has had enough
        assert {(d.kind, d.action, d.failure.stage) for d in failures} == {
            (FailureKind.NODE_LOST, Action.RETRY, "decode")
        }


def test_media_that_were_lost_before_the_worker_had_them(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.workers.actor.decode_unit", slow_decoding())
    (tmp_path / "hangs").touch()
    raylet = cluster.gpu.all_processes["raylet"][0].process.pid

    def blow() -> None:
        os.kill(raylet, signal.SIGSTOP)  # it fetches nothing
        (tmp_path / "hangs").unlink()
        while not there(tmp_path, "*.ended", 2)():
            time.sleep(0.1)
        time.sleep(1)
        cluster.remove_node(cluster.cpu, allow_graceful=False)
        os.kill(raylet, signal.SIGCONT)
        cluster.add_node(num_cpus=2)

    assert run(tmp_path, Strike(there(tmp_path, "*.begun", 2), blow)) == []


def test_a_worker_that_went_with_its_node(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.workers.actor.decode_unit", slow_decoding())

    def blow() -> None:
        cluster.remove_node(cluster.gpu, allow_graceful=False)
        cluster.add_node(num_cpus=0, num_gpus=1)

    strike = Strike(there(tmp_path, "*.ended", 1), blow)
    budgets = Budgets(worker_death=1, fatal=1, timeout=1, load=1)
    failures = run(tmp_path, strike, budgets, "slow@4")
    assert [(d.kind, d.action) for d in failures] == [(FailureKind.NODE_LOST, Action.RETRY)]
