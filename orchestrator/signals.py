"""Ctrl-C, SIGTERM and a terminal that goes away: the first asks to stop in order, the second stops
at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Watches for SIGINT, SIGTERM and SIGHUP. `number` is the first that came, None so far."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        """`on_first` is called from the handler: let it do little."""
        self.number: int | None = None
        self._on_first = on_first

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, a first signal is noted and a second raises KeyboardInterrupt where it strikes.

        Only the main thread may set handlers; in another this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOPS}
        if before[signal.SIGHUP] is signal.SIG_IGN:  # under nohup a terminal may go
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._strike)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _strike(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGHUP:
            return  # nobody asks twice with it: a shell and its terminal may both send one
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self._on_first()
