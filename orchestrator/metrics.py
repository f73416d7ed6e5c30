"""A session's numbers for Ray's dashboard and its Prometheus, beside what the terminal shows."""

import resource
from typing import Any

from avflow.orchestrator.progress import Progress, Snapshot

EVERY_S = 5.0


class Metered:
    """A progress display that also feeds `ray.util.metrics`, every five seconds."""

    def __init__(self, shown: Progress, sweep: str) -> None:
        """Ray has to be up."""
        from ray.util.metrics import Counter, Gauge

        tags = {"sweep": sweep}

        def gauge(name: str, about: str, *keys: str) -> Any:
            made = Gauge(f"avflow_{name}", description=about, tag_keys=("sweep", *keys))
            made.set_default_tags(tags)
            return made

        def counter(name: str, about: str) -> Any:
            made = Counter(f"avflow_{name}", description=about, tag_keys=("sweep",))
            made.set_default_tags(tags)
            return made

        self._shown = shown
        self._next = float("-inf")
        self._last: Snapshot | None = None
        self._at = 0.0
        self._units = gauge("units", "Samples by state", "state")
        self._workers = gauge("workers", "Workers by state", "state")
        self._rate = gauge("cells_per_second", "Cells that came out")
        self._busy = gauge(
            "model_busy_share",
            "Share of workers' time in which a model ran, by the samples' own seconds. What NVML "
            "says of the GPUs is ray_node_gpus_utilization",
        )
        self._decoding = gauge("decoders_busy", "Decoders at work")
        self._memory = gauge("memory_bytes", "Peak of a worker's device; the driver's", "of")
        self._cells = counter("cells_total", "Cells that came out")
        self._failures = counter("failures_total", "Failures for good")

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Pass it on; export it if it is time."""
        self._shown.show(snapshot, now)
        if now >= self._next:
            self._export(snapshot, now)

    def say(self, text: str) -> None:
        """Pass it on."""
        self._shown.say(text)

    def close(self) -> None:
        """Pass it on."""
        self._shown.close()

    def _export(self, new: Snapshot, now: float) -> None:
        states = {
            "pending": new.units - new.units_running - new.units_done - new.units_failed,
            "running": new.units_running,
            "done": new.units_done,
            "failed": new.units_failed,
        }
        for state, units in states.items():
            self._units.set(units, tags={"state": state})
        for state, workers in (("ready", new.workers_ready), ("loading", new.workers_loading)):
            self._workers.set(workers, tags={"state": state})
        before = self._last
        cells = new.cells - (before.cells if before else 0)
        failures = new.failures - (before.failures if before else 0)
        if cells > 0:
            self._cells.inc(cells)
        if failures > 0:
            self._failures.inc(failures)
        if before is not None and now > self._at:
            self._rate.set(cells / (now - self._at))
        self._busy.set(new.model_busy or 0.0)
        self._decoding.set(new.decoding)
        self._memory.set(new.peak_bytes, tags={"of": "worker"})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._memory.set(peak, tags={"of": "driver"})
        self._last, self._at, self._next = new, now, now + EVERY_S
