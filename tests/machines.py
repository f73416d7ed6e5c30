"""An executor of machines that do anything at any time, on a clock that jumps: for the coordinator.

What real workers and real Ray do stands in `test_ray_faults` and `test_faults_cluster`; here are
the orders of events that a real machine shows once in a year.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from queued_units import failed
from stored_run import curve_done, sample_done

from avflow.orchestrator import coordinator as coordinator_module
from avflow.orchestrator.executors import Died, Ended, ExecutorEvent, Ready, Yielded
from avflow.orchestrator.policy import FailureKind
from avflow.workers.protocol import Event, UnitSpec


@dataclass(slots=True, kw_only=True)
class Clock:
    at: float = 0.0

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator_module, "time", SimpleNamespace(monotonic=lambda: self.at))


@dataclass(slots=True, kw_only=True)
class Machine:
    """`load_s` None: nothing loads there, and it says so at once."""

    places: int = 1
    load_s: float | None = 1.0
    kills: bool = False  # whatever it is given


@dataclass(slots=True, kw_only=True)
class _Worker:
    machine: str
    ready_at: float
    ready: bool = False
    units: deque[UnitSpec] = field(default_factory=deque)
    stream: deque[Event | FailureKind | None] | None = None  # None in it: it hangs


class Machines:
    """`faults` at most, of those that `rng` draws (None: none); an event of each worker a poll."""

    def __init__(
        self,
        clock: Clock,
        machines: dict[str, Machine],
        *,
        rng: random.Random | None = None,
        faults: int = 0,
    ) -> None:
        self.clock, self.machines, self.rng, self.faults = clock, machines, rng, faults
        self.workers: dict[str, _Worker] = {}
        self.avoided: set[str] = set()
        self.started: list[tuple[str, str]] = []  # model, machine

    def has_room(self, gpus: int) -> bool:
        return bool(self._free())

    def start_worker(self, worker: str, spec: Any, gpus: int) -> None:
        free = self._free()
        machine = self.rng.choice(free) if self.rng else free[0]
        load_s = self.machines[machine].load_s or 0.0
        self.workers[worker] = _Worker(machine=machine, ready_at=self.clock.at + load_s)
        self.started.append((spec.name, machine))

    def submit(self, worker: str, unit: UnitSpec) -> None:
        assert self.workers[worker].ready
        self.workers[worker].units.append(unit)

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        self.clock.at += self.rng.choice((0.05, timeout_s, 1.0, 4.0)) if self.rng else timeout_s
        events = [event for name in list(self.workers) for event in self._step(name)]
        for event in events:
            if isinstance(event, Died):
                del self.workers[event.worker]
        return events

    def leaving(self) -> frozenset[str]:
        if self.workers and self.rng and self._fault(0.02):
            return frozenset([self.rng.choice(sorted(self.workers))])
        return frozenset()

    def waits_for_room(self, worker: str) -> bool:
        return False

    def avoid(self, node: str) -> bool:
        if not self.machines.keys() - self.avoided - {node}:
            return False
        self.avoided.add(node)
        return True

    def give_up_decoding(self, worker: str) -> bool:
        assert self.workers[worker].units, "asked for a unit that is not there"
        return False

    def kill(self, worker: str) -> None:
        self.workers.pop(worker, None)

    def shutdown(self) -> None:
        self.workers.clear()

    def _free(self) -> list[str]:
        held = [worker.machine for worker in self.workers.values()]
        return [
            name
            for name, machine in self.machines.items()
            if name not in self.avoided and held.count(name) < machine.places
        ]

    def _fault(self, chance: float) -> bool:
        if self.rng is None or not self.faults or self.rng.random() >= chance:
            return False
        self.faults -= 1
        return True

    def _step(self, name: str) -> list[ExecutorEvent]:
        worker = self.workers[name]
        if not worker.ready:
            return self._load(name, worker)
        dies = self.machines[worker.machine].kills if worker.units else self._fault(0.005)
        if dies:
            return [self._dies(name, FailureKind.WORKER_DEATH)]
        return self._work(name, worker) if worker.units else []

    def _work(self, name: str, worker: _Worker) -> list[ExecutorEvent]:
        unit = worker.units[0]
        if worker.stream is None:
            worker.stream = deque(self._stream(unit))
        if not worker.stream:
            worker.stream = None
            worker.units.popleft()
            return [Ended(worker=name, unit_id=unit.unit_id)]
        event = worker.stream[0]
        if event is None:
            return []
        worker.stream.popleft()
        if isinstance(event, FailureKind):
            return [self._dies(name, event)]
        return [Yielded(worker=name, event=event)]

    def _load(self, name: str, worker: _Worker) -> list[ExecutorEvent]:
        if self.clock.at < worker.ready_at:
            return []
        if self.machines[worker.machine].load_s is None or self._fault(0.03):
            return [self._dies(name, FailureKind.LOAD)]
        if self._fault(0.05):
            return [self._dies(name, FailureKind.NODE_LOST)]
        if self._fault(0.02):
            worker.ready_at = float("inf")
            return []
        worker.ready = True
        return [Ready(worker=name, where=f"h:{name}", node=worker.machine)]

    def _dies(self, name: str, kind: FailureKind) -> Died:
        return Died(worker=name, kind=kind, message="dead", node=self.workers[name].machine)

    def _stream(self, unit: UnitSpec) -> list[Event | FailureKind | None]:
        if self.rng and self._fault(0.05):
            error = self.rng.choice(("OSError", "MemoryError", "NodeLost"))
            return [failed(unit.unit_id, None, retryable=True, error=error)]
        keys = [curve.key for curve in unit.curves if curve.key in unit.wanted]
        if self.rng is None:
            return [*(curve_done(unit, key) for key in keys), sample_done(unit)]
        self.rng.shuffle(keys)
        out: list[Event | FailureKind | None] = []
        for key in keys:
            if self._fault(0.03):
                out.append(
                    failed(unit.unit_id, key, error=self.rng.choice(("E", "OutOfMemoryError")))
                )
            elif not self._fault(0.01):  # or it is forgotten
                out.append(curve_done(unit, key))
            if self._fault(0.03):
                return [*out, self.rng.choice(_DEATHS)]
            if self._fault(0.005):
                return [*out, None]
        return out if self._fault(0.02) else [*out, sample_done(unit)]


_DEATHS = (
    FailureKind.WORKER_DEATH,
    FailureKind.HOST_MEMORY,
    FailureKind.FATAL,
    FailureKind.NODE_LOST,
    FailureKind.PREEMPTION,
)
