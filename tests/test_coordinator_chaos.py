"""The coordinator among machines that do anything at any time, and one that breaks in a way that
looks like the model's fault."""

import os
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty import KEYS, Notes, once, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import Clock, Machine, Machines

from avflow.orchestrator.coordinator import AWAY_S, Coordinator, Outcome, Patience, Placement
from avflow.orchestrator.executors import ExecutorEvent
from avflow.orchestrator.policy import Action, FailurePolicy
from avflow.orchestrator.progress import Silent, Snapshot
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.unit import UnitState
from avflow.workers.protocol import UnitSpec

FEW = 20_000


class Impatient(Silent):
    """Ends a sweep that goes on for ever."""

    def __init__(self) -> None:
        self.left = FEW

    def show(self, snapshot: Snapshot, now: float) -> None:
        self.left -= 1
        assert self.left, "it never ends"


def run(
    units: list[UnitSpec], machines: Machines, notes: Notes, *, deadline_s: float | None = None
) -> tuple[Outcome, WorkQueue]:
    queue = WorkQueue(units, policy=FailurePolicy(), deadline_s=deadline_s)
    models = sorted({one.model for one in units})
    coordinator = Coordinator(
        queue=queue,
        units={one.unit_id: one for one in units},
        # The machines ask a spec for its name alone.
        models={m: Placement(spec=SimpleNamespace(name=m), gpus=1) for m in models},  # type: ignore[arg-type]
        executor=machines,
        recorder=notes,
        progress=Impatient(),
        patience=Patience(load_s=60),
    )
    with pytest.MonkeyPatch.context() as patched:
        machines.clock.stand_in(patched)
        return coordinator.run(), queue


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_machines_do_each_curve_ends_once(seed: int) -> None:
    rng = random.Random(seed)
    cluster = {
        f"n{i}": Machine(places=rng.randint(1, 3), load_s=rng.uniform(0, 20))
        for i in range(rng.randint(1, 3))
    }
    if len(cluster) > 1 and rng.random() < 0.3:
        cluster["n0"] = replace(cluster["n0"], **rng.choice(({"load_s": None}, {"kills": True})))
    units = [unit(f"u{i}", Path(), model=rng.choice("mn")) for i in range(rng.randint(1, 25))]
    notes = Notes()
    machines = Machines(Clock(), cluster, rng=rng, faults=60)
    outcome, queue = run(units, machines, notes, deadline_s=60)
    ends = notes.curves + Counter(
        (decision.failure.unit_id, curve)
        for decision in notes.failures
        for curve in decision.curves
    )
    assert max(ends.values(), default=0) <= 1, "a curve ended twice"
    for one in units:
        if one.model not in outcome.given_up:
            assert queue.state(one.unit_id) in (UnitState.DONE, UnitState.FAILED)
            assert all(ends[one.unit_id, key] for key in KEYS), "a curve is lost"


def test_a_machine_that_says_no_at_once_waits_for_those_that_still_load() -> None:
    """Half of the workers fail within a second; the others read weights for a minute."""
    cluster = {"good": Machine(places=4, load_s=50), "broken": Machine(places=4, load_s=None)}
    machines, notes = Machines(Clock(), cluster), Notes()
    units = [unit(f"u{i}", Path(), model=model) for i, model in enumerate("m" * 12 + "n" * 12)]
    outcome, _ = run(units, machines, notes)
    assert (outcome.failures, outcome.given_up) == (0, {})
    assert notes.curves == once([one.unit_id for one in units])
    assert machines.avoided == {"broken"}, "where one model loads and another machine does not"
    assert machines.started.count(("m", "broken")) == 4
    assert ("n", "broken") not in machines.started, "no other model is spent on it"


def test_a_model_that_loads_nowhere_is_given_up_by_its_last_worker() -> None:
    cluster = {f"n{i}": Machine(places=4, load_s=None) for i in range(2)}
    machines, notes = Machines(Clock(), cluster), Notes()
    outcome, _ = run([unit(f"u{i}", Path()) for i in range(20)], machines, notes)
    assert list(outcome.given_up) == ["m"]
    actions = [decision.action for decision in notes.failures]
    assert actions == [Action.RETRY] * 7 + [Action.ABORT_MODEL]
    assert not machines.avoided, "no machine is at fault"


class Stopped(Machines):
    """The driver is stopped (Ctrl-Z, a frozen machine) in its n-th poll, and goes on later."""

    def __init__(self, clock: Clock, cluster: dict[str, Machine], *, at: int, for_s: float) -> None:
        super().__init__(clock, cluster)
        self.polls, self.stopped_at, self.for_s = 0, at, for_s

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        self.polls += 1
        if self.polls == self.stopped_at:
            self.clock.at += self.for_s
            return []
        return super().poll(timeout_s)


@pytest.mark.parametrize("at", [2, 8, 20])
def test_while_the_driver_is_stopped_no_worker_is_late(at: int) -> None:
    cluster = {"n0": Machine(places=2, load_s=1.0)}
    machines, notes = Stopped(Clock(), cluster, at=at, for_s=3600.0), Notes()
    units = [unit(f"u{i}", Path()) for i in range(8)]
    outcome, _ = run(units, machines, notes, deadline_s=10 * AWAY_S)
    assert outcome == Outcome(signal=None, failures=0, given_up={})
    assert not notes.failures
    assert len(machines.started) == 2


class Failing(Machines):
    """The cluster itself fails, once some curves came out."""

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        if self.clock.at > 5:
            raise ConnectionError("the cluster is gone")
        return super().poll(timeout_s)


def test_what_came_out_is_committed_when_the_cluster_fails() -> None:
    machines, notes = Failing(Clock(), {"n0": Machine(places=2)}), Notes()
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        run([unit(f"u{i}", Path()) for i in range(20)], machines, notes)
    assert notes.curves
    assert notes.commits == 1


class Struck(Notes):
    """Ctrl-C strikes while the last rows are written."""

    def commit(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        super().commit()


def test_a_first_signal_during_the_last_commit_costs_no_rows() -> None:
    machines, notes = Machines(Clock(), {"n0": Machine()}), Struck()
    outcome, _ = run([unit("u0", Path())], machines, notes)
    assert (notes.commits, outcome.signal) == (1, signal.SIGINT)
