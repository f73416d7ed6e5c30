"""Drives an executor: units out, events to the queue, results to the store, workers replaced.

    worker:  LOADING --Ready--> READY --nothing more for its model--> retired
                |                 |
                +-- Died, or over its deadline: killed, and a new one started while work is due

    sweep:   RUNNING --queue finished-------------------------------------> stopped
                |                                                             ^
                +--first SIGINT or SIGTERM--> DRAINING --flights ended, ------+
                                              |          or grace is over
                                              +--second signal--> KeyboardInterrupt, at once

Units and curves have their own diagram in `queue`: what a failure means is decided there and in
`policy`. This module keeps the only mutable state that knows workers, signals and the clock.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from avflow.orchestrator.errors import StoreError
from avflow.orchestrator.executors import Died, Ended, Executor, ExecutorEvent, Ready, Yielded
from avflow.orchestrator.nodes import Loads, NodeHealth
from avflow.orchestrator.policy import Action, Decision, FailureKind
from avflow.orchestrator.progress import Progress, Snapshot
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.recorder import Recorder
from avflow.orchestrator.session import Outcome, Patience, Placement, Worker
from avflow.orchestrator.signals import StopSignals
from avflow.orchestrator.tally import Tally
from avflow.orchestrator.unit import UnitState
from avflow.workers.protocol import (
    CurveDone,
    Finished,
    InterventionDone,
    ProbeDone,
    SampleDone,
    UnitFailure,
    UnitSpec,
)

TICK_S = 0.25
LEAVING_EVERY_S = 5.0
AWAY_S = 5.0  # between two looks at the workers: the driver itself was stopped or held up

logger = logging.getLogger(__name__)

__all__ = ["Coordinator", "Outcome", "Patience", "Placement"]


class Coordinator:
    """One session of a sweep. `run` once."""

    def __init__(
        self,
        *,
        queue: WorkQueue,
        units: Mapping[str, UnitSpec],
        models: Mapping[str, Placement],
        executor: Executor,
        recorder: Recorder,
        progress: Progress,
        patience: Patience,
        on_task_stored: Callable[[], None] = lambda: None,
    ) -> None:
        """`units` are the queue's, by id; `models` in the order in which they get workers.

        `on_task_stored` is called when the last unit of some (model, data set, task) is durable.
        """
        self._queue = queue
        self._units = units
        self._models = models
        self._executor = executor
        self._recorder = recorder
        self._progress = progress
        self._patience = patience
        self._on_task_stored = on_task_stored
        self._task_ended = False
        self._workers: dict[str, Worker] = {}
        self._n_started = 0
        self._leaving: frozenset[str] = frozenset()
        self._leaving_asked = float("-inf")
        self._health = NodeHealth()
        self._broken: set[str] = set()
        self._loads = Loads()
        self._told: set[tuple[str, str]] = set()  # (worker, unit) whose stream's end is due
        self._tally = Tally(units)
        self._failures = 0
        self._given_up: dict[str, str] = {}
        self._shown = float("-inf")
        self._working_since: float | None = None
        self._stop = StopSignals(self._drain)
        self._draining_said = False
        self._drain_until = float("inf")
        self._looked = float("inf")

    def run(self) -> Outcome:
        """Until all units have ended, or a signal. What came out is committed on every way out
        but the second signal (KeyboardInterrupt), and the workers are gone."""
        with self._stop.watching():
            try:
                while not self._queue.finished and time.monotonic() < self._drain_until:
                    self._step()
            except Exception:  # whatever it was, it is raised again: rows come first
                with suppress(StoreError):  # the first error is the one to be told
                    self._recorder.commit()
                raise
            else:
                self._recorder.commit()
                self._progress.show(self._snapshot(), time.monotonic())
            finally:
                self._executor.shutdown()
        return Outcome(signal=self._stop.number, failures=self._failures, given_up=self._given_up)

    def _step(self) -> None:
        self._staff()
        self._feed()
        for event in self._executor.poll(TICK_S):
            self._handle(event)
        self._enforce_deadlines()
        self._let_go()
        if self._recorder.tick() and self._task_ended:
            self._task_ended = False
            self._on_task_stored()
        self._show()

    # -- workers -----------------------------------------------------------------------------

    def _staff(self) -> None:
        """Start workers where work waits and there is room, no more of them than units."""
        if self._stop.number is not None:
            return
        for name, placement in self._models.items():
            idle = sum(
                worker.model == name and not self._queue.in_flight(key)
                for key, worker in self._workers.items()
            )
            for _ in range(self._queue.due(name) - idle):
                may = self._loads.may_start(name, self._live(name))
                if not (may and self._executor.has_room(placement.gpus)):
                    break
                self._start(name, placement)
            if self._loads.doubtful(name) and self._live(name):
                return  # a machine may be at fault: no other model there before that is known

    def _live(self, model: str) -> int:
        return sum(worker.model == model for worker in self._workers.values())

    def _start(self, model: str, placement: Placement) -> None:
        self._n_started += 1
        worker = f"w{self._n_started}"
        self._workers[worker] = Worker(model=model, started=time.monotonic())
        self._executor.start_worker(worker, placement.spec, placement.gpus)
        logger.info("started, loading %s", model, extra={"worker": worker})

    def _feed(self) -> None:
        for name, worker in self._workers.items():
            while worker.ready and name not in self._leaving and worker.node not in self._broken:
                now = time.monotonic()
                unit = self._queue.next_for(name, worker.model, now, node=worker.node)
                if unit is None:
                    break
                self._executor.submit(name, unit)

    def _let_go(self) -> None:
        """Part with idle workers whose node leaves, or whose room another model needs."""
        now = time.monotonic()
        if now - self._leaving_asked > LEAVING_EVERY_S:
            self._leaving, self._leaving_asked = self._executor.leaving(), now
        for name, worker in list(self._workers.items()):
            if not worker.ready or self._queue.in_flight(name):
                continue
            wanted_elsewhere = not self._queue.due(worker.model) and any(
                self._queue.due(model) for model in self._models if model != worker.model
            )
            if name in self._leaving or worker.node in self._broken or wanted_elsewhere:
                self._queue.retire(name)
                self._remove(name)
                logger.info("retired", extra={"worker": name})

    def _remove(self, worker: str) -> str:
        """Forget a worker and end it; returns its model."""
        self._executor.kill(worker)
        return self._workers.pop(worker).model

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        if (away := now - self._looked) > AWAY_S:  # what the workers said meanwhile is to come
            self._queue.excuse(away)
            for worker in self._workers.values():
                worker.started += away
        self._looked = now
        for name in self._queue.overdue(now):
            if self._executor.give_up_decoding(name):
                continue  # its failure is on the way
            worker, held = self._workers[name], self._queue.in_flight(name)
            self._remove(name)
            self._decided(self._queue.on_timeout(name, now), worker.where, held)
            self._suspect(worker.node, held)
        for name, worker in list(self._workers.items()):
            if not worker.ready and now - worker.started > self._patience.load_s:
                if self._executor.waits_for_room(name):
                    worker.started = now
                    text = f"{name} still waits for room on a machine, for {worker.model}"
                    self._progress.say(text)
                    continue
                message = f"it did not load within load_deadline_s = {self._patience.load_s:g} s"
                self._failed_to_load(name, FailureKind.LOAD, message, "")

    def _failed_to_load(
        self, worker: str, kind: FailureKind, message: str, traceback: str, node: str = ""
    ) -> None:
        model = self._remove(worker)
        live = self._live(model)
        runs = any(one.model == model and one.ready for one in self._workers.values())
        decision = self._queue.on_load_failure(model, kind, message, traceback, others=live > 0)
        self._decided([decision], worker, ())
        if decision.action is Action.ABORT_MODEL:
            self._loads.settled(model)
        elif not runs:
            self._loads.failed(model, node)
        elif self._health.died(node, None) and not self._put_aside(node):
            self._loads.limit(model, live)
            self._progress.say(f"{model} goes on with {live} workers: more of them do not load")

    def _loaded(self, model: str, node: str) -> None:
        """It loads here, so where it did not load meanwhile the machine may be broken."""
        self._queue.on_loaded(model)
        for other in self._loads.settled(model, node):
            if self._health.died(other, None):
                self._put_aside(other)

    def _suspect(self, node: str, held: tuple[str, ...]) -> None:
        """A worker died there, over the oldest of what it held."""
        if held and self._health.died(node, held[0]):
            self._put_aside(node)

    def _put_aside(self, node: str) -> bool:
        """Feed a broken machine no more. False if there is no other."""
        if node not in self._broken:
            if not self._executor.avoid(node):
                return False
            self._broken.add(node)
            self._queue.forgive(node)
            text = f"machine {node} is put aside: workers die there over whatever they are given"
            logger.error(text)
            self._progress.say(text)
        return True

    # -- events ------------------------------------------------------------------------------

    def _handle(self, event: ExecutorEvent) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return  # it was killed meanwhile
        match event:
            case Ready(where=where):
                worker.where, worker.node = where, event.node
                self._loaded(worker.model, event.node)
                self._working_since = self._working_since or time.monotonic()
                logger.info("ready at %s", where, extra={"worker": event.worker})
            case Yielded(event=CurveDone() | InterventionDone() | ProbeDone() as done):
                self._on_curve(event.worker, done)
            case Yielded(event=SampleDone() as done):
                self._on_sample(event.worker, done)
            case Yielded(event=UnitFailure() as failure):
                self._on_failure(event.worker, failure)
            case Ended(unit_id=unit_id):
                self._on_ended(event.worker, unit_id)
            case Died():
                self._on_death(event)

    def _on_curve(self, worker: str, done: Finished) -> None:
        if self._queue.on_curve(worker, done.unit_id, done.curve, time.monotonic()):
            unit = self._units[done.unit_id]
            self._tally.came_out(unit, done)
            self._recorder.add_curve(unit, done)

    def _on_sample(self, worker: str, done: SampleDone) -> None:
        self._told.add((worker, done.unit_id))
        attempt = self._queue.attempt(done.unit_id)
        decisions = self._queue.on_sample_done(
            worker, done.unit_id, correct=done.correct, now=time.monotonic()
        )
        if decisions is None:
            return
        self._tally.sample(done, time.monotonic())
        where = self._workers[worker].where
        unit = self._units[done.unit_id]
        # A unit sent again with half the budget was cut as well, if not by the worker.
        split = done.split_batches + self._queue.splits(done.unit_id)
        done = replace(done, split_batches=split)
        self._recorder.add_sample(unit, done, worker=where, attempt=attempt)
        self._health.passed(self._workers[worker].node)
        self._decided(decisions, where, (done.unit_id,))

    def _on_failure(self, worker: str, failure: UnitFailure) -> None:
        if failure.curve is None:
            self._told.add((worker, failure.unit_id))
        decision = self._queue.on_failure(worker, failure, time.monotonic())
        if decision is not None:
            self._decided([decision], self._workers[worker].where, (failure.unit_id,))

    def _on_ended(self, worker: str, unit_id: str) -> None:
        """A stream must have told how its unit ended; one that did not is a worker's fault.

        By now the worker may hold the unit again, for what is still due.
        """
        if (worker, unit_id) in self._told:
            self._told.remove((worker, unit_id))
        elif unit_id in self._queue.in_flight(worker):
            message = "the unit's stream ended with neither SampleDone nor a failure of the sample"
            failure = UnitFailure(
                unit_id=unit_id,
                curve=None,
                stage="worker",
                error="StreamEnded",
                message=message,
                traceback="",
            )
            self._on_failure(worker, failure)
            self._told.discard((worker, unit_id))

    def _on_death(self, died: Died) -> None:
        worker = self._workers[died.worker]
        of_node = died.kind in (FailureKind.PREEMPTION, FailureKind.NODE_LOST)
        if not worker.ready and not of_node:
            final = died.kind is FailureKind.UNSUPPORTED
            kind = died.kind if final else FailureKind.LOAD
            self._failed_to_load(died.worker, kind, died.message, died.traceback, died.node)
            return
        held = self._queue.in_flight(died.worker)
        self._remove(died.worker)
        decisions = self._queue.on_worker_death(
            died.worker, died.kind, died.message, time.monotonic(), died.traceback
        )
        logger.warning("%s: %s", died.kind, died.message, extra={"worker": died.worker})
        self._decided(decisions, worker.where, held)
        if not of_node:
            self._suspect(worker.node, held)

    def _decided(self, decisions: list[Decision], where: str, touched: tuple[str, ...]) -> None:
        """Record failures, and close the units that have ended with them."""
        for decision in decisions:
            self._recorder.add_failure(decision, worker=where)
            self._tell(decision)
            if decision.action is Action.ABORT_MODEL:
                self._given_up[decision.model] = decision.failure.message
                self._progress.say(f"given up: {decision.model}: {decision.failure.message}")
        for unit_id in touched:
            if self._queue.state(unit_id) in _ENDED and self._tally.ended(self._units[unit_id]):
                self._task_ended = True

    def _tell(self, decision: Decision) -> None:
        failure = decision.failure
        what = decision.unit.sample.sample_id if decision.unit else decision.model
        if failure.curve is not None:
            what += f" {failure.curve}"
        text = f"{what}: {failure.stage}: {failure.error}: {failure.message}"
        logger.warning("%s (%s)", text, decision.action, extra={"unit": failure.unit_id})
        if decision.terminal:
            self._failures += 1
            self._progress.say(f"failed: {text.splitlines()[0]}")

    # -- looking and stopping ----------------------------------------------------------------

    def _show(self) -> None:
        now = time.monotonic()
        if self._stop.number is not None and not self._draining_said:
            self._draining_said = True
            text = f"stopping: running samples get {self._patience.grace_s:g} s to finish, then all"
            self._progress.say(text + " that came out is stored; once more stops at once")
        if now - self._shown >= TICK_S:
            self._shown = now
            self._progress.show(self._snapshot(), now)

    def _snapshot(self) -> Snapshot:
        now = time.monotonic()
        return self._tally.snapshot(
            counts=self._queue.counts(),
            workers=self._workers.values(),
            failures=self._failures,
            working_s=0.0 if self._working_since is None else now - self._working_since,
            draining=self._stop.number is not None,
            now=now,
        )

    def _drain(self) -> None:
        """The first signal: called where it strikes, so it only makes notes."""
        self._drain_until = time.monotonic() + self._patience.grace_s
        self._queue.drain()


_ENDED = frozenset({UnitState.DONE, UnitState.FAILED})
