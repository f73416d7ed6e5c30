"""What a person sees while a sweep runs: a live line on a terminal, plain lines elsewhere.

And what they can read afterwards: a log of JSON lines in the run folder, one file a session.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from avflow.orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars

PLAIN_EVERY_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Where a session stands. `share` is the part of its expected cost that is behind it, 0 to 1;
    `working_s` the seconds since the first worker was ready."""

    units: int
    units_done: int
    units_failed: int
    curves: int
    curves_ended: int
    failures: int
    workers_ready: int
    workers_loading: int
    share: float
    working_s: float
    draining: bool = False
    units_running: int = 0
    cells: int = 0  # that came out
    model_busy: float | None = None  # share of workers' time in which a model ran; None: not known
    decoding: float = 0.0  # decoders at work, on average
    peak_bytes: int = 0  # of a worker's device

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the pace so far; None while there is no pace yet."""
        if self.share <= 0 or self.working_s <= 0:
            return None
        return self.working_s * (1 - self.share) / self.share

    def line(self) -> str:
        """One line of plain text."""
        return " · ".join([self._samples(), self._work(), self._eta()])

    def lines(self) -> tuple[str, str]:
        """The same for a terminal of 80 columns: what goes beside the bar, and what below it."""
        return f"{self._samples()} · {self._eta()}", self._work()

    def _samples(self) -> str:
        running = f" ({self.units_running} running)" if self.units_running else ""
        return f"{self.units_done + self.units_failed}/{self.units} samples{running}"

    def _eta(self) -> str:
        return "stopping" if self.draining else f"ETA {duration(self.eta_s)}"

    def _work(self) -> str:
        workers = f"{self.workers_ready} workers"
        if self.workers_loading:
            workers += f" (+{self.workers_loading} loading)"
        if self.model_busy is not None:
            # Of wall time, by what samples say they took; what the GPU itself says is Ray's.
            workers += f", running {self.model_busy:.0%} of the time, {self.decoding:.1f} decoding"
        return f"{self.curves_ended}/{self.curves} curves · {self.failures} failures · {workers}"


def duration(seconds: float | None) -> str:
    """`1:02:03`, `4:05`, or `-:--` for None."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(Protocol):
    """Somewhere to show a session."""

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Called often; shows as often as suits it. `now` in seconds of any clock."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None:
        """Leave the screen in order."""
        ...


class Silent:
    """Shows nothing."""

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Plain:
    """A line every ten seconds, and one at the end."""

    def __init__(self, stream: TextIO, every_s: float = PLAIN_EVERY_S) -> None:
        self._stream = stream
        self._every_s = every_s
        self._next = float("-inf")
        self._last: Snapshot | None = None
        self._shown: Snapshot | None = None

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Print if it is time."""
        self._last = snapshot
        if now >= self._next:
            self._next = now + self._every_s
            self._shown = snapshot
            self.say(snapshot.line())

    def say(self, text: str) -> None:
        """Print now."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Print how it ended."""
        if self._last is not None and self._last != self._shown:
            self.say(self._last.line())


class Live:
    """A bar with ETA that stays at the bottom of the terminal, and the counts below it."""

    def __init__(self, console: "Console") -> None:
        from rich.console import Group, RenderableType
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        class Bars(Progress):
            def get_renderable(self) -> RenderableType:
                below = Text(self.tasks[0].fields["below"] if self.tasks else "")
                return Group(*self.get_renderables(), below)

        self._bars: RichBars = Bars(
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}% {task.description}"),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=1.0, below="")
        self._bars.start()

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Update; rich redraws ten times a second."""
        beside, below = snapshot.lines()
        self._bars.update(self._task, completed=snapshot.share, description=beside, below=below)

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._bars.stop()


class Enduring:
    """Another display, whose end is not the sweep's: overnight a terminal or a pipe may go."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Pass it on."""
        self._try(lambda shown: shown.show(snapshot, now))

    def say(self, text: str) -> None:
        """Pass it on."""
        self._try(lambda shown: shown.say(text))

    def close(self) -> None:
        """Pass it on."""
        self._try(lambda shown: shown.close())

    def _try(self, act: Callable[[Progress], None]) -> None:
        try:
            act(self._shown)
        except (OSError, ValueError) as error:  # gone; closed
            gone, self._shown = self._shown, Silent()
            logger.warning("nothing more is shown: %s", error)
            with suppress(OSError, ValueError):
                gone.close()  # it holds what others print


def open_progress(stream: TextIO | None = None) -> Progress:
    """Live on a terminal, plain lines elsewhere (a file, SLURM, CI). Default: standard error."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        return Plain(stream)
    from rich.console import Console

    return Live(Console(file=stream))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "at": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key in ("worker", "unit", "curve"):
            if (value := getattr(record, key, None)) is not None:
                line[key] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LogFile(logging.FileHandler):
    """One that ends no sweep: that it can't be written (a full disk) is said once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._said = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._say(sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._say(error)

    def _say(self, error: BaseException | None) -> None:
        if not self._said:
            self._said = True
            print(f"warning: {self.baseFilename} can't be written: {error}", file=sys.stderr)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Write what avflow logs meanwhile to `path`, as JSON lines. Its folder is made.

    Raises ConfigError when the file can't be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error
    handler.setFormatter(_JsonLines())
    logger = logging.getLogger("avflow")
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the terminal belongs to the progress display
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
        handler.close()
