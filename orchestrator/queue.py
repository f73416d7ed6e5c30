"""What is due, who holds it, how it ended. Pure: no Ray, no clock (seconds are passed in).

    unit:   PENDING -> LEASED -> DONE       every curve stored, or skipped (wrong baseline)
               ^         |   -> FAILED     a curve, or the whole sample, is quarantined
               +--retry--+   -> ABANDONED  its model was given up; a later run takes it up
    curve:  missing -> done | failed | skipped, once and for ever

A worker holds at most `in_flight` units: it works on the oldest, the others wait in its own
queue. So when it dies, only the oldest is to blame, and there the first curve not yet yielded.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from avflow.orchestrator.policy import Action, Decision, FailureKind, FailurePolicy, classify
from avflow.workers.protocol import Stage, UnitFailure, UnitSpec


class UnitState(StrEnum):
    """Where a unit stands."""

    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Units by state and curves by state, at this moment."""

    pending: int
    leased: int
    done: int
    failed: int
    abandoned: int
    curves_missing: int
    curves_done: int
    curves_failed: int
    curves_skipped: int


@dataclass(slots=True, kw_only=True)
class _Unit:
    spec: UnitSpec
    missing: set[str]
    state: UnitState = UnitState.PENDING
    sample_done: bool = False
    has_failed: bool = False
    leases: int = 0
    splits: int = 0
    alone: bool = False  # after host memory ran out: nothing beside it in its worker
    silent_deaths: int = 0
    waiting: set[str] = field(default_factory=set)  # failed in this lease, to be tried again
    tries: Counter[tuple[str | None, FailureKind]] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class _Worker:
    model: str
    heard: float  # seconds: its last sign of life while it had work
    flights: list[_Unit] = field(default_factory=list)  # oldest first


class WorkQueue:
    """All units of a sweep. Feed it events in the order they happened; it never blocks.

    `deadline_s`: a worker that holds units and is silent for longer is `overdue` (None: never).
    """

    def __init__(
        self,
        units: Iterable[UnitSpec],
        *,
        policy: FailurePolicy | None = None,
        in_flight: int = 2,
        deadline_s: float | None = None,
    ) -> None:
        self._policy = policy or FailurePolicy()
        self._in_flight = in_flight
        self._deadline_s = deadline_s
        self._units: dict[str, _Unit] = {}
        self._heaps: dict[str, list[tuple[float, str]]] = {}
        self._workers: dict[str, _Worker] = {}
        self._deaths: dict[str, list[tuple[float, str]]] = {}
        self._load_failures: Counter[str] = Counter()
        self._aborted: set[str] = set()
        self._draining = False
        self._curves: Counter[str] = Counter()
        for spec in units:
            if spec.unit_id in self._units:
                raise ValueError(f"unit {spec.unit_id} is in the queue twice")
            self._units[spec.unit_id] = _Unit(spec=spec, missing=set(spec.wanted))
            self._push(self._units[spec.unit_id])

    # -- giving work -------------------------------------------------------------------------

    def next_for(self, worker: str, model: str, now: float) -> UnitSpec | None:
        """Lease the costliest pending unit of `model` to `worker`; None: nothing, or enough.

        Call it when the worker has loaded its model, and after each unit that ends. `wanted` of
        the unit are the curves still missing; `byte_budget` is halved by each split.
        Raises ValueError when the worker was bound to another model before.
        """
        known = self._workers.setdefault(worker, _Worker(model=model, heard=now))
        if known.model != model:
            raise ValueError(f"worker {worker} is bound to {known.model}, not to {model}")
        if self._draining or len(known.flights) >= self._in_flight:
            return None
        if any(unit.alone for unit in known.flights):
            return None
        unit = self._pop(model, busy=bool(known.flights))
        if unit is None:
            return None
        if not known.flights:
            known.heard = now
        unit.state = UnitState.LEASED
        unit.leases += 1
        unit.waiting.clear()
        known.flights.append(unit)
        return replace(
            unit.spec,
            wanted=frozenset(unit.missing),
            byte_budget=max(1, unit.spec.byte_budget >> unit.splits),
        )

    # -- events ------------------------------------------------------------------------------

    def on_curve(self, worker: str, unit_id: str, curve: str, now: float) -> bool:
        """A curve came out. True: store it; False: it is late, unwanted or there already."""
        unit = self._held(worker, unit_id, now)
        if unit is None or curve not in unit.missing:
            return False
        unit.missing.discard(curve)
        unit.silent_deaths = 0
        self._curves["done"] += 1
        return True

    def on_failure(self, worker: str, failure: UnitFailure, now: float) -> Decision | None:
        """A failure came out as data. With `curve` None it ends the unit's stream.

        None when the worker does not hold the unit or the curve has ended already: ignore it.
        """
        unit = self._held(worker, failure.unit_id, now)
        if unit is None or (failure.curve is not None and failure.curve not in unit.missing):
            return None
        decision = self._blame(unit, classify(failure), failure)
        if failure.curve is None:
            self._release(worker, unit)
            self._settle(unit)
        return decision

    def on_sample_done(
        self, worker: str, unit_id: str, *, correct: bool, now: float
    ) -> list[Decision] | None:
        """The unit's stream ended well. None: late, ignore it (and store no row).

        Curves that only a correct baseline calls for are skipped if it is wrong. Any other curve
        that neither came out nor failed breaks the worker's contract: a Decision each.
        """
        unit = self._held(worker, unit_id, now)
        if unit is None:
            return None
        unit.sample_done = True
        self._release(worker, unit)
        decisions = []
        for curve in unit.spec.curves:
            if curve.key not in unit.missing - unit.waiting:
                continue
            if curve.correct_only and not correct:
                unit.missing.discard(curve.key)
                self._curves["skipped"] += 1
            else:
                text = "the worker ended the sample without this curve and without a failure"
                failure = _failure(unit, "worker", "MissingCurve", text, curve=curve.key)
                decisions.append(self._blame(unit, FailureKind.EXCEPTION, failure))
        self._settle(unit)
        return decisions

    def on_worker_death(
        self, worker: str, kind: FailureKind, message: str, now: float, traceback: str = ""
    ) -> list[Decision]:
        """The worker is gone (or ruined: then kill it). Hand on all it had yielded before.

        Only the first missing curve of its oldest unit is blamed; its other units go back
        untouched, as do all after a pre-emption. The worker's name is forgotten. A further
        Decision ABORT_MODEL follows when the breaker trips.
        """
        gone = self._workers.pop(worker, None)
        if gone is None:
            return []
        decisions = []
        if gone.flights and kind is not FailureKind.PREEMPTION:
            oldest = gone.flights[0]
            oldest.silent_deaths += 1
            stage: Stage = "timeout" if kind is FailureKind.TIMEOUT else "worker"
            curve = self._suspect(oldest)
            failure = _failure(oldest, stage, kind.value, message, curve=curve, traceback=traceback)
            decisions.append(self._blame(oldest, kind, failure))
        for unit in gone.flights:
            self._settle(unit)
        if kind is not FailureKind.PREEMPTION:
            suspect_id = gone.flights[0].spec.unit_id if gone.flights else f"idle {worker}"
            decisions += self._count_death(gone.model, suspect_id, message, now)
        return decisions

    def on_timeout(self, worker: str, now: float) -> list[Decision]:
        """As a death: call it with each of `overdue`, once the worker has been killed."""
        message = f"nothing came out of worker {worker} for {self._deadline_s} s; it was killed"
        return self.on_worker_death(worker, FailureKind.TIMEOUT, message, now)

    def on_load_failure(self, model: str, message: str, traceback: str = "") -> Decision:
        """A worker of this model could not start. RETRY: start another; ABORT_MODEL: don't."""
        self._load_failures[model] += 1
        kind, tries = FailureKind.LOAD, self._load_failures[model]
        action = self._policy.decide(kind, tries)
        if action is Action.ABORT_MODEL:
            self.abort_model(model)
        failure = _failure(None, "load", kind.value, message, traceback=traceback)
        return _of_model(model, kind, action, failure, tries)

    def retire(self, worker: str) -> None:
        """Forget a worker that was stopped while it held nothing."""
        if not self.in_flight(worker):
            self._workers.pop(worker, None)

    def drain(self) -> None:
        """Give out nothing more; what is in flight may end."""
        self._draining = True

    def abort_model(self, model: str) -> None:
        """Give up what this model has pending; what is in flight may end."""
        self._aborted.add(model)
        for _, unit_id in self._heaps.pop(model, []):
            self._units[unit_id].state = UnitState.ABANDONED

    # -- looking -----------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Nothing in flight, and nothing pending (or draining)."""
        if any(worker.flights for worker in self._workers.values()):
            return False
        return self._draining or not any(self._heaps.values())

    def due(self, model: str) -> int:
        """Units of this model that wait for a worker."""
        return len(self._heaps.get(model, ()))

    def in_flight(self, worker: str) -> tuple[str, ...]:
        """The units a worker holds, oldest first."""
        known = self._workers.get(worker)
        return tuple(unit.spec.unit_id for unit in known.flights) if known else ()

    def overdue(self, now: float) -> list[str]:
        """Workers that hold units and have been silent for longer than the deadline."""
        if self._deadline_s is None:
            return []
        return [
            name
            for name, worker in self._workers.items()
            if worker.flights and now - worker.heard > self._deadline_s
        ]

    def state(self, unit_id: str) -> UnitState:
        """Raises KeyError for a unit that was never in the queue."""
        return self._units[unit_id].state

    def attempt(self, unit_id: str) -> int:
        """How often the unit has been leased."""
        return self._units[unit_id].leases

    def splits(self, unit_id: str) -> int:
        """How often the unit's batches have been halved."""
        return self._units[unit_id].splits

    def counts(self) -> Counts:
        """O(units)."""
        states = Counter(unit.state for unit in self._units.values())
        return Counts(
            pending=states[UnitState.PENDING],
            leased=states[UnitState.LEASED],
            done=states[UnitState.DONE],
            failed=states[UnitState.FAILED],
            abandoned=states[UnitState.ABANDONED],
            curves_missing=sum(len(unit.missing) for unit in self._units.values()),
            curves_done=self._curves["done"],
            curves_failed=self._curves["failed"],
            curves_skipped=self._curves["skipped"],
        )

    # -- inside ------------------------------------------------------------------------------

    def _push(self, unit: _Unit) -> None:
        heap = self._heaps.setdefault(unit.spec.model, [])
        heapq.heappush(heap, (-unit.spec.cost, unit.spec.unit_id))

    def _pop(self, model: str, *, busy: bool) -> _Unit | None:
        heap = self._heaps.get(model, [])
        passed_over = []
        found = None
        while heap and found is None:
            entry = heapq.heappop(heap)
            unit = self._units[entry[1]]
            if busy and unit.alone:
                passed_over.append(entry)
            else:
                found = unit
        for entry in passed_over:
            heapq.heappush(heap, entry)
        return found

    def _held(self, worker: str, unit_id: str, now: float) -> _Unit | None:
        known = self._workers.get(worker)
        if known is None:
            return None
        known.heard = now
        return next((unit for unit in known.flights if unit.spec.unit_id == unit_id), None)

    def _release(self, worker: str, unit: _Unit) -> None:
        self._workers[worker].flights.remove(unit)

    def _blame(self, unit: _Unit, kind: FailureKind, failure: UnitFailure) -> Decision:
        unit.tries[failure.curve, kind] += 1
        action = self._policy.decide(kind, unit.tries[failure.curve, kind])
        if failure.curve is None and self._policy.sample_is_poison(unit.silent_deaths):
            action = Action.QUARANTINE
        unit.splits += action is Action.RETRY_SPLIT
        unit.alone = unit.alone or kind is FailureKind.HOST_MEMORY
        if failure.curve is not None:
            unit.waiting.add(failure.curve)
        ended: tuple[str, ...] = ()
        if action is Action.QUARANTINE:
            unit.has_failed = True
            ended = tuple(sorted(unit.missing)) if failure.curve is None else (failure.curve,)
            unit.missing.difference_update(ended)
            self._curves["failed"] += len(ended)
            # A sample that is given up whole asks for nothing more, its own row included.
            unit.sample_done = unit.sample_done or failure.curve is None
        return Decision(
            action=action,
            kind=kind,
            model=unit.spec.model,
            unit=unit.spec,
            failure=failure,
            attempt=unit.leases,
            curves=ended,
        )

    def _suspect(self, unit: _Unit) -> str | None:
        """The first curve due, in the order of the plan, which is the order workers yield in."""
        if self._policy.sample_is_poison(unit.silent_deaths):
            return None
        due = unit.missing - unit.waiting
        return next((curve.key for curve in unit.spec.curves if curve.key in due), None)

    def _settle(self, unit: _Unit) -> None:
        """Where a unit goes that no worker holds any more."""
        if not unit.missing and unit.sample_done:
            unit.state = UnitState.FAILED if unit.has_failed else UnitState.DONE
        elif unit.spec.model in self._aborted:
            unit.state = UnitState.ABANDONED
        else:
            unit.state = UnitState.PENDING
            self._push(unit)

    def _count_death(self, model: str, unit_id: str, message: str, now: float) -> list[Decision]:
        deaths = self._deaths.setdefault(model, [])
        deaths.append((now, unit_id))
        live = sum(worker.model == model for worker in self._workers.values())
        if model in self._aborted or not self._policy.breaker_trips(deaths, now, live):
            return []
        self.abort_model(model)
        text = f"workers of {model} keep dying on different samples; the last: {message}"
        failure = _failure(None, "worker", FailureKind.WORKER_DEATH.value, text)
        kind, action = FailureKind.WORKER_DEATH, Action.ABORT_MODEL
        return [_of_model(model, kind, action, failure, len(deaths))]


def _failure(
    unit: _Unit | None,
    stage: Stage,
    error: str,
    message: str,
    *,
    curve: str | None = None,
    traceback: str = "",
) -> UnitFailure:
    unit_id = "" if unit is None else unit.spec.unit_id
    return UnitFailure(
        unit_id=unit_id,
        curve=curve,
        stage=stage,
        error=error,
        message=message,
        traceback=traceback,
    )


def _of_model(
    model: str, kind: FailureKind, action: Action, failure: UnitFailure, attempt: int
) -> Decision:
    return Decision(
        action=action, kind=kind, model=model, unit=None, failure=failure, attempt=attempt
    )
