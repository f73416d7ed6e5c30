"""Units on Ray: an actor a worker, decoding tasks beside them, and what Ray's errors mean."""

import re
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from avflow.orchestrator.cluster import (
    actor_is_dead,
    actor_place,
    cluster_room,
    draining_nodes,
    living_nodes,
    log_tail,
    node_is_gone,
    start_ray,
)
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.executors import Died, Ended, ExecutorEvent, Ready, Yielded
from avflow.orchestrator.policy import NODE_LOST, FailureKind
from avflow.workers.actor import ModelWorker, decode_ahead, start_actor, submit_unit
from avflow.workers.decode import decode_failure, same_media
from avflow.workers.protocol import UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.datasets.media import MediaSpec
    from avflow.workers.models.base import ModelSpec


@dataclass(slots=True, kw_only=True)
class _Flight:
    unit: UnitSpec
    stream: Any  # ObjectRefGenerator of Event
    decoded: Any  # ObjectRef of Decoded | UnitFailure
    given_up: float | None = None  # seconds: when its decoding was cancelled
    spoilt: bool = False  # its media could not be decoded: another try begins anew


@dataclass(slots=True, kw_only=True)
class _RayWorker:
    actor: Any
    gpus: int
    about: Any  # ObjectRef, until the model is loaded
    media_spec: "MediaSpec | None" = None
    node: str = ""
    unreachable: tuple[float, Exception] | None = None  # since when, and how Ray says so
    flights: deque[_Flight] = field(default_factory=deque)

    @property
    def awaited(self) -> Any:
        """What to wait for: the load, then the oldest unit's stream; None when idle or lost."""
        if self.unreachable is not None:
            return None
        if self.media_spec is None:
            return self.about
        return self.flights[0].stream if self.flights else None

    def spoil(self, decoded: Any) -> None:
        """Share these media with no unit more: they could not be decoded."""
        for flight in self.flights:
            flight.spoilt = flight.spoilt or flight.decoded == decoded


class RayExecutor:
    """An actor a worker, events streamed back as they come, media decoded by tasks beside them."""

    def __init__(
        self,
        *,
        workers: int | None,
        threads: int,
        address: str | None = None,
        worker_class: type[ModelWorker] = ModelWorker,
    ) -> None:
        """Start Ray on this machine, or join the cluster at `address` ("auto", "host:port").

        At most `workers` at a time; None: as many as the GPUs hold. Without GPUs in the cluster
        workers run on CPUs, with `threads` of torch each; None: as many as that fills.
        Raises ConfigError when the cluster can't be reached.
        """
        self._owns_ray = start_ray(address)
        self._wanted = workers
        self._threads = threads
        self._avoided: frozenset[str] = frozenset()
        self._has_gpus = bool(cluster_room()[0])  # CPU workers are no stand-in for GPUs that died
        self._most_gpus = 0
        self._look()
        self._worker_class = worker_class
        self._workers: dict[str, _RayWorker] = {}

    def has_room(self, gpus: int) -> bool:
        """Neither too many workers nor too few GPUs. Raises ConfigError if it can never be."""
        if self._has_gpus and gpus > self._most_gpus:
            raise ConfigError(
                f"gpus_per_model is {gpus}, but no machine of the cluster has more than "
                f"{self._most_gpus} GPUs, and a model is not spread over machines"
            )
        if time.monotonic() - self._asked > _LOOK_EVERY_S:
            self._look()
        used = sum(worker.gpus for worker in self._workers.values())
        alike = sum(worker.gpus == gpus for worker in self._workers.values())
        enough = not self._has_gpus or (
            used + gpus <= sum(self._gpus)
            and alike < sum(on_node // gpus for on_node in self._gpus)
        )
        return enough and len(self._workers) < self._most

    def _look(self) -> None:
        """Nodes come and go: see what room there is now."""
        self._gpus, cpus = cluster_room(self._avoided)  # of each node
        self._most_gpus = max(self._most_gpus, *self._gpus, 0)
        room = sum(self._gpus) if self._has_gpus else max(1, cpus // self._threads)
        self._most = self._wanted or room
        self._asked = time.monotonic()

    def start_worker(self, worker: str, spec: "ModelSpec", gpus: int) -> None:
        """Begin to load a model; the actor waits for a node that is still coming up."""
        gpus = gpus if self._has_gpus else 0
        actor = start_actor(
            self._worker_class, worker, spec, gpus, self._threads, avoided=self._avoided
        )
        about = actor.about.remote()
        self._workers[worker] = _RayWorker(actor=actor, gpus=gpus, about=about)

    def submit(self, worker: str, unit: UnitSpec) -> None:
        """Queue a unit; raises KeyError for a worker that is gone, ValueError before Ready."""
        known = self._workers[worker]
        if known.media_spec is None:
            raise ValueError(f"worker {worker} has not loaded its model yet")
        alike = [f for f in known.flights if same_media(f.unit, unit) and not f.spoilt]
        decoded = alike[0].decoded if alike else decode_ahead(unit, known.media_spec)
        stream = submit_unit(known.actor, unit, decoded)
        known.flights.append(_Flight(unit=unit, stream=stream, decoded=decoded))

    def poll(self, timeout_s: float) -> list[ExecutorEvent]:
        """One event of each worker that has any; waits at most `timeout_s` for the first."""
        import ray

        events = self._verdicts()
        timeout_s = 0.0 if events else timeout_s
        awaited = {
            name: handle for name, w in self._workers.items() if (handle := w.awaited) is not None
        }
        if not awaited:
            time.sleep(timeout_s)
            return events
        handles = list(awaited.values())
        ready, _ = ray.wait(handles, num_returns=1, timeout=timeout_s)
        if ready and len(handles) > 1:
            ready, _ = ray.wait(handles, num_returns=len(handles), timeout=0)
        come = set(ready)
        for name, handle in awaited.items():
            if handle in come:
                events += self._take(name)
        return events

    def leaving(self) -> frozenset[str]:
        """Workers on nodes that drain (spot pre-emption, scale-down)."""
        nodes = draining_nodes()
        return frozenset(name for name, w in self._workers.items() if w.node in nodes)

    def waits_for_room(self, worker: str) -> bool:
        """A pending actor: no GPU is free, or the autoscaler is still at it."""
        known = self._workers.get(worker)
        return known is not None and not known.node and not actor_place(known.actor)[0]

    def avoid(self, node: str) -> bool:
        """What runs there may finish."""
        others = [
            other
            for other, room in living_nodes().items()
            if other not in self._avoided | {node}
            if not self._has_gpus or room.get("GPU", 0)
        ]
        if not others:
            return False
        self._avoided |= {node}
        self._look()
        return True

    def give_up_decoding(self, worker: str) -> bool:
        """Kill the decoding task; the worker lives on."""
        import ray

        if not self._workers[worker].flights:
            return False
        flight = self._workers[worker].flights[0]
        if flight.given_up is not None:
            return time.monotonic() - flight.given_up < _CANCEL_S
        # Wherever they lie: what is on another node counts as decoded, too.
        if ray.wait([flight.decoded], timeout=0, fetch_local=False)[0]:
            return False
        flight.given_up = time.monotonic()
        ray.cancel(flight.decoded, force=True)
        return True

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

    def _verdicts(self) -> list[ExecutorEvent]:
        """Workers out of reach of which Ray knows by now what became of them.

        Whether a process died or its whole machine takes Ray some seconds to see, and it matters:
        the one is its sample's fault, the other nobody's.
        """
        lost = [(name, w, w.unreachable) for name, w in self._workers.items() if w.unreachable]
        return [
            event
            for name, worker, (since, error) in lost
            if actor_is_dead(worker.actor) or time.monotonic() - since > _VERDICT_S
            for event in self._lost(name, worker, error)
        ]

    def _take(self, name: str) -> list[ExecutorEvent]:
        import ray

        worker = self._workers[name]
        try:
            if worker.media_spec is None:
                worker.media_spec, where, worker.node = ray.get(worker.about)
                return [Ready(worker=name, where=where, node=worker.node)]
            flight = worker.flights[0]
            event = ray.get(next(flight.stream))
            if isinstance(event, UnitFailure) and event.stage == "decode":
                worker.spoil(flight.decoded)
            return [Yielded(worker=name, event=event)]
        except StopIteration:
            worker.flights.popleft()
            return [Ended(worker=name, unit_id=flight.unit.unit_id)]
        except ray.exceptions.ActorUnavailableError as error:
            worker.unreachable = time.monotonic(), error
            return []
        except ray.exceptions.RayError as error:
            return self._lost(name, worker, error)

    def _lost(self, name: str, worker: _RayWorker, error: Exception) -> list[ExecutorEvent]:
        """Tell a decoding task that crashed, which costs one sample, from a worker's death."""
        from ray.exceptions import RayActorError

        # Never the actor's own death, whose node may have taken the decoded media along.
        of_media = bool(worker.flights) and not isinstance(error, RayActorError)
        if of_media and (cause := _decoding_error(worker.flights[0], error)) is not None:
            flight = worker.flights.popleft()
            worker.spoil(flight.decoded)
            unit_id = flight.unit.unit_id
            crash = Yielded(worker=name, event=_decode_crash(flight, cause))
            return [crash, Ended(worker=name, unit_id=unit_id)]
        kind = death_kind(error)
        node, pid = actor_place(worker.actor)
        if kind is FailureKind.WORKER_DEATH:
            kind = self._death_by_node(name, worker.node or node)
        self.kill(name)
        text = _COLOUR.sub("", str(error)).strip()  # holds the worker's own traceback, if any
        # What an exception of ours was is said at its end; of a death Ray writes what it knows.
        message = _CLASS_OF.sub("", text.splitlines()[-1]) if kind in _RAISED else text
        if kind is FailureKind.NODE_LOST:
            message = f"its machine {node} is gone: {message}"
        elif said := log_tail(node, pid):
            text += f"\n\nThe end of the worker's log:\n{said}"
        return [Died(worker=name, kind=kind, message=message, traceback=text, node=node)]

    def _death_by_node(self, name: str, node: str) -> FailureKind:
        """Why a process is gone: its node goes, as announced or not, or for reasons of its own."""
        if name in self.leaving():
            return FailureKind.PREEMPTION
        gone = bool(node) and node_is_gone(node)
        return FailureKind.NODE_LOST if gone else FailureKind.WORKER_DEATH


_LOOK_EVERY_S = 5.0
_CANCEL_S = 10.0
_VERDICT_S = 40.0
_MOMENT_S = 0.1
_HUNG = "decoding hung, or waited for a free CPU, for unit_deadline_s; it was ended"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CLASS_OF = re.compile(r"^([a-z_]\w*\.)+(?=[A-Z]\w*: )")  # the modules before an error's class
_RAISED = frozenset({FailureKind.FATAL, FailureKind.LOAD, FailureKind.UNSUPPORTED})
# Of what a constructor raised Ray keeps the text alone.
_UNSUPPORTED = re.compile(r"^(\x1b\[[0-9;]*m)*([\w.]+\.)?UnsupportedModelError: ", re.MULTILINE)


def death_kind(error: Exception) -> FailureKind:
    """What a Ray error says of the worker it came from. The order matters.

    An exception of ours arrives as RayTaskError (or UnserializableException, if its class does not
    pickle). Memory kills are no RayActorError. A node that went away hard is first reported as
    ActorUnavailableError: the stream is lost either way, so the worker counts as dead in the end.
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
            final = _UNSUPPORTED.search(str(error)) is not None
            return FailureKind.UNSUPPORTED if final else FailureKind.LOAD
        case exceptions.RayActorError() if error.preempted:
            return FailureKind.PREEMPTION
    return FailureKind.WORKER_DEATH


def _decoding_error(flight: _Flight, error: Exception) -> Exception | None:
    """How the decoding task itself ended, when it did not end with data that are still there.

    `error` is what the worker's stream ended with.
    """
    import ray

    if isinstance(cause := getattr(error, "cause", error), _media_gone()):
        return cause
    done, _ = ray.wait([flight.decoded], timeout=0, fetch_local=False)
    if not done:
        return None
    try:
        ray.get(flight.decoded, timeout=_MOMENT_S)  # an error is here already, data need not be
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as failed:
        return failed
    return None


def _media_gone() -> tuple[type[Exception], ...]:
    """What Ray says of a task or an object whose node is gone."""
    from ray.exceptions import NodeDiedError, ObjectLostError

    return NodeDiedError, ObjectLostError


def _decode_crash(flight: _Flight, error: Exception) -> UnitFailure:
    """The decoding process is gone: as data, worth another try, its cause called by its name."""
    from ray import exceptions

    failure = replace(decode_failure(flight.unit, error), retryable=True)
    if isinstance(error, _media_gone()):
        return replace(failure, error=NODE_LOST)
    if flight.given_up is not None:
        return replace(failure, error="TimeoutError", message=_HUNG)
    if isinstance(error, exceptions.OutOfMemoryError):
        return replace(failure, error="MemoryError")
    return failure
