"""Where a session's results go, as the coordinator sees it."""

from typing import Protocol

from avflow.orchestrator.policy import Decision
from avflow.workers.protocol import Finished, SampleDone, UnitSpec


class Recorder(Protocol):
    """Where results go. Buffers, and makes durable what it holds in `commit`."""

    def add_curve(self, unit: UnitSpec, done: Finished) -> None:
        """A curve, an intervention or a probe to keep."""
        ...

    def add_sample(self, unit: UnitSpec, done: SampleDone, *, worker: str, attempt: int) -> None:
        """A sample's own row; `worker` is `host:pid`."""
        ...

    def add_failure(self, decision: Decision, *, worker: str) -> None:
        """A failed attempt."""
        ...

    def tick(self) -> bool:
        """Called often: commit if enough has gathered or long enough has passed. Whether it did."""
        ...

    def commit(self) -> None:
        """Make durable all that was handed in."""
        ...
