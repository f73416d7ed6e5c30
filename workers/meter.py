"""Seconds by stage and peak memory of one sample's work."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from avflow.workers.protocol import Stage


class Meter:
    """Times the stages of a unit. `stage` is the one under way, or the one that an error left."""

    def __init__(self, device: torch.device) -> None:
        self.stage: Stage = "prepare"
        self._device = device
        self._seconds: dict[Stage, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the time within to a stage's seconds, work queued on a GPU included, and less what
        went to stages within this one."""
        outer, self.stage = self.stage, stage
        began, others = self._now(), sum(self._seconds.values())
        yield
        inner = sum(self._seconds.values()) - others
        self._seconds[stage] = self.seconds(stage) + self._now() - began - inner
        self.stage = outer

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def seconds(self, stage: Stage) -> float:
        """Seconds spent in a stage so far."""
        return self._seconds.get(stage, 0.0)

    @property
    def peak_bytes(self) -> int:
        """On a GPU the sample's peak of allocated memory; on a CPU the process's peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
