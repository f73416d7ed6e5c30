"""One question about media, as data: what every reader yields and every model adapter takes.

A sample's user turn is an ordered tuple of parts. Text is cut into parts by *role* where it is
written, so that a token group is known from the prompt's construction and never searched for.
"""

from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["video", "audio", "image"]
MediaRole = Literal["clip", "candidate", "reference"]
TextRole = Literal["question", "option_letter", "option_text", "other"]
LayoutKind = Literal["single_video", "interleaved"]

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPart:
    """A media file in the user turn.

    `path` is relative to the data set's root (see `avflow.datasets.Dataset.root`).
    `index` numbers candidates from 0; it is None for other roles.
    `with_audio` (video alone): the file's sound is interleaved with its frames; a file without a
    sound track is then an error, never silence.
    """

    kind: MediaKind
    path: str
    role: MediaRole = "clip"
    index: int | None = None
    with_audio: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """A piece of the user turn's text, kept verbatim.

    `question` is the question without its options; `option_letter` the bare letter ("A") and
    `option_text` what follows it (". red\\n"), both numbered by `index` from 0; `other` is every
    word that belongs to none of these ("Options:\\n", "The best answer is:").
    """

    role: TextRole
    text: str
    index: int | None = None


Part = MediaPart | TextPart


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A multiple-choice question. Immutable, hashable, and picklable without torch.

    `answer` and `correct_candidate` count from 0. `media_group` is shared by the samples that ask
    about the same media. `direction` and `ordering` are for interleaved samples, else None
    ("audio_to_image": the reference is a sound, the candidates are images).
    """

    sample_id: str
    dataset: str
    task: str
    category: str
    layout: LayoutKind
    parts: tuple[Part, ...]
    answer: int
    media_group: str
    direction: str | None = None
    ordering: str | None = None
    correct_candidate: int | None = None

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """The media parts, in order."""
        return tuple(part for part in self.parts if isinstance(part, MediaPart))

    @property
    def n_options(self) -> int:
        """How many option letters the prompt offers."""
        return sum(isinstance(p, TextPart) and p.role == "option_letter" for p in self.parts)

    @property
    def answer_letter(self) -> str:
        """The right option's letter."""
        return LETTERS[self.answer]
