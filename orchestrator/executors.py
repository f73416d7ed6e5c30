"""Where units run: one interface, driven by the coordinator, and the executor in this process.

The one on Ray is in `ray_executor`.
An executor starts workers (each loads one model, once), takes units and hands back events in the
order they happened on each worker. It decides nothing: no retries, no replacements, no deadlines.
"""

import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.policy import FailureKind
from avflow.workers.actor import ModelWorker
from avflow.workers.decode import Decoded, decode_unit, same_media
from avflow.workers.protocol import Event, UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has loaded its model; `where` is its `host:pid`, `node` its machine."""

    worker: str
    where: str
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yielded:
    """Something came out of the oldest unit that the worker holds."""

    worker: str
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The unit's stream is over: nothing more comes out of it. One follows each unit that was
    submitted, unless its worker died or was killed."""

    worker: str
    unit_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The worker is gone, with all units it held. LOAD, UNSUPPORTED: it never became ready.

    `traceback` ends with the end of its log, where that could still be read.
    """

    worker: str
    kind: FailureKind
    message: str
    traceback: str = ""
    node: str = ""


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

    def waits_for_room(self, worker: str) -> bool:
        """Whether a worker that was started has no machine yet, so that it is not late to load."""
        ...

    def avoid(self, node: str) -> bool:
        """Start nothing more on a machine. False, and no change, if there is no other."""
        ...

    def give_up_decoding(self, worker: str) -> bool:
        """Whether the worker's oldest unit still waits for its media; if so, fail that sample."""
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
    gpus: int
    loaded: ModelWorker | None = None
    units: deque[UnitSpec] = field(default_factory=deque)
    stream: Iterator[Event] | None = None
    last: tuple[UnitSpec, Decoded] | None = None  # the media that were decoded last


class LocalExecutor:
    """The same sweep in this process with one worker, under a debugger if you like.

    A model that hangs can't be ended here and one that crashes ends the sweep: these take Ray.
    A file that hangs or crashes its decoder costs its own sample, here too.
    """

    def __init__(self, *, threads: int, worker_class: type[ModelWorker] = ModelWorker) -> None:
        """`threads` of torch on the CPU, as in the run's identity."""
        self._threads = threads
        self._worker_class = worker_class
        self._workers: dict[str, _LocalWorker] = {}

    def has_room(self, gpus: int) -> bool:
        """One worker at a time. Raises ConfigError if the GPUs here can never do."""
        import torch

        here = torch.cuda.device_count()
        if here and gpus > here:
            raise ConfigError(f"gpus_per_model is {gpus}, but this machine has {here} GPUs")
        return not self._workers

    def start_worker(self, worker: str, spec: "ModelSpec", gpus: int) -> None:
        """The load itself happens in the next `poll`."""
        self._workers[worker] = _LocalWorker(spec=spec, gpus=gpus)

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

    def waits_for_room(self, worker: str) -> bool:
        """It is here."""
        return False

    def avoid(self, node: str) -> bool:
        """There is no other."""
        return False

    def give_up_decoding(self, worker: str) -> bool:
        """Here decoding is a part of the unit's own step."""
        return False

    def kill(self, worker: str) -> None:
        """Drop the worker's model and its units."""
        self._workers.pop(worker, None)

    def shutdown(self) -> None:
        """Drop all workers."""
        self._workers.clear()

    def _load(self, name: str, worker: _LocalWorker) -> ExecutorEvent:
        from avflow.workers.models.base import NotNowError, UnsupportedModelError
        from avflow.workers.models.placement import cuda_devices

        try:
            devices = cuda_devices(worker.gpus)
            worker.loaded = self._worker_class(name, worker.spec, devices, self._threads)
        except NotNowError as error:
            return self._died(name, FailureKind.LOAD, error)
        except UnsupportedModelError as error:
            return self._died(name, FailureKind.UNSUPPORTED, error)
        except Exception as error:  # as on Ray: whatever the constructor raises is a failed load
            return self._died(name, FailureKind.LOAD, error)
        return Ready(worker=name, where=worker.loaded.about()[1])

    def _step(self, name: str, worker: _LocalWorker, loaded: ModelWorker) -> ExecutorEvent:
        unit = worker.units[0]
        try:
            if worker.stream is None:
                worker.stream = loaded.run_unit(unit, _decoded(unit, worker, loaded))
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


def _decoded(unit: UnitSpec, worker: _LocalWorker, loaded: ModelWorker) -> Decoded | UnitFailure:
    """The unit's media; those of the unit before it, if they are the same."""
    if worker.last is not None and same_media(worker.last[0], unit):
        return worker.last[1]
    worker.last = None  # not both in memory
    decoded = decode_unit(unit, loaded.about()[0])
    if isinstance(decoded, Decoded):
        worker.last = unit, decoded
    return decoded
