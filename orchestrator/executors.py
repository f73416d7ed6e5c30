"""Where units run: in this process, or on Ray actors. One interface, driven by the coordinator.

An executor starts workers (each loads one model, once), takes units and hands back events in the
order they happened on each worker. It decides nothing: no retries, no replacements, no deadlines.
"""

import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from avflow.orchestrator.cluster import cluster_gpus, draining_nodes, start_ray
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.policy import FailureKind
from avflow.workers.actor import ModelWorker, start_actor, submit_unit
from avflow.workers.decode import decode_failure, decode_unit
from avflow.workers.protocol import Event, UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.datasets.media import MediaSpec
    from avflow.workers.models.base import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has loaded its model; `where` is its `host:pid`."""

    worker: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Yielded:
    """Something came out of the oldest unit that the worker holds."""

    worker: str
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The unit's stream is over: nothing more comes out of it."""

    worker: str
    unit_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The worker is gone, with all units it held. LOAD: it never became ready."""

    worker: str
    kind: FailureKind
    message: str
    traceback: str = ""


ExecutorEvent = Ready | Yielded | Ended | Died


class Executor(Protocol):
    """What the coordinator drives. Worker names are the caller's, each used once."""

    def has_room(self, gpus: int) -> bool:
        """Whether one more worker, for a model that takes so many GPUs, can be started now."""
        ...

    def start_worker(self, worker: str, spec: "ModelSpec", gpus: int) -> None:
        """Begin to load a model, on `gpus` GPUs where there are any; Ready or Died follows."""
        ...

    def submit(self, worker: str, unit: UnitSpec) -> None:
        """Queue a unit on a ready worker; its media are decoded ahead. Units run in order."""
        ...

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        """What has happened; waits at most `timeout_s` for the first event."""
        ...

    def leaving(self) -> frozenset[str]:
        """Workers whose node is being taken away: let them finish, feed them no more."""
        ...

    def kill(self, worker: str) -> None:
        """End a worker and what it holds, at once. No event follows."""
        ...

    def shutdown(self) -> None:
        """End all workers."""
        ...


@dataclass(slots=True, kw_only=True)
class _LocalWorker:
    spec: "ModelSpec"
    loaded: ModelWorker | None = None
    units: deque[UnitSpec] = field(default_factory=deque)
    stream: Iterator[Event] | None = None


class LocalExecutor:
    """The same sweep in this process with one worker, under a debugger if you like.

    A hang can't be ended here and a crash ends the sweep: deadlines and deaths take Ray.
    """

    def __init__(self, *, threads: int, worker_class: type[ModelWorker] = ModelWorker) -> None:
        """`threads` of torch on the CPU, as in the run's identity."""
        self._threads = threads
        self._worker_class = worker_class
        self._workers: dict[str, _LocalWorker] = {}

    def has_room(self, gpus: int) -> bool:
        """One worker at a time."""
        return not self._workers

    def start_worker(self, worker: str, spec: "ModelSpec", gpus: int) -> None:
        """The load itself happens in the next `poll`."""
        self._workers[worker] = _LocalWorker(spec=spec)

    def submit(self, worker: str, unit: UnitSpec) -> None:
        """As the interface says; nothing is decoded ahead here."""
        self._workers[worker].units.append(unit)

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        """Do one step of work and say what came of it; sleep if there is none."""
        for name, worker in self._workers.items():
            if worker.loaded is None:
                return [self._load(name, worker)]
            if worker.units:
                return [self._step(name, worker, worker.loaded)]
        time.sleep(timeout_s)
        return []

    def leaving(self) -> frozenset[str]:
        """This process stays where it is."""
        return frozenset()

    def kill(self, worker: str) -> None:
        """Drop the worker's model and its units."""
        self._workers.pop(worker, None)

    def shutdown(self) -> None:
        """Drop all workers."""
        self._workers.clear()

    def _load(self, name: str, worker: _LocalWorker) -> ExecutorEvent:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            worker.loaded = self._worker_class(name, worker.spec, device, self._threads)
        except Exception as error:  # as on Ray: whatever the constructor raises is a failed load
            return self._died(name, FailureKind.LOAD, error)
        return Ready(worker=name, where=worker.loaded.about()[1])

    def _step(self, name: str, worker: _LocalWorker, loaded: ModelWorker) -> ExecutorEvent:
        unit = worker.units[0]
        try:
            if worker.stream is None:
                decoded = decode_unit(unit, loaded.about()[0])
                worker.stream = loaded.run_unit(unit, decoded)
            event = next(worker.stream, None)
        except Exception as error:  # as on Ray: what a unit raises, and does not yield, is fatal
            kind = FailureKind.HOST_MEMORY if isinstance(error, MemoryError) else FailureKind.FATAL
            return self._died(name, kind, error)
        if event is not None:
            return Yielded(worker=name, event=event)
        worker.stream = None
        worker.units.popleft()
        return Ended(worker=name, unit_id=unit.unit_id)

    def _died(self, name: str, kind: FailureKind, error: Exception) -> Died:
        self._workers.pop(name)
        text = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}"
        return Died(worker=name, kind=kind, message=message, traceback=text)


@dataclass(slots=True, kw_only=True)
class _Flight:
    unit: UnitSpec
    stream: Any  # ObjectRefGenerator of Event
    decoded: Any  # ObjectRef of Decoded | UnitFailure


@dataclass(slots=True, kw_only=True)
class _RayWorker:
    actor: Any
    gpus: int
    about: Any  # ObjectRef, until the model is loaded
    media_spec: "MediaSpec | None" = None
    node: str = ""
    flights: deque[_Flight] = field(default_factory=deque)

    @property
    def awaited(self) -> Any:
        """What to wait for: the load, then the oldest unit's stream; None when idle."""
        if self.media_spec is None:
            return self.about
        return self.flights[0].stream if self.flights else None


class RayExecutor:
    """An actor a worker, events streamed back as they come, media decoded by tasks beside them."""

    def __init__(
        self,
        *,
        workers: int,
        threads: int,
        address: str | None = None,
        worker_class: type[ModelWorker] = ModelWorker,
    ) -> None:
        """Start Ray on this machine, or join the cluster at `address` ("auto", "host:port").

        At most `workers` at a time. Without GPUs in the cluster they run on CPUs, with `threads`
        of torch each. Raises ConfigError when the cluster can't be reached.
        """
        self._owns_ray = start_ray(address)
        self._most = workers
        self._all_gpus = cluster_gpus()
        self._threads = threads
        self._worker_class = worker_class
        self._workers: dict[str, _RayWorker] = {}

    def has_room(self, gpus: int) -> bool:
        """Neither too many workers nor too few GPUs. Raises ConfigError if it can never be."""
        if self._all_gpus and gpus > self._all_gpus:
            raise ConfigError(
                f"gpus_per_model is {gpus}, but the cluster has at most {self._all_gpus} GPUs"
            )
        used = sum(worker.gpus for worker in self._workers.values())
        enough = not self._all_gpus or used + gpus <= self._all_gpus
        return enough and len(self._workers) < self._most

    def start_worker(self, worker: str, spec: "ModelSpec", gpus: int) -> None:
        """Begin to load a model; the actor waits for a node that is still coming up."""
        gpus = gpus if self._all_gpus else 0
        actor = start_actor(self._worker_class, worker, spec, gpus, self._threads)
        about = actor.about.remote()
        self._workers[worker] = _RayWorker(actor=actor, gpus=gpus, about=about)

    def submit(self, worker: str, unit: UnitSpec) -> None:
        """Queue a unit; raises KeyError for a worker that is gone, ValueError before Ready."""
        known = self._workers[worker]
        if known.media_spec is None:
            raise ValueError(f"worker {worker} has not loaded its model yet")
        stream, decoded = submit_unit(known.actor, unit, known.media_spec)
        known.flights.append(_Flight(unit=unit, stream=stream, decoded=decoded))

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        """One event of each worker that has any; waits at most `timeout_s` for the first."""
        import ray

        awaited = {
            name: handle for name, w in self._workers.items() if (handle := w.awaited) is not None
        }
        if not awaited:
            time.sleep(timeout_s)
            return []
        handles = list(awaited.values())
        ready, _ = ray.wait(handles, num_returns=1, timeout=timeout_s)
        if ready and len(handles) > 1:
            ready, _ = ray.wait(handles, num_returns=len(handles), timeout=0)
        return [
            self._take(name)
            for name, handle in awaited.items()
            if any(handle is one or handle == one for one in ready)
        ]

    def leaving(self) -> frozenset[str]:
        """Workers on nodes that drain (spot pre-emption, scale-down)."""
        nodes = draining_nodes()
        return frozenset(name for name, w in self._workers.items() if w.node in nodes)

    def kill(self, worker: str) -> None:
        """Kill the actor, and the decoding for what it held."""
        import ray

        known = self._workers.pop(worker, None)
        if known is None:
            return
        ray.kill(known.actor, no_restart=True)
        for flight in known.flights:
            ray.cancel(flight.decoded, force=True)

    def shutdown(self) -> None:
        """Kill all actors; stop Ray if this executor started it."""
        import ray

        for worker in list(self._workers):
            self.kill(worker)
        if self._owns_ray:
            ray.shutdown()

    def _take(self, name: str) -> ExecutorEvent:
        import ray

        worker = self._workers[name]
        try:
            if worker.media_spec is None:
                worker.media_spec, where, worker.node = ray.get(worker.about)
                return Ready(worker=name, where=where)
            flight = worker.flights[0]
            return Yielded(worker=name, event=ray.get(next(flight.stream)))
        except StopIteration:
            worker.flights.popleft()
            return Ended(worker=name, unit_id=flight.unit.unit_id)
        except ray.exceptions.RayError as error:
            return self._lost(name, worker, error)

    def _lost(self, name: str, worker: _RayWorker, error: Exception) -> ExecutorEvent:
        """Tell a decoding task that crashed, which costs one sample, from a worker's death."""
        if worker.flights and (cause := _decoding_error(worker.flights[0])) is not None:
            flight = worker.flights.popleft()
            return Yielded(worker=name, event=_decode_crash(flight.unit, cause))
        kind = death_kind(error)
        if kind is FailureKind.WORKER_DEATH and name in self.leaving():
            kind = FailureKind.PREEMPTION
        self.kill(name)
        text = "".join(traceback.format_exception(error))
        return Died(worker=name, kind=kind, message=str(error), traceback=text)


def death_kind(error: Exception) -> FailureKind:
    """What a Ray error says of the worker it came from. The order matters.

    An exception of ours arrives as RayTaskError (or UnserializableException, if its class does not
    pickle). Memory kills are no RayActorError. A node that went away hard is first reported as
    ActorUnavailableError: the stream is lost either way, so the worker counts as dead.
    """
    from ray import exceptions

    match error:
        case exceptions.RayTaskError():
            ran_out = isinstance(error.cause, MemoryError)
            return FailureKind.HOST_MEMORY if ran_out else FailureKind.FATAL
        case exceptions.UnserializableException():
            return FailureKind.FATAL
        case exceptions.OutOfMemoryError():
            return FailureKind.HOST_MEMORY
        case exceptions.ActorDiedError() if error.actor_init_failed:
            return FailureKind.LOAD
        case exceptions.RayActorError() if error.preempted:
            return FailureKind.PREEMPTION
    return FailureKind.WORKER_DEATH


def _decoding_error(flight: _Flight) -> Exception | None:
    """How the decoding task itself ended, when it did not end with data."""
    import ray

    done, _ = ray.wait([flight.decoded], timeout=0)
    if not done:
        return None
    try:
        ray.get(flight.decoded)
    except ray.exceptions.RayError as error:
        return error
    return None


def _decode_crash(unit: UnitSpec, error: Exception) -> UnitFailure:
    """The decoding process died: as data, worth another try, host memory called by its name."""
    from ray import exceptions

    failure = replace(decode_failure(unit, error), retryable=True)
    if isinstance(error, exceptions.OutOfMemoryError):
        return replace(failure, error="MemoryError")
    return failure
