"""How busy models and decoders were in the last minutes, from what samples say of themselves."""

from collections import deque

from avflow.workers.protocol import SampleDone

WINDOW_S = 120.0


class Activity:
    """Seconds of work that finished lately. A sample counts when it ends, so shares lag by one."""

    def __init__(self) -> None:
        self._done: deque[tuple[float, float, float]] = deque()  # at, model's, decoder's seconds
        self._since: float | None = None
        self.peak_bytes = 0

    def add(self, done: SampleDone, now: float) -> None:
        """A sample has ended. `now` in seconds of any clock."""
        self._since = now if self._since is None else self._since
        self._done.append((now, done.encode_s + done.prefill_s + done.replay_s, done.decode_s))
        self.peak_bytes = max(self.peak_bytes, done.peak_bytes)

    def shares(self, now: float, workers: int) -> tuple[float | None, float]:
        """(share of the workers' time in which a model ran, decoders at work on average).

        None while nothing is known.
        """
        while self._done and self._done[0][0] < now - WINDOW_S:
            self._done.popleft()
        if self._since is None or not workers:
            return None, 0.0
        window = min(WINDOW_S, now - self._since)
        if window < 1.0:
            return None, 0.0
        model, decode = (sum(one[kind] for one in self._done) for kind in (1, 2))
        return min(1.0, model / (window * workers)), decode / window
