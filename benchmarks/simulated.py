"""Workers that take their time and nothing else, and clocks to time them by."""

import heapq
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from avflow.orchestrator import coordinator as coordinator_module
from avflow.orchestrator.coordinator import Coordinator, Patience, Placement
from avflow.orchestrator.executors import Died, Ended, ExecutorEvent, Ready, Yielded
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.policy import FailureKind, FailurePolicy
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.queue import WorkQueue
from avflow.workers.protocol import CurveDone, SampleDone, UnitSpec


def made_up(unit: UnitSpec, curve: Any, rng: np.random.Generator) -> CurveDone:
    n = len(curve.center_layers)
    return CurveDone(
        unit_id=unit.unit_id, curve=curve.key,
        center_layer=np.asarray(curve.center_layers, dtype=np.int16),
        p_knockout=rng.random(n), p_options=rng.random((n, 4)),
        knockout_token=rng.integers(0, 4, n).astype(np.int32),
        n_blocked_edges=np.arange(n, dtype=np.int64),
        p_base=0.5, base_token=7, correct_base=True, answer_token=7, n_tokens=2000,
    )  # fmt: skip


def sample_done(unit: UnitSpec) -> SampleDone:
    return SampleDone(
        unit_id=unit.unit_id, answer="A", predicted="A", base_token=7, p_base=0.5,
        p_options=np.full(4, 0.25), correct=True, n_tokens=2000, group_spans={"last": [[9, 10]]},
        decode_s=1, encode_s=1, prefill_s=1, replay_s=1, token_layers=1, flops=1,
        flops_lower_bound=1, split_batches=0, peak_bytes=1,
    )  # fmt: skip


@dataclass(slots=True)
class _Worker:
    node: str
    free_at: float
    flights: list[str] = field(default_factory=list)


class Simulated:
    """An executor whose workers do nothing for as long as a unit takes by `seconds`.

    Events come when their time has come, on `clock`. A worker dies over a unit at
    `deaths_an_hour`, and another one loads in `load_s`.
    """

    def __init__(
        self, workers: int, seconds: Mapping[str, float], clock: "Clock", *,
        load_s: float = 0.0, deaths_an_hour: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.most, self.seconds, self.clock, self.load_s = workers, seconds, clock, load_s
        self.rng, self.deaths_an_hour = random.Random(seed), deaths_an_hour
        self.numbers = np.random.default_rng(seed)
        self.workers: dict[str, _Worker] = {}
        self.due: list[tuple[float, int, ExecutorEvent]] = []
        self.idle_s = 0.0  # of workers that had nothing, while there was something to do
        self.busy_s, self.lost_s, self.loading_s = 0.0, 0.0, 0.0  # lost: over what killed
        self.n, self.deaths, self.waited_s = 0, 0, 0.0

    def has_room(self, gpus: int) -> bool:
        return len(self.workers) < self.most

    def start_worker(self, worker: str, spec: Any, gpus: int) -> None:
        ready = self.clock.now() + self.load_s
        self.loading_s += self.load_s
        self.workers[worker] = _Worker(node=f"n{self.n % max(1, self.most // 8)}", free_at=ready)
        self._at(ready, Ready(worker=worker, where=f"h:{worker}", node=self.workers[worker].node))

    def submit(self, worker: str, unit: UnitSpec) -> None:
        known, took = self.workers[worker], self.seconds[unit.unit_id]
        begins = max(self.clock.now(), known.free_at)
        self.idle_s += begins - known.free_at
        due = [curve for curve in unit.curves if curve.key in unit.wanted]
        dies = self.rng.random() < took * self.deaths_an_hour / 3600
        known.free_at = begins + took
        if dies:
            took *= self.rng.random()
            due = due[: int(len(due) * self.rng.random())]
        for at, curve in enumerate(due, 1):
            done = made_up(unit, curve, self.numbers)
            self._at(begins + took * at / (len(due) + 1), Yielded(worker=worker, event=done))
        if dies:
            text = "simulated"
            died = Died(worker=worker, kind=FailureKind.WORKER_DEATH, message=text, node=known.node)
            self._at(begins + took, died)
            self.lost_s += took
            return
        self._at(begins + took, Yielded(worker=worker, event=sample_done(unit)))
        self._at(begins + took, Ended(worker=worker, unit_id=unit.unit_id))
        self.busy_s += took

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        began = time.perf_counter()
        next_at = self.due[0][0] + self.clock.grain_s if self.due else float("inf")
        self.clock.wait_until(min(next_at, self.clock.now() + timeout_s))
        events = []
        while self.due and self.due[0][0] <= self.clock.now():
            event = heapq.heappop(self.due)[2]
            if event.worker in self.workers:
                events.append(event)
                if isinstance(event, Died):
                    self.deaths += 1
                    del self.workers[event.worker]
        self.waited_s += time.perf_counter() - began
        return events

    def _at(self, when: float, event: ExecutorEvent) -> None:
        self.n += 1
        heapq.heappush(self.due, (when, self.n, event))

    def leaving(self) -> frozenset[str]:
        return frozenset()

    def waits_for_room(self, worker: str) -> bool:
        return False

    def avoid(self, node: str) -> bool:
        return False

    def give_up_decoding(self, worker: str) -> bool:
        return False

    def kill(self, worker: str) -> None:
        self.workers.pop(worker, None)

    def shutdown(self) -> None:
        self.workers.clear()


class Clock:
    """The real one."""

    grain_s = 0.0

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, when: float) -> None:
        time.sleep(max(0.0, when - time.monotonic()))

    def monotonic(self) -> float:  # as the coordinator calls it
        return self.now()


class Jumping(Clock):
    """One that is always where the next event is; events within a tenth of a second are one."""

    grain_s = 0.1

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def wait_until(self, when: float) -> None:
        self.at = max(self.at, when)


class Discarding:
    """A recorder for when the store is not what is measured."""

    def add_curve(self, unit: Any, done: Any) -> None: ...
    def add_sample(self, unit: Any, done: Any, *, worker: str, attempt: int) -> None: ...
    def add_failure(self, decision: Any, *, worker: str) -> None: ...
    def commit(self) -> None: ...
    def tick(self) -> bool:
        return False


def coordinate(plan: Plan, executor: Simulated, recorder: Any, clock: Clock) -> tuple[Any, float]:
    units = plan.units
    began = clock.now()
    # The coordinator asks a module for the time; here a clock that jumps stands in its place.
    real, coordinator_module.time = coordinator_module.time, clock  # type: ignore[assignment]
    try:
        outcome = Coordinator(
            queue=WorkQueue(units, policy=FailurePolicy(), deadline_s=None),
            units={unit.unit_id: unit for unit in units},
            # No model is loaded: of its spec the name alone is read.
            models={"m": Placement(spec=SimpleNamespace(name="m"), gpus=1)},  # type: ignore[arg-type]
            executor=executor,
            recorder=recorder,
            progress=Silent(),
            patience=Patience(load_s=1e9),
        ).run()
    finally:
        coordinator_module.time = real
    return outcome, clock.now() - began
