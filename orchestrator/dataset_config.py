"""The `datasets` section of a sweep file: one class a reader, told apart by `reader`."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag, model_validator

from avflow.datasets.prompts import TEMPLATES, PromptTemplate
from avflow.datasets.selections import Direction, Duration, Ordering
from avflow.orchestrator.fields import Name, Names, Strict, Where
from avflow.orchestrator.identity import Identity, RunTime

Tasks = Literal["knockout", "cross_task"] | Names


class PromptConfig(Strict):
    """How a question is put: the user's turn, in this order."""

    before: Identity[str] = ""
    """Text before the media of a single video."""
    question: Identity[str] = "{question}\n"
    """The question; what stands around `{question}` belongs to no token group but `question`."""
    heading: Identity[str] = ""
    """Between the question and its options."""
    option: Identity[str] = "{letter}. {option}\n"
    """One option, with its line break."""
    closing: Identity[str] = ""
    """After the options."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self.template()  # raises ValueError for a missing {question}, {letter} or {option}
        return self

    def template(self) -> PromptTemplate:
        """As readers take it."""
        return PromptTemplate(**self.model_dump())


TEXTS = "texts"


def _name_or_texts(value: object) -> str:
    return "name" if isinstance(value, str) else TEXTS


Prompt = Annotated[
    Annotated[Literal["av_speakerbench", "worldsense", "av_odyssey", "plain"], Tag("name")]
    | Annotated[PromptConfig, Tag(TEXTS)],
    Discriminator(_name_or_texts),
]
"""The template of a benchmark's official pipeline, by name, or one's own."""


def prompt_template(prompt: Prompt) -> PromptTemplate:
    """As readers take it."""
    return TEMPLATES[prompt] if isinstance(prompt, str) else prompt.template()


def spelled_out(prompt: Prompt) -> PromptConfig:
    """With the texts that a name stands for, as a run folder records it."""
    if isinstance(prompt, PromptConfig):
        return prompt
    template = TEMPLATES[prompt]
    return PromptConfig(**{field: getattr(template, field) for field in PromptConfig.model_fields})


class TestbedSettings(Strict):
    """Which scenes of the testbed's world."""

    __test__ = False  # not a test class, whatever pytest makes of its name

    seed: Identity[Annotated[int, Field(ge=0)]] = 0
    """Of the scenes and questions."""
    samples_per_task: Identity[PositiveInt] = 20
    """Questions a task."""
    tasks: Identity[Names] = "all"
    """Tasks to make questions for."""


class AvSpeakerBenchSettings(Strict):
    """Which questions of AV-SpeakerBench."""

    tasks: Identity[Tasks] = "knockout"
    """`knockout` (the paper's Table 5), `cross_task` (Table 6), `all` 12, or a list of names."""
    prompt: Identity[Prompt] = "av_speakerbench"
    """A template's name, or its texts."""


class WorldSenseSettings(Strict):
    """Which questions of WorldSense."""

    tasks: Identity[Tasks] = "knockout"
    """`knockout` (the paper's Table 7), `cross_task` (Table 8), `all` 26, or a list of names."""
    durations: Identity[Literal["all"] | Annotated[tuple[Duration, ...], Field(min_length=1)]] = (
        "<1min",
    )
    """Of the videos, in the authors' steps; the paper takes those under one minute."""
    prompt: Identity[Prompt] = "worldsense"
    """A template's name, or its texts."""


class AvOdysseySettings(Strict):
    """Which questions of AV-Odyssey."""

    tasks: Identity[Tasks] = "knockout"
    """`knockout` (the paper's Table 9), `cross_task` (Table 12), or a list of names; `all` 26 hold
    tasks that are not one reference against candidates, whose questions are left out."""
    directions: Identity[Literal["all"] | Annotated[tuple[Direction, ...], Field(min_length=1)]] = (
        "all"
    )
    """`audio_to_image`: the reference is a sound, the candidates are pictures."""
    orderings: Identity[Literal["all"] | Annotated[tuple[Ordering, ...], Field(min_length=1)]] = (
        "all"
    )
    """In what order candidates, question and reference come."""
    prompt: Identity[Prompt] = "av_odyssey"
    """A template's name, or its texts."""


class JsonlSettings(Strict):
    """Which file of one's own questions, and how they are put."""

    file: Identity[Where | None] = None
    """The JSON Lines file, relative to `root`; null: the only one there."""
    prompt: Identity[Prompt] = "plain"
    """A template's name, or its texts."""


class _Dataset(Strict):
    name: Identity[Name]
    """What tables and figures call it."""


class _LocalDataset(_Dataset):
    root: RunTime[Where]
    """The folder of the annotations and media (relative to this file)."""


class TestbedDataset(_Dataset):
    """The testbed's synthetic world; needs nothing."""

    __test__ = False

    reader: Identity[Literal["testbed"]]
    """What reads it; `avflow datasets` lists the readers."""
    root: RunTime[Where | None] = None
    """Its folder (relative to this file); null: the cache, $AVFLOW_CACHE or ~/.cache/avflow."""
    settings: Identity[TestbedSettings] = TestbedSettings()
    """What its reader takes."""


class AvSpeakerBenchDataset(_LocalDataset):
    """AV-SpeakerBench, downloaded."""

    reader: Identity[Literal["av_speakerbench"]]
    """What reads it; `avflow datasets` lists the readers."""
    settings: Identity[AvSpeakerBenchSettings] = AvSpeakerBenchSettings()
    """What its reader takes."""


class WorldSenseDataset(_LocalDataset):
    """WorldSense, downloaded."""

    reader: Identity[Literal["worldsense"]]
    """What reads it; `avflow datasets` lists the readers."""
    settings: Identity[WorldSenseSettings] = WorldSenseSettings()
    """What its reader takes."""


class AvOdysseyDataset(_LocalDataset):
    """AV-Odyssey, downloaded."""

    reader: Identity[Literal["av_odyssey"]]
    """What reads it; `avflow datasets` lists the readers."""
    settings: Identity[AvOdysseySettings] = AvOdysseySettings()
    """What its reader takes."""


class JsonlDataset(_LocalDataset):
    """Questions of one's own, a JSON object a line."""

    reader: Identity[Literal["jsonl"]]
    """What reads it; `avflow datasets` lists the readers."""
    settings: Identity[JsonlSettings] = JsonlSettings()
    """What its reader takes."""


DatasetConfig = Annotated[
    TestbedDataset | AvSpeakerBenchDataset | WorldSenseDataset | AvOdysseyDataset | JsonlDataset,
    Field(discriminator="reader"),
]
"""Where samples come from."""

_BY_READER: Mapping[str, type[BaseModel]] = {
    "testbed": TestbedDataset,
    "av_speakerbench": AvSpeakerBenchDataset,
    "worldsense": WorldSenseDataset,
    "av_odyssey": AvOdysseyDataset,
    "jsonl": JsonlDataset,
}
READERS = tuple(_BY_READER)

TAGGED: Mapping[str, type[BaseModel]] = {**_BY_READER, TEXTS: PromptConfig}
"""What pydantic adds to the path of a field in one of several classes -> the class."""
