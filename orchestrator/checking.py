"""Is a folder the data set that the paper used, and can its media be used? By decoding it all."""

import queue
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from avflow.datasets.decoder import Decoder
from avflow.datasets.media_spec import MediaError, MediaSpec
from avflow.datasets.reading import LeftOut
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.selections import SELECTIONS, CountCheck
from avflow.orchestrator.data import load_samples, readers
from avflow.orchestrator.dataset_config import DatasetConfig
from avflow.orchestrator.errors import ConfigError

# The sweep's defaults, in small pictures: what fails here would fail there.
SPEC = MediaSpec(
    fps=2,
    max_frames=128,
    temporal_patch=2,
    frame_min_pixels=28 * 28,
    frame_max_pixels=112 * 112,
    image_min_pixels=28 * 28,
    image_max_pixels=112 * 112,
    patch_multiple=28,
    sample_rate=16_000,
    max_audio_s=None,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """One medium: why it can't be used (None: it can), its seconds, and what decoding changed."""

    part: MediaPart
    error: str | None
    duration_s: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds of the videos or sounds of one task, each file once."""

    task: str
    kind: str
    files: int
    shortest: float
    median: float
    longest: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetCheck:
    """What was found. `files` is None where media were not looked at; `notes` are no faults."""

    name: str
    root: str
    questions: int
    counts: tuple[CountCheck, ...]
    left_out: tuple[LeftOut, ...]
    files: tuple[FileCheck, ...] | None
    durations: tuple[Durations, ...]
    notes: tuple[str, ...]

    @property
    def bad(self) -> tuple[FileCheck, ...]:
        """Media that can't be used."""
        return tuple(file for file in self.files or () if file.error is not None)

    @property
    def good(self) -> bool:
        """Whether nothing differs from the paper and nothing is missing or damaged."""
        return all(count.good for count in self.counts) and not self.left_out and not self.bad


def check_dataset(
    name: str,
    root: Path,
    *,
    decode: bool,
    processes: int,
    timeout_s: float,
    on_start: Callable[[int], None],
    on_file: Callable[[FileCheck], None],
) -> DatasetCheck:
    """Read the data set in `root` and, with `decode`, every medium, in so many processes, each
    medium within `timeout_s`.

    `on_start` is told how many media there are, `on_file` each as it comes. Raises ConfigError
    when `root` is not that data set.
    """
    loaded = load_samples(_config(name, root))
    files = None
    if decode:
        parts = tuple(dict.fromkeys(part for s in loaded.samples for part in s.media))
        bare = tuple(dict.fromkeys(_bare(part) for part in parts))
        on_start(len(bare))
        spec = replace(SPEC, decode_timeout_s=timeout_s)
        files = tuple(check_files(root, bare, spec, processes, on_file))
    return DatasetCheck(
        name=name,
        root=str(root),
        questions=len(loaded.samples),
        counts=loaded.checks,
        left_out=loaded.left_out,
        files=files,
        durations=tuple(_durations(loaded.samples, files or ())),
        notes=loaded.notes,
    )


def _config(name: str, root: Path) -> DatasetConfig:
    """All tasks that the paper has a number for."""
    if name not in readers():
        raise ConfigError(f"no reader is called {name!r}; known: {', '.join(readers())}")
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder")
    raw: dict[str, object] = {"name": name, "reader": name, "root": str(root)}
    if name in SELECTIONS:
        tasks = tuple(t.name for t in SELECTIONS[name].tasks if t.count is not None)
        raw["settings"] = {"tasks": tasks}
    try:
        adapter: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise ConfigError(f"{root} can't be checked as {name}: {error}") from None


def _bare(part: MediaPart) -> MediaPart:
    """The same file whatever a question makes of it."""
    return MediaPart(kind=part.kind, path=part.path, with_audio=part.with_audio)


def check_files(
    root: Path,
    parts: Sequence[MediaPart],
    spec: MediaSpec,
    processes: int,
    on_file: Callable[[FileCheck], None],
) -> Iterator[FileCheck]:
    """Decode each, in order; each of the threads drives a decoding process of its own."""
    free: queue.SimpleQueue[Decoder] = queue.SimpleQueue()

    def check(part: MediaPart) -> FileCheck:
        decoder = free.get()
        try:
            return _check(decoder, root, part, spec)
        finally:
            free.put(decoder)

    with ExitStack() as stack:
        for _ in range(processes):
            free.put(stack.enter_context(Decoder()))
        threads = ThreadPoolExecutor(processes)
        # Left by Ctrl-C: nothing more is begun, then what is being decoded is killed.
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        for done in threads.map(check, parts):
            on_file(done)
            yield done


def _check(decoder: Decoder, root: Path, part: MediaPart, spec: MediaSpec) -> FileCheck:
    try:
        media = decoder.decode(root, part, spec)
    except MediaError as error:
        return FileCheck(part=part, error=str(error), duration_s=0.0, notes=())
    except Exception as error:  # as in a sweep: whatever a bad file raises is that file's
        text = f"{root / part.path}: {type(error).__name__}: {error}"
        return FileCheck(part=part, error=text, duration_s=0.0, notes=())
    return FileCheck(part=part, error=None, duration_s=media.duration, notes=media.notes)


def _durations(samples: Iterable[Sample], files: Iterable[FileCheck]) -> Iterator[Durations]:
    seconds = {f.part: f.duration_s for f in files if f.error is None and f.part.kind != "image"}
    of_task: dict[tuple[str, str], dict[MediaPart, float]] = defaultdict(dict)
    for sample in samples:
        for part in map(_bare, sample.media):
            if part in seconds:
                of_task[sample.task, part.kind][part] = seconds[part]
    for (task, kind), each in of_task.items():
        values = sorted(each.values())
        yield Durations(
            task=task,
            kind=kind,
            files=len(values),
            shortest=values[0],
            median=statistics.median(values),
            longest=values[-1],
            total=sum(values),
        )
