"""What a failure means: kind of failure x tries so far -> action. Pure: no Ray, no clock.

Each kind has a budget of its own, counted for the one curve (or sample) that is blamed, so that
a pre-empted node never uses up the patience meant for a bad file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from avflow.workers.protocol import UnitFailure, UnitSpec

NODE_LOST = "NodeLost"  # what an executor calls the error of a unit whose media are gone


class FailureKind(StrEnum):
    """Why an attempt failed."""

    EXCEPTION = "exception"  # yielded as data; the same inputs would fail again
    TRANSIENT = "transient"  # yielded as data, marked retryable (I/O)
    GPU_MEMORY = "gpu_memory"  # yielded as data: the accelerator ran out of memory
    HOST_MEMORY = "host_memory"  # the worker was killed for, or reported, host memory
    WORKER_DEATH = "worker_death"  # the process is gone: signal, segmentation fault
    NODE_LOST = "node_lost"  # its machine is gone without a word, or the machine with its media
    FATAL = "fatal"  # raised out of the worker's call: its process can't be trusted any more
    TIMEOUT = "timeout"  # silent for longer than the deadline, and killed
    PREEMPTION = "preemption"  # the node was taken away as announced: nobody's fault
    LOAD = "load"  # the worker could not load its model; another try might
    UNSUPPORTED = "unsupported"  # nor would another try: not this checkpoint, or not on these GPUs
    STORE = "store"  # results can't be written


class Action(StrEnum):
    """What to do about it."""

    RETRY = "retry"
    RETRY_SPLIT = "retry_split"  # again, with batches half the size
    RECYCLE_WORKER = "recycle_worker"  # again, on a new worker
    QUARANTINE = "quarantine"  # record a terminal failure, go on with the rest
    ABORT_MODEL = "abort_model"  # leave what this model still has for a later run
    ABORT_SWEEP = "abort_sweep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Tries a curve gets before the last word of each kind of failure; pre-emption has no end.

    A lost node is hardly ever its work's fault, but something that takes down every machine that
    it is given to must not have them all: hence a budget, and a larger one.

    A breaker trips, and the model is given up, when workers died on more than
    `breaker_units` + (live workers of the model) different units within `breaker_s` seconds:
    that is a broken node or driver, not a poisonous sample.
    """

    exception: int = 1
    transient: int = 2
    gpu_memory: int = 5
    host_memory: int = 3
    worker_death: int = 3
    node_lost: int = 6
    fatal: int = 3
    timeout: int = 3
    load: int = 2
    store: int = 1
    breaker_units: int = 5
    breaker_s: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"budget {field.name} must be at least 1")


# kind -> what to do while tries are left, and the last word.
_TABLE: Mapping[FailureKind, tuple[Action, Action]] = {
    FailureKind.EXCEPTION: (Action.RETRY, Action.QUARANTINE),
    FailureKind.TRANSIENT: (Action.RETRY, Action.QUARANTINE),
    FailureKind.GPU_MEMORY: (Action.RETRY_SPLIT, Action.QUARANTINE),
    FailureKind.HOST_MEMORY: (Action.RETRY, Action.QUARANTINE),
    FailureKind.WORKER_DEATH: (Action.RETRY, Action.QUARANTINE),
    FailureKind.NODE_LOST: (Action.RETRY, Action.QUARANTINE),
    FailureKind.FATAL: (Action.RECYCLE_WORKER, Action.QUARANTINE),
    FailureKind.TIMEOUT: (Action.RETRY, Action.QUARANTINE),
    FailureKind.PREEMPTION: (Action.RETRY, Action.RETRY),
    FailureKind.LOAD: (Action.RETRY, Action.ABORT_MODEL),
    FailureKind.UNSUPPORTED: (Action.ABORT_MODEL, Action.ABORT_MODEL),
    FailureKind.STORE: (Action.ABORT_SWEEP, Action.ABORT_SWEEP),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """The table with its budgets."""

    budgets: Budgets = Budgets()

    def decide(self, kind: FailureKind, tries: int) -> Action:
        """`tries` failures of this kind so far, the present one included (so at least 1)."""
        again, last_word = _TABLE[kind]
        if again is last_word:  # whatever the tries: there is no budget to look up
            return again
        budget: int = getattr(self.budgets, kind.value)
        return again if tries < budget else last_word

    def isolates(self, deaths: int) -> bool:
        """Whether to lease a unit's curves one at a time, after so many deaths.

        From the third on, so a budget of 3 is the least that is fair to the innocent.
        """
        return deaths > 1

    def sample_is_poison(self, silent_deaths: int) -> bool:
        """Whether to blame the whole sample: so many deaths in a row without a single curve.

        Two curves may use up their tries first; a third suspect means that the sample itself
        (its media, its baseline) is what kills.
        """
        return silent_deaths > 2 * self.budgets.worker_death

    def breaker_trips(
        self, deaths: Iterable[tuple[float, str]], now: float, live_workers: int
    ) -> bool:
        """`deaths` of one model as (seconds, unit)."""
        recent = {unit for at, unit in deaths if now - at <= self.budgets.breaker_s}
        return len(recent) > self.budgets.breaker_units + live_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of a failure: one row of the failures table, and what to do now.

    `failure` is as yielded, or made up by the queue for a death or a time-out. `curves` are the
    curves that this decision ends (only if `terminal`). `attempt` counts the unit's leases from 1.
    `model` alone is set, with unit None, for failures that no unit is to blame for.
    """

    action: Action
    kind: FailureKind
    model: str
    unit: UnitSpec | None
    failure: UnitFailure
    attempt: int
    curves: tuple[str, ...] = ()

    @property
    def terminal(self) -> bool:
        """Whether these curves (or, with curve None, the sample) have failed for good."""
        return self.action is Action.QUARANTINE


def classify(failure: UnitFailure) -> FailureKind:
    """The kind of a failure that a worker yielded as data."""
    if failure.error == NODE_LOST:
        return FailureKind.NODE_LOST
    if failure.error == "MemoryError":
        return FailureKind.HOST_MEMORY
    if "OutOfMemory" in failure.error:  # torch.OutOfMemoryError, torch.cuda.OutOfMemoryError
        return FailureKind.GPU_MEMORY
    return FailureKind.TRANSIENT if failure.retryable else FailureKind.EXCEPTION
