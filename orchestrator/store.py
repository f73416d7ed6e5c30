"""What comes out of a sweep, buffered by whole curves and committed as immutable Parquet parts.

Exactly once = at least once + a key that says what a row is + readers that drop doubles. A part
is one (table, model, data set); a writer's id in its name means that writers never collide.
A session that is killed loses what it had buffered: at most `COMMIT_UNITS` units or `COMMIT_S`.
"""

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa

from avflow.orchestrator.errors import StoreError
from avflow.orchestrator.parts import serialise, write_atomically
from avflow.orchestrator.paths import TABLES, RunPaths, TableName
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.policy import Decision
from avflow.orchestrator.schema import (
    SCHEMA_VERSION,
    SCHEMAS,
    Columns,
    cell_rows,
    failure_row,
    intervention_row,
    probe_rows,
    sample_row,
)
from avflow.workers.protocol import (
    CurveDone,
    Finished,
    InterventionDone,
    ProbeDone,
    SampleDone,
    UnitSpec,
)

COMMIT_UNITS = 64
COMMIT_S = 15.0

# A sample's row says that its curves are there, so it goes last: a kill in between leaves a unit
# that is taken up again and finds its curves stored.
_ORDER: tuple[TableName, ...] = (*(name for name in TABLES if name != "samples"), "samples")

_Partition = tuple[TableName, str, str]  # table, model, data set


class ResultStore:
    """One session's writer. Call `commit` before it ends."""

    def __init__(
        self,
        paths: RunPaths,
        plan: Plan,
        *,
        writer_id: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`writer_id`: 8 hexadecimal digits, drawn if None; `clock` in seconds."""
        self._paths = paths
        self._plan = plan
        self._writer = writer_id or secrets.token_hex(4)
        self._clock = clock
        self._started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._parts = 0
        self._units = 0
        self._committed_at = clock()
        self._buffers: dict[_Partition, list[Columns]] = {}

    def add_curve(self, unit: UnitSpec, done: Finished) -> None:
        """Anything with a key: a curve, an intervention, a probe.

        Raises ValueError when a curve is not as planned, KeyError for what is not planned.
        """
        match done:
            case CurveDone():
                planned = self._plan.curve(unit, done.curve)
                self._add("cells", unit, cell_rows(unit, planned, done))
                return
            case InterventionDone():
                table: TableName = "interventions"
                rows = intervention_row(unit, done)
            case ProbeDone():
                table, rows = "probes", probe_rows(unit, done)
        if done.curve not in {spec.key for spec in unit.extras}:
            raise KeyError(done.curve)
        self._add(table, unit, rows)

    def add_sample(self, unit: UnitSpec, done: SampleDone, *, worker: str, attempt: int) -> None:
        """The sample's own row; `worker` is `host:pid`, `attempt` counts from 1."""
        row = sample_row(unit, done, worker=worker, attempt=attempt, at=datetime.now(UTC))
        self._add("samples", unit, row)
        self._units += 1

    def add_failure(self, decision: Decision, *, worker: str) -> None:
        """A failed attempt."""
        dataset = decision.unit.sample.dataset if decision.unit is not None else ""
        row = failure_row(decision, worker=worker, at=datetime.now(UTC))
        self._buffers.setdefault(("failures", decision.model, dataset), []).append(row)

    def tick(self) -> bool:
        """Commit if enough has gathered, or long enough has passed. Whether it did."""
        due = self._clock() - self._committed_at >= COMMIT_S
        if not (self._units >= COMMIT_UNITS or (due and self._buffers)):
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """Make durable all that was added. Raises StoreError; what failed stays buffered."""
        for partition in sorted(self._buffers, key=lambda key: (_ORDER.index(key[0]), key)):
            try:
                self._write(partition, self._buffers[partition])
            except OSError as error:
                folder = self._paths.partition(*partition)
                raise StoreError(f"{folder}: results can't be written: {error}") from error
            del self._buffers[partition]
        self._units = 0
        self._committed_at = self._clock()

    def _add(self, table: TableName, unit: UnitSpec, rows: Columns) -> None:
        self._buffers.setdefault((table, unit.model, unit.sample.dataset), []).append(rows)

    def _write(self, partition: _Partition, buffered: list[Columns]) -> None:
        schema = SCHEMAS[partition[0]]
        metadata = {"avflow.schema_version": str(SCHEMA_VERSION), "avflow.writer": self._writer}
        columns = [
            pa.array(
                [value for rows in buffered for value in rows[name]], type=schema.field(name).type
            )
            for name in schema.names
        ]
        table = pa.Table.from_arrays(columns, schema=schema.with_metadata(metadata))
        self._parts += 1
        name = f"part-{self._started}-{self._writer}-{self._parts:06d}.parquet"
        path = self._paths.partition(*partition) / name
        write_atomically(path, serialise(table), self._paths.temporary)
