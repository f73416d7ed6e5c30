"""What a session has behind it: counts for the display, and which tasks have ended."""

from collections import Counter
from collections.abc import Collection, Mapping

from avflow.orchestrator.activity import Activity
from avflow.orchestrator.progress import Snapshot
from avflow.orchestrator.queue import Counts
from avflow.orchestrator.session import Worker
from avflow.workers.protocol import CurveDone, Finished, SampleDone, UnitSpec


class Tally:
    """Counts of one session's units, by what came out of them and which of them have ended."""

    def __init__(self, units: Mapping[str, UnitSpec]) -> None:
        self._units = len(units)
        self._curves = sum(len(unit.wanted) for unit in units.values())
        self._cells = 0  # that came out
        self._activity = Activity()
        self._open = set(units)
        self._groups = Counter(_group(unit) for unit in units.values())
        self._cost = sum(unit.cost for unit in units.values())
        self._behind = dict.fromkeys(units, 0.0)  # of each unit's cost

    def came_out(self, unit: UnitSpec, done: Finished) -> None:
        """A curve of the unit, for the first time."""
        self._behind[unit.unit_id] += unit.cost / len(unit.wanted)
        self._cells += len(done.center_layer) if isinstance(done, CurveDone) else 0

    def ended(self, unit: UnitSpec) -> bool:
        """The unit has ended, well or not. Whether it is the last of its (model, data set, task);
        False if that has been said before."""
        if unit.unit_id not in self._open:
            return False
        self._open.remove(unit.unit_id)
        self._behind[unit.unit_id] = unit.cost
        group = _group(unit)
        self._groups[group] -= 1
        return not self._groups[group]

    def sample(self, done: SampleDone, now: float) -> None:
        """A sample came to its end. `now` in seconds of the clock of `snapshot`."""
        self._activity.add(done, now)

    def snapshot(
        self,
        *,
        counts: Counts,
        workers: Collection[Worker],
        failures: int,
        working_s: float,
        draining: bool,
        now: float,
    ) -> Snapshot:
        """Where the session stands."""
        ready = sum(worker.ready for worker in workers)
        busy, decoding = self._activity.shares(now, ready)
        return Snapshot(
            units=self._units,
            units_done=counts.done,
            units_failed=counts.failed,
            curves=self._curves,
            curves_ended=self._curves - counts.curves_missing,
            failures=failures,
            workers_ready=ready,
            workers_loading=len(workers) - ready,
            share=sum(self._behind.values()) / self._cost if self._cost else 1.0,
            working_s=working_s,
            draining=draining,
            units_running=counts.leased,
            cells=self._cells,
            model_busy=busy,
            decoding=decoding,
            peak_bytes=self._activity.peak_bytes,
        )


def _group(unit: UnitSpec) -> tuple[str, str, str]:
    return unit.model, unit.sample.dataset, unit.sample.task
