"""What the paper selects from its three benchmarks, as tables, and whether data hold as much.

Numbers are those of appendix D of arXiv:2606.10147. Its slips: the total of Table 5 (2,281) is not
the sum of its rows (2,081), and 39% of Bird Recognition (Table 12) must be 49%.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from avflow.datasets.sample import LayoutKind, Sample

Use = Literal["knockout", "cross_task", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of a benchmark: the authors' name for it, and what the paper does with it.

    `category`: the one that its figures join it to, else its own name. `count`: questions that the
    paper's rules select; None where it states no number. `directions` and `orderings`: the same of
    AV-Odyssey's, by label.
    """

    name: str
    use: Use = "other"
    category: str = ""
    count: int | None = None
    directions: Mapping[str, int] | None = None
    orderings: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A benchmark's tasks, in the order of its tables."""

    layout: LayoutKind
    tasks: tuple[Task, ...]

    def names(self, choice: str | Sequence[str] = "all") -> tuple[str, ...]:
        """Names of tasks: `all`, those of one use, or the given ones. Raises KeyError."""
        if choice == "all":
            return tuple(task.name for task in self.tasks)
        if isinstance(choice, str):
            return tuple(task.name for task in self.tasks if task.use == choice)
        return tuple(self.task(name).name for name in choice)

    def task(self, name: str) -> Task:
        """Raises KeyError."""
        return {task.name: task for task in self.tasks}[name]

    def category(self, name: str) -> str:
        """The category of a task, by default its own name. Raises KeyError."""
        return self.task(name).category or name


@dataclass(frozen=True, slots=True, kw_only=True)
class CountCheck:
    """A row of the paper's tables against the data. `part`: the direction or ordering, if the row
    is of one; `within`: what rounding may hide (the paper gives directions in whole percent)."""

    task: str
    expected: int
    found: int
    part: str = ""
    within: int = 0

    @property
    def good(self) -> bool:
        """Whether the data hold what the paper's do."""
        return abs(self.found - self.expected) <= self.within

    def __str__(self) -> str:
        what = f"{self.task}, {self.part}" if self.part else self.task
        return f"{what}: {self.found} questions where the paper has {self.expected}"


def check_counts(
    selection: Selection, names: Iterable[str], samples: Iterable[Sample]
) -> tuple[CountCheck, ...]:
    """The paper's rows of these tasks against samples that its rules selected, row by row.

    Tasks and parts without a number in the paper are passed over. Raises KeyError for an unknown
    name.
    """
    found = Counter(
        key
        for sample in samples
        for key in (
            (sample.task, ""),
            (sample.task, sample.direction),
            (sample.task, sample.ordering),
        )
    )
    return tuple(check for name in names for check in _rows(selection.task(name), found))


def _rows(task: Task, found: Mapping[tuple[str, str | None], int]) -> Iterator[CountCheck]:
    if task.count is not None:
        yield CountCheck(task=task.name, expected=task.count, found=found[task.name, ""])
    for parts, rounded in ((task.directions, True), (task.orderings, False)):
        for part, expected in (parts or {}).items():
            yield CountCheck(
                task=task.name,
                part=part,
                expected=expected,
                found=found[task.name, part],
                within=1 if rounded and expected not in (0, task.count) else 0,
            )


_SPEECH, _VISUAL = "Speech Attributes", "Visual Recognition"

# Tables 5 and 6. The two `other` tasks belong to Table 1, which is over all 12: their numbers are
# the benchmark's own.
AV_SPEAKERBENCH = Selection(
    layout="single_video",
    tasks=(
        Task(name="Speech Intensity", use="knockout", category=_SPEECH, count=206),
        Task(name="Speech Pitch", use="knockout", category=_SPEECH, count=206),
        Task(name="Speech Rate", use="knockout", category=_SPEECH, count=209),
        Task(name="Speech Recognition", use="knockout", count=201),
        Task(name="Speaker Detection", use="knockout", count=427),
        Task(name="Speaker Recognition", use="knockout", count=422),
        Task(name="Activity Recognition", use="knockout", category=_VISUAL, count=206),
        Task(name="Attribute Recognition", use="knockout", category=_VISUAL, count=204),
        Task(name="Speech Counting", use="cross_task", count=288),
        Task(name="Visual Counting", use="cross_task", count=205),
        Task(name="Speech Duration", count=236),
        Task(name="Speaker Counting", count=402),
    ),
)

Duration = Literal["<1min", "1-2min", "2-4min", "4-6min", "6-8min", ">8min"]
UNDER_A_MINUTE: Duration = "<1min"
"""The authors' bucket that stands for the paper's "under one minute": its longest video is 60 s."""

_RECOGNITION, _REASONING, _UNDERSTANDING = "Recognition", "Reasoning", "Understanding"

# Tables 7 and 8: videos under one minute alone.
WORLDSENSE = Selection(
    layout="single_video",
    tasks=(
        Task(name="Attribute Recognition", use="knockout", category=_RECOGNITION, count=52),
        Task(name="Audio Counting", use="knockout", category=_RECOGNITION, count=38),
        Task(name="Audio Source Localization", use="knockout", category=_RECOGNITION, count=64),
        Task(name="Event Recognition", use="knockout", category=_RECOGNITION, count=30),
        Task(name="Scene Recognition", use="knockout", category=_RECOGNITION, count=27),
        Task(name="Emotion Change", use="knockout", category=_REASONING, count=37),
        Task(name="Object State Change", use="knockout", category=_REASONING, count=25),
        Task(name="Event Sorting", use="knockout", category=_UNDERSTANDING, count=46),
        Task(name="Spatial Relation", use="knockout", category=_UNDERSTANDING, count=58),
        Task(
            name="Text and Diagram Understanding",
            use="knockout",
            category=_UNDERSTANDING,
            count=41,
        ),
        Task(name="Audio Change", use="cross_task", category=_REASONING, count=45),
        Task(name="Video Emotions", use="cross_task", category=_UNDERSTANDING, count=27),
        *(
            Task(name=name)
            for name in (
                "Human Interaction",
                "Human-object Interaction",
                "Audio Recognition",
                "Object Existence Recognition",
                "Human Emotions",
                "Anomaly Recognition",
                "Object Counting",
                "Temporal Localization",
                "Action Counting",
                "Hallucination",
                "Causal Reasoning",
                "Attribute Reasoning",
                "Temporal Prediction",
                "Relation Reasoning",
            )
        ),
    ),
)

Ordering = Literal[
    "candidates-question-reference",
    "question-reference-candidates",
    "reference-candidates-question",
    "reference-question-candidates",
    "candidates-reference-question",
    "question-candidates-reference",
]
CQR, QRC, RCQ, RQC, *_ = get_args(Ordering)  # the paper has no sample of the others
Direction = Literal["audio_to_image", "image_to_audio"]
AUDIO_TO_IMAGE, IMAGE_TO_AUDIO = get_args(Direction)


def _directions(audio_reference: int, image_reference: int) -> dict[str, int]:
    return {AUDIO_TO_IMAGE: audio_reference, IMAGE_TO_AUDIO: image_reference}


def _orderings(cqr: int, *, qrc: int = 0, rcq: int = 0, rqc: int = 0) -> dict[str, int]:
    return {CQR: cqr, QRC: qrc, RCQ: rcq, RQC: rqc}


# Tables 9, 11 and 12, in the order of the benchmark's task ids, which count from 1. Directions
# follow from whole percentages, Bird and Transportation Recognition's from Table 4's accuracies.
AV_ODYSSEY = Selection(
    layout="interleaved",
    tasks=(
        Task(
            name="Instrument Recognition",
            use="knockout",
            count=200,
            directions=_directions(98, 102),
            orderings=_orderings(46, qrc=154),
        ),
        Task(name="Singer Recognition"),
        Task(name="Gunshot Recognition"),
        Task(
            name="Bird Recognition",
            use="cross_task",
            count=200,
            directions=_directions(102, 98),
        ),
        Task(
            name="Animal Recognition",
            use="knockout",
            count=200,
            directions=_directions(100, 100),
            orderings=_orderings(200),
        ),
        Task(
            name="Transportation Recognition",
            use="cross_task",
            count=200,
            directions=_directions(105, 95),
        ),
        Task(
            name="Material Recognition",
            use="knockout",
            count=200,
            directions=_directions(200, 0),
            orderings=_orderings(151, qrc=7, rcq=35, rqc=7),
        ),
        Task(name="Scene Recognition"),
        Task(
            name="Hazard Recognition",
            use="knockout",
            count=108,
            directions=_directions(108, 0),
            orderings=_orderings(97, rqc=11),
        ),
        Task(
            name="Action Recognition",
            use="knockout",
            count=196,
            directions=_directions(196, 0),
            orderings=_orderings(196),
        ),
        Task(name="Eating Sound Recognition"),
        Task(name="Speech Sentiment Analysis"),
        Task(name="Meme Understanding"),
        Task(name="Music Sentiment Analysis"),
        Task(
            name="Music Genre Classification",
            use="knockout",
            count=200,
            directions=_directions(104, 96),
            orderings=_orderings(164, rcq=36),
        ),
        Task(name="Dance and Music Matching"),
        Task(
            name="Film and Music Matching",
            use="knockout",
            count=200,
            directions=_directions(200, 0),
            orderings=_orderings(147, rcq=53),
        ),
        *(
            Task(name=name)
            for name in (
                "Music Score Matching",
                "Audio 3D Angle Estimation",
                "Audio Distance Estimation",
                "Audio Time Estimation",
                "Audio-Visual Synchronization",
                "Action Sequencing",
                "Hallucination Evaluation",
                "Action Prediction",
                "Action Tracing",
            )
        ),
    ),
)

SELECTIONS: Mapping[str, Selection] = {
    "av_speakerbench": AV_SPEAKERBENCH,
    "worldsense": WORLDSENSE,
    "av_odyssey": AV_ODYSSEY,
}
"""By reader."""
