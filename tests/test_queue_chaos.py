"""The queue under anything at any time: each curve ends in exactly one state, nothing twice."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from queued_units import failed, keys, unit

from avflow.orchestrator.policy import (
    NODE_LOST,
    Budgets,
    Decision,
    FailureKind,
    FailurePolicy,
)
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.unit import UnitState


class Chaos:
    """A cluster that does anything at any time, and the ledger of what it saw."""

    def __init__(self, seed: int, n_units: int) -> None:
        self.random = random.Random(seed)
        self.units = [
            unit(
                f"u{n}",
                self.random.randint(0, 4),
                cost=self.random.random(),
                model=self.random.choice("mn"),
                correct_only=self.random.random() < 0.7,
            )
            for n in range(n_units)
        ]
        policy = FailurePolicy(budgets=Budgets(breaker_units=self.random.choice((1, 5, 1000))))
        self.queue = WorkQueue(self.units, policy=policy, deadline_s=50.0)
        self.ends: Counter[tuple[str, str]] = Counter()
        self.streams: dict[str, list[tuple[str, list[str]]]] = {}  # worker -> (unit, keys to come)
        self.models: dict[str, str] = {}
        self.born = 0
        self.now = 0.0
        self.preemptions = 0

    def count(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            for curve in decision.curves:
                assert decision.unit is not None
                self.ends[decision.unit.unit_id, curve] += 1

    def feed(self) -> None:
        for model in "mn":
            while self.queue.due(model) and list(self.models.values()).count(model) < 2:
                self.models[f"w{self.born}"] = model
                self.streams[f"w{self.born}"] = []
                self.born += 1
        for worker, model in self.models.items():
            spec = self.queue.next_for(worker, model, self.now)
            if spec is not None:
                out = keys(spec)
                self.random.shuffle(out)
                self.streams[worker].append((spec.unit_id, out))
                assert len(self.streams[worker]) <= 2

    def kill(self, worker: str) -> None:
        del self.models[worker], self.streams[worker]

    def step(self) -> None:
        self.now += self.random.random() * 5
        self.feed()
        busy = [worker for worker, stream in self.streams.items() if stream]
        if not busy:
            return
        worker = self.random.choice(busy)
        unit_id, out = self.streams[worker][0]
        match self.random.choices(
            ("curve", "again", "late", "fail", "sample", "death", "timeout", "load"),
            (60, 5, 3, 6, 2, 6, 2, 0.2),
        )[0]:
            case "curve" if out:
                key = out.pop()
                self.ends[unit_id, key] += self.queue.on_curve(worker, unit_id, key, self.now)
            case "curve":
                self.end(worker, unit_id)
            case "again":  # a curve that has ended, or is not of this unit at all
                for key in [key for (of, key), n in self.ends.items() if of == unit_id and n]:
                    self.ends[unit_id, key] += self.queue.on_curve(worker, unit_id, key, self.now)
            case "late":
                assert not self.queue.on_curve("gone", unit_id, "x", self.now)
                if self.queue.on_failure("gone", failed(unit_id, None), self.now) is not None:
                    raise AssertionError("a stranger was believed")
            case "fail" if out:
                self.fail(worker, unit_id, out.pop())
            case "sample":
                self.fail(worker, unit_id, None)
                self.streams[worker].pop(0)
            case "death" | "timeout" | "load" as blow:
                self.strike(blow, worker)
            case _:
                pass

    def strike(self, blow: str, worker: str) -> None:
        """What happens to workers, not within a unit."""
        if blow == "load":
            self.queue.on_load_failure("m", FailureKind.LOAD, "can't load")
        elif blow == "timeout":
            self.now += 60
            for late in self.queue.overdue(self.now):
                self.kill(late)
                self.count(self.queue.on_timeout(late, self.now))
        else:
            fatal = (
                FailureKind.WORKER_DEATH,
                FailureKind.HOST_MEMORY,
                FailureKind.FATAL,
                FailureKind.NODE_LOST,
            )
            free = (FailureKind.PREEMPTION,) if self.preemptions < 30 else ()
            kind = self.random.choice(fatal + free)
            self.preemptions += kind is FailureKind.PREEMPTION
            self.kill(worker)
            self.count(self.queue.on_worker_death(worker, kind, "dead", self.now))

    def fail(self, worker: str, unit_id: str, curve: str | None) -> None:
        error, retryable = self.random.choice(
            (
                ("E", False),
                ("OSError", True),
                ("OutOfMemoryError", True),
                ("MemoryError", True),
                (NODE_LOST, True),
            )
        )
        failure = failed(unit_id, curve, error=error, retryable=retryable)
        decision = self.queue.on_failure(worker, failure, self.now)
        assert decision is not None
        self.count([decision])

    def end(self, worker: str, unit_id: str) -> None:
        self.streams[worker].pop(0)
        correct = self.random.random() < 0.7
        decisions = self.queue.on_sample_done(worker, unit_id, correct=correct, now=self.now)
        assert decisions is not None
        self.count(decisions)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), n_units=st.integers(0, 12), drain=st.booleans())
def test_random_interleavings_end_and_each_curve_ends_once(
    seed: int, n_units: int, drain: bool
) -> None:
    chaos = Chaos(seed, n_units)
    for step in range(20_000):
        if chaos.queue.finished:
            break
        if drain and step == 40:
            chaos.queue.drain()
        chaos.step()
    assert chaos.queue.finished, "it never ends"
    assert max(chaos.ends.values(), default=0) <= 1, "a curve ended twice"

    counts = chaos.queue.counts()
    planned = sum(len(spec.curves) for spec in chaos.units)
    ended = counts.curves_done + counts.curves_failed + counts.curves_skipped
    assert ended + counts.curves_missing == planned, "a curve is lost"
    assert counts.curves_done + counts.curves_failed == sum(chaos.ends.values())
    assert counts.leased == 0
    assert counts.done + counts.failed + counts.abandoned + counts.pending == n_units
    if not drain:
        assert counts.pending == 0
    for spec in chaos.units:
        if chaos.queue.state(spec.unit_id) in (UnitState.DONE, UnitState.FAILED):
            kinds = {curve.key for curve in spec.curves if curve.correct_only}
            stored = {
                key for (unit_id, key), n in chaos.ends.items() if unit_id == spec.unit_id and n
            }
            assert spec.wanted - stored <= kinds  # what else ended was skipped
