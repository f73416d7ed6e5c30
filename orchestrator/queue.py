"""What is due, and who holds it. Pure: no Ray, no clock (seconds are passed in).

A worker holds at most `in_flight` units: it works on the oldest, the others wait in its own
queue. So when it dies, only the oldest is to blame, and there the first curve not yet yielded.
That is a suspicion (batches may come out in another order), so a unit that has killed twice is
leased for one curve at a time: the innocent pass, and only what kills alone is quarantined.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from avflow.orchestrator.policy import Action, Decision, FailureKind, FailurePolicy, classify
from avflow.orchestrator.unit import Unit, UnitState
from avflow.workers.protocol import Stage, UnitFailure, UnitSpec


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
class _Worker:
    model: str
    heard: float  # seconds: its last sign of life while it had work
    node: str = ""  # its machine
    media: str = ""  # what its latest unit is about; its encoders' outputs may still be there
    flights: list[Unit] = field(default_factory=list)  # oldest first


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
        self._units: dict[str, Unit] = {}
        self._pending: dict[str, set[str]] = {}
        # Entries of units that are pending no longer are passed over.
        self._heaps: dict[str, list[tuple[float, str]]] = {}
        self._alike: dict[tuple[str, str], list[tuple[float, str]]] = {}  # by model and media
        self._workers: dict[str, _Worker] = {}
        self._deaths: dict[str, list[tuple[float, str, str]]] = {}  # seconds, unit, machine
        self._broken: set[str] = set()
        self._load_failures: Counter[str] = Counter()
        self._aborted: set[str] = set()
        self._draining = False
        for spec in units:
            if spec.unit_id in self._units:
                raise ValueError(f"unit {spec.unit_id} is in the queue twice")
            self._units[spec.unit_id] = Unit(spec, self._policy)
            self._push(spec)

    # -- giving work -------------------------------------------------------------------------

    def next_for(self, worker: str, model: str, now: float, *, node: str = "") -> UnitSpec | None:
        """Lease a pending unit of `model` to `worker`; None: nothing, or enough.

        The costliest, but first those about the media that the worker had last, and only if
        nothing else is left one that killed a worker on this `node`: the machine may be broken.

        Call it when the worker has loaded its model, and after each unit that ends. `wanted` of
        the unit are the curves still missing; `byte_budget` is halved by each split.
        Raises ValueError when the worker was bound to another model before.
        """
        known = self._workers.setdefault(worker, _Worker(model=model, heard=now, node=node))
        if known.model != model:
            raise ValueError(f"worker {worker} is bound to {known.model}, not to {model}")
        full = len(known.flights) >= self._in_flight or any(unit.alone for unit in known.flights)
        unit = None if self._draining or full else self._pop(known)
        if unit is None:
            return None
        if not known.flights:
            known.heard = now
        known.flights.append(unit)
        known.media = _media(unit.spec)
        return unit.lease()

    # -- events ------------------------------------------------------------------------------

    def on_curve(self, worker: str, unit_id: str, curve: str, now: float) -> bool:
        """A curve came out. True: store it; False: it is late, unwanted or there already."""
        unit = self._held(worker, unit_id, now)
        return unit is not None and unit.yielded(curve)

    def on_failure(self, worker: str, failure: UnitFailure, now: float) -> Decision | None:
        """A failure came out as data. With `curve` None it ends the unit's stream.

        None when the worker does not hold the unit or the curve has ended already: ignore it.
        """
        unit = self._held(worker, failure.unit_id, now)
        if unit is None or (failure.curve is not None and failure.curve not in unit.missing):
            return None
        decision = unit.blame(classify(failure), failure)
        if failure.curve is None:
            self._release(worker, unit)
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
        decisions = unit.sample_done(correct=correct)
        self._release(worker, unit)
        return decisions

    def on_worker_death(
        self, worker: str, kind: FailureKind, message: str, now: float, traceback: str = ""
    ) -> list[Decision]:
        """The worker is gone (or ruined: then kill it). Hand on all it had yielded before.

        Only its oldest unit is blamed; its other units go back untouched, as do all after a
        pre-emption. The worker's name is forgotten. A further Decision ABORT_MODEL follows when
        the breaker trips, for which nodes that went away do not count: they go by the rack.
        """
        gone = self._workers.pop(worker, None)
        if gone is None:
            return []
        decisions = []
        if kind is not FailureKind.PREEMPTION:
            suspect = f"idle {worker}"
            if gone.flights:
                suspect = gone.flights[0].spec.unit_id
                decisions.append(gone.flights[0].died(kind, message, traceback))
                gone.flights[0].died_on.update({gone.node} - {""})
            if kind is not FailureKind.NODE_LOST:
                decisions += self._count_death(gone, suspect, message, now)
        for unit in gone.flights:
            self._settle(unit)
        return decisions

    def on_timeout(self, worker: str, now: float) -> list[Decision]:
        """As a death: call it with each of `overdue`, once the worker has been killed."""
        message = f"nothing came out of worker {worker} for {self._deadline_s} s; it was killed"
        return self.on_worker_death(worker, FailureKind.TIMEOUT, message, now)

    def on_load_failure(
        self,
        model: str,
        kind: FailureKind,
        message: str,
        traceback: str = "",
        *,
        others: bool = False,
    ) -> Decision:
        """A worker of this model could not start. RETRY: start another; ABORT_MODEL: don't.

        While `others` of it run or still load, it need not be the model that is at fault.
        """
        self._load_failures[model] += 1
        tries = self._load_failures[model]
        action = Action.RETRY if others else self._policy.decide(kind, tries)
        if action is Action.ABORT_MODEL:
            self.abort_model(model)
        failure = _of_model("load", kind, message, traceback)
        return Decision(
            action=action, kind=kind, model=model, unit=None, failure=failure, attempt=tries
        )

    def on_loaded(self, model: str) -> None:
        """A worker of this model has started: what failed before was not the model's fault."""
        self._load_failures[model] = 0

    def excuse(self, seconds: float) -> None:
        """Nobody listened for so long: of no worker's silence do these seconds count."""
        for worker in self._workers.values():
            worker.heard += seconds

    def forgive(self, node: str) -> None:
        """The machine is broken: no death there, before or later, counts for the breaker."""
        self._broken.add(node)
        for model, deaths in self._deaths.items():
            self._deaths[model] = [death for death in deaths if death[2] != node]

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
        for unit_id in self._pending.pop(model, set()):
            self._units[unit_id].settle(abandoned=True)

    # -- looking -----------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Nothing in flight, and nothing pending (or draining)."""
        if any(worker.flights for worker in self._workers.values()):
            return False
        return self._draining or not any(self._pending.values())

    def due(self, model: str) -> int:
        """Units of this model that wait for a worker."""
        return len(self._pending.get(model, ()))

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
        units = self._units.values()
        states = Counter(unit.state for unit in units)
        return Counts(
            pending=states[UnitState.PENDING],
            leased=states[UnitState.LEASED],
            done=states[UnitState.DONE],
            failed=states[UnitState.FAILED],
            abandoned=states[UnitState.ABANDONED],
            curves_missing=sum(len(unit.missing) for unit in units),
            curves_done=sum(unit.done for unit in units),
            curves_failed=sum(unit.failed for unit in units),
            curves_skipped=sum(unit.skipped for unit in units),
        )

    # -- inside ------------------------------------------------------------------------------

    def _push(self, spec: UnitSpec) -> None:
        self._pending.setdefault(spec.model, set()).add(spec.unit_id)
        entry = (-spec.cost, spec.unit_id)
        heapq.heappush(self._heaps.setdefault(spec.model, []), entry)
        heapq.heappush(self._alike.setdefault((spec.model, _media(spec)), []), entry)

    def _pop(self, worker: _Worker) -> Unit | None:
        """The next pending unit that the worker may take."""
        alike = self._alike.get((worker.model, worker.media), [])
        everything = self._heaps.get(worker.model, [])
        return (
            self._take(alike, worker)
            or self._take(everything, worker)
            or self._take(everything, worker, died_here=True)
        )

    def _take(
        self, heap: list[tuple[float, str]], worker: _Worker, *, died_here: bool = False
    ) -> Unit | None:
        """The costliest of a heap: one that must be alone only for a worker without others."""
        pending = self._pending.get(worker.model, set())
        passed_over, found = [], None
        while heap and found is None:
            entry = heapq.heappop(heap)
            unit = self._units[entry[1]]
            if entry[1] not in pending:
                continue
            kept_apart = worker.node in unit.died_on and not died_here
            if kept_apart or (worker.flights and unit.alone):
                passed_over.append(entry)
            else:
                found = unit
                pending.remove(entry[1])
        for entry in passed_over:
            heapq.heappush(heap, entry)
        return found

    def _held(self, worker: str, unit_id: str, now: float) -> Unit | None:
        known = self._workers.get(worker)
        if known is None:
            return None
        known.heard = now
        return next((unit for unit in known.flights if unit.spec.unit_id == unit_id), None)

    def _release(self, worker: str, unit: Unit) -> None:
        self._workers[worker].flights.remove(unit)
        self._settle(unit)

    def _settle(self, unit: Unit) -> None:
        if unit.settle(abandoned=unit.spec.model in self._aborted) is UnitState.PENDING:
            self._push(unit.spec)

    def _count_death(self, gone: _Worker, unit_id: str, message: str, now: float) -> list[Decision]:
        model = gone.model
        if gone.node in self._broken:
            return []
        deaths = self._deaths.setdefault(model, [])
        deaths.append((now, unit_id, gone.node))
        live = sum(worker.model == model for worker in self._workers.values())
        counted = [(at, unit) for at, unit, _ in deaths]
        if model in self._aborted or not self._policy.breaker_trips(counted, now, live):
            return []
        self.abort_model(model)
        kind = FailureKind.WORKER_DEATH
        text = f"workers of {model} keep dying on different samples; the last: {message}"
        return [
            Decision(
                action=Action.ABORT_MODEL,
                kind=kind,
                model=model,
                unit=None,
                failure=_of_model("worker", kind, text),
                attempt=len(deaths),
            )
        ]


def _media(spec: UnitSpec) -> str:
    return f"{spec.sample.dataset}/{spec.sample.media_group}"


def _of_model(stage: Stage, kind: FailureKind, message: str, traceback: str = "") -> UnitFailure:
    return UnitFailure(
        unit_id="", curve=None, stage=stage, error=kind.value, message=message, traceback=traceback
    )
