"""One unit's life: which of its curves are missing, what was tried, what it may be blamed for.

A curve here is anything with a key: an intervention or a probe has the same life.

unit:   PENDING -> LEASED -> DONE       every curve stored, or skipped (wrong baseline)
           ^         |   -> FAILED     a curve, or the whole sample, is quarantined
           +--retry--+   -> ABANDONED  its model was given up; a later run takes it up
curve:  missing -> done | failed | skipped, once and for ever
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum

from avflow.orchestrator.policy import Action, Decision, FailureKind, FailurePolicy
from avflow.workers.protocol import Stage, UnitFailure, UnitSpec


class UnitState(StrEnum):
    """Where a unit stands."""

    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(slots=True, eq=False)
class Unit:
    """Mutable, itself alone equal to itself; the queue owns it."""

    spec: UnitSpec
    policy: FailurePolicy
    missing: set[str] = field(init=False)
    state: UnitState = UnitState.PENDING
    leases: int = 0
    splits: int = 0
    alone: bool = False  # after host memory ran out: nothing beside it in its worker
    done: int = 0
    failed: int = 0
    skipped: int = 0
    died_on: set[str] = field(default_factory=set)  # machines
    _sample_failed: bool = False
    _sample_done: bool = False
    _wanted: frozenset[str] = frozenset()  # of the present lease
    _waiting: set[str] = field(default_factory=set)  # failed in this lease, to be tried again
    _deaths: int = 0  # since the last quarantine
    _silent_deaths: int = 0  # since the last curve came out
    _tries: Counter[tuple[str | None, FailureKind]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.missing = set(self.spec.wanted)

    def lease(self) -> UnitSpec:
        """What to hand to a worker now."""
        self.state = UnitState.LEASED
        self.leases += 1
        self._waiting.clear()
        due = [work.key for work in self.spec.work if work.key in self.missing]
        # Deaths are blamed on a suspicion: after two of them, what kills has to kill alone.
        self._wanted = frozenset(due[:1] if self.policy.isolates(self._deaths) else due)
        budget = max(1, self.spec.byte_budget >> self.splits)
        return replace(self.spec, wanted=self._wanted, byte_budget=budget)

    def settle(self, *, abandoned: bool) -> UnitState:
        """Where the unit goes now that no worker holds it."""
        if not self.missing and (self._sample_done or self._sample_failed):
            failed = self.failed or self._sample_failed
            self.state = UnitState.FAILED if failed else UnitState.DONE
        else:
            self.state = UnitState.ABANDONED if abandoned else UnitState.PENDING
        return self.state

    def yielded(self, curve: str) -> bool:
        """Whether the curve was missing until now."""
        if curve not in self.missing:
            return False
        self.missing.discard(curve)
        self.done += 1
        self._silent_deaths = 0
        return True

    def sample_done(self, *, correct: bool) -> list[Decision]:
        """Skip what a wrong baseline leaves out; blame the worker for what it forgot."""
        self._sample_done = True
        decisions = []
        for curve in self.spec.work:
            if curve.key not in self.missing - self._waiting:
                continue
            if curve.correct_only and not correct:
                self.missing.discard(curve.key)
                self.skipped += 1
            elif curve.key in self._wanted:
                text = "the worker ended the sample without this curve and without a failure"
                failure = _failure(self.spec, curve.key, "worker", "MissingCurve", text)
                decisions.append(self.blame(FailureKind.EXCEPTION, failure))
        return decisions

    def died(self, kind: FailureKind, message: str, traceback: str) -> Decision:
        """Blame the first curve due, in the order of the plan; or the sample, see the policy."""
        of_worker = kind is not FailureKind.NODE_LOST
        self._deaths += of_worker
        self._silent_deaths += of_worker
        suspect = None
        if not self.policy.sample_is_poison(self._silent_deaths):
            due = self.missing & self._wanted - self._waiting
            suspect = next((work.key for work in self.spec.work if work.key in due), None)
        stage: Stage = "timeout" if kind is FailureKind.TIMEOUT else "worker"
        failure = _failure(self.spec, suspect, stage, kind.value, message)
        return self.blame(kind, replace(failure, traceback=traceback))

    def blame(self, kind: FailureKind, failure: UnitFailure) -> Decision:
        """Count the failure and say what it means."""
        self._tries[failure.curve, kind] += 1
        action = self.policy.decide(kind, self._tries[failure.curve, kind])
        if failure.curve is None and self.policy.sample_is_poison(self._silent_deaths):
            action = Action.QUARANTINE
        self.splits += action is Action.RETRY_SPLIT
        self.alone = self.alone or kind is FailureKind.HOST_MEMORY
        if failure.curve is not None:
            self._waiting.add(failure.curve)
        return Decision(
            action=action,
            kind=kind,
            model=self.spec.model,
            unit=self.spec,
            failure=failure,
            attempt=self.leases,
            curves=self._quarantine(failure.curve) if action is Action.QUARANTINE else (),
        )

    def _quarantine(self, curve: str | None) -> tuple[str, ...]:
        ended = tuple(sorted(self.missing)) if curve is None else (curve,)
        self.missing.difference_update(ended)
        self.failed += len(ended)
        self._deaths = 0
        self._sample_failed = self._sample_failed or curve is None
        return ended


def _failure(
    spec: UnitSpec, curve: str | None, stage: Stage, error: str, message: str
) -> UnitFailure:
    return UnitFailure(
        unit_id=spec.unit_id, curve=curve, stage=stage, error=error, message=message, traceback=""
    )
