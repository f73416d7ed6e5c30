"""Several Ray nodes on this machine: one that is broken, one that goes, one that comes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import KEYS, coordinate, faulty_worker, once, ran, unit
from ray_cluster import bare_cluster

from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.nodes import DEATHS_IN_A_ROW, NodeHealth
from avflow.orchestrator.policy import FailureKind
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.ray_executor import RayExecutor


def test_a_machine_is_broken_when_nothing_passes_there() -> None:
    health = NodeHealth()
    assert not any(health.died("a", "poison") for _ in range(10)), "one sample, whatever it does"
    health.passed("a")
    assert [health.died("a", unit) for unit in "xyz"] == [False, False, True]
    health = NodeHealth()
    for unit_id in "abcdefgh":
        assert not health.died("a", unit_id)
        health.passed("a")
    assert [health.died("b", None) for _ in range(DEATHS_IN_A_ROW)] == [False, False, True]
    assert not any(health.died("", None) for _ in range(10)), "nobody knows where"


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head that runs nothing, and two nodes; the test's own process is the driver."""
    with bare_cluster() as made:
        for _ in range(2):
            made.add_node(num_cpus=2, num_gpus=1)
        start_ray(made.address)
        yield made


def workers() -> RayExecutor:
    return RayExecutor(workers=None, threads=1, worker_class=faulty_worker())


@pytest.mark.slow
@pytest.mark.ray
def test_a_broken_node_is_noticed_and_not_fed(cluster: Any, tmp_path: Path) -> None:
    broken = sorted(node.node_id for node in cluster.worker_nodes)[0]
    (tmp_path / "broken-node").write_text(broken)
    units = [unit(f"u{i}", tmp_path, "slow@0.3") for i in range(20)]
    said = Said()
    outcome, notes = coordinate(units, workers(), progress=said)
    assert notes.curves == once([one.unit_id for one in units])
    assert (outcome.failures, outcome.given_up) == (0, {})
    assert [line for line in said.lines if broken in line], "a person is told"
    deaths = Counter(d.unit.unit_id for d in notes.failures if d.unit)
    assert len(deaths) == DEATHS_IN_A_ROW
    assert max(deaths.values()) == 1, "what died there is tried elsewhere"


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_on_which_nothing_loads_costs_a_place_and_not_the_model(
    cluster: Any, tmp_path: Path
) -> None:
    broken = sorted(node.node_id for node in cluster.worker_nodes)[0]
    units = [unit(f"u{i}", tmp_path, "slow@1") for i in range(8)]
    outcome, notes = coordinate(units, workers(), path=f"not on {broken}")
    assert notes.curves == once([one.unit_id for one in units])
    assert (outcome.failures, outcome.given_up) == (0, {})
    assert {d.kind for d in notes.failures} == {FailureKind.LOAD}
    assert len(notes.failures) <= DEATHS_IN_A_ROW + 1


@pytest.mark.slow
@pytest.mark.ray
def test_poison_takes_its_tries_and_no_machine_with_it(cluster: Any, tmp_path: Path) -> None:
    units = [unit("u0", tmp_path, "dies@2"), *(unit(f"u{i}", tmp_path) for i in range(1, 6))]
    outcome, notes = coordinate(units, workers())
    assert notes.curves == once([one.unit_id for one in units], but=(("u0", KEYS[2]),))
    assert ran(tmp_path, "u0")[KEYS[2]] == 3
    (last,) = [decision for decision in notes.failures if decision.terminal]
    assert "SIGKILL" in last.failure.message or "died" in last.failure.message
    assert "The end of the worker's log" in last.failure.traceback
    assert "takes u0" in last.failure.traceback.split("The end of the worker's log")[1]
    assert outcome.failures == 1
