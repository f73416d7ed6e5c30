"""What is asked about a scene: questions with four options, as pure data.

The options leave no short cut: wrong options are other classes of the same clip wherever the
question is *which one* (so that seeing what is there does not help), and classes that the clip
lacks where the question is *whether it is there*. "After" questions never ask for the first second,
and never offer it unless every option could be the answer: with `CLIP_SECONDS` = 5, what remains
without the needed sense is a guess among four.
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

from avflow.datasets.sample import LayoutKind
from avflow.datasets.testbed.world import COLOURS, N_CLASSES, SOUNDS, Scene

N_OPTIONS = 4
ORDINALS = ("first", "second", "third", "fourth")
Sense = Literal["video", "audio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """A task's name, its category in reports, its prompt layout and the senses it needs."""

    name: str
    category: str
    layout: LayoutKind
    needs: tuple[Sense, ...]
    about: str


TASKS: tuple[TaskInfo, ...] = (
    TaskInfo(
        name="sight",
        category="one sense",
        layout="single_video",
        needs=("video",),
        about="which colour appears in the clip",
    ),
    TaskInfo(
        name="sound",
        category="one sense",
        layout="single_video",
        needs=("audio",),
        about="which sound is heard in the clip",
    ),
    TaskInfo(
        name="colour_when_sound",
        category="alignment",
        layout="single_video",
        needs=("video", "audio"),
        about="the colour shown while a sound is heard",
    ),
    TaskInfo(
        name="sound_when_colour",
        category="alignment",
        layout="single_video",
        needs=("video", "audio"),
        about="the sound heard while a colour is shown (control for video to audio)",
    ),
    TaskInfo(
        name="colour_after_colour",
        category="order",
        layout="single_video",
        needs=("video",),
        about="the colour right after a colour (control for cross-frame)",
    ),
    TaskInfo(
        name="sound_after_sound",
        category="order",
        layout="single_video",
        needs=("audio",),
        about="the sound right after a sound (control for cross-audio)",
    ),
    TaskInfo(
        name="colour_after_sound",
        category="order",
        layout="single_video",
        needs=("video", "audio"),
        about="the colour right after a sound (control for audio to video)",
    ),
    TaskInfo(
        name="match_image",
        category="matching",
        layout="interleaved",
        needs=("video", "audio"),
        about="which of four images goes with a sound",
    ),
    TaskInfo(
        name="match_sound",
        category="matching",
        layout="interleaved",
        needs=("video", "audio"),
        about="which of four sounds goes with an image",
    ),
)

WORDING = {
    "sight": "Which colour appears in the video?\n",
    "sound": "Which sound is heard in the audio?\n",
    "colour_when_sound": "Which colour is shown while the {} is heard?\n",
    "sound_when_colour": "Which sound is heard while {} is shown?\n",
    "colour_after_colour": "Which colour comes right after {}?\n",
    "sound_after_sound": "Which sound comes right after the {}?\n",
    "colour_after_sound": "Which colour is shown right after the {} is heard?\n",
    "match_image": "Which image goes with this sound?\n",
    "match_sound": "Which sound goes with this image?\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about a clip, its options in order and which is right.

    `text` ends the line; `anchor` is the word in it that says what to look for. `asks_colour`
    says whether `options` (classes, in order) are colours or sounds. `answer` counts from 0.
    """

    task: str
    text: str
    anchor: str
    asks_colour: bool
    options: tuple[int, ...]
    answer: int

    @property
    def option_words(self) -> tuple[str, ...]:
        """The options as words."""
        names = COLOURS if self.asks_colour else SOUNDS
        return tuple(names[option] for option in self.options)


def ask(task: str, scene: Scene, rng: Random, *, answer: int) -> Question:
    """Ask one `single_video` task about a scene; the right option is the one numbered `answer`."""
    colours, sounds = scene.colours, scene.sounds
    at, later = rng.randrange(scene.seconds), rng.randrange(1, scene.seconds)
    match task:
        case "sight":
            anchor, shown, right, others = "video", colours, colours[at], _absent(colours, rng)
        case "sound":
            anchor, shown, right, others = "audio", sounds, sounds[at], _absent(sounds, rng)
        case "colour_when_sound":
            anchor, shown, right = SOUNDS[sounds[at]], colours, colours[at]
            others = _others(colours, rng)
        case "sound_when_colour":
            anchor, shown, right = COLOURS[colours[at]], sounds, sounds[at]
            others = _others(sounds, rng)
        case "colour_after_colour":
            anchor, shown, right = COLOURS[colours[later - 1]], colours, colours[later]
            others = [c for c in _others(colours, rng) if c != colours[later - 1]]
        case "sound_after_sound":
            anchor, shown, right = SOUNDS[sounds[later - 1]], sounds, sounds[later]
            others = [s for s in _others(sounds, rng) if s != sounds[later - 1]]
        case "colour_after_sound":
            anchor, shown, right = SOUNDS[sounds[later - 1]], colours, colours[later]
            others = [c for c in _others(colours, rng) if c != colours[0]]
        case _:
            raise ValueError(f"no such question about a clip: {task!r}")
    return Question(
        task=task,
        text=WORDING[task].format(anchor),
        anchor=anchor,
        asks_colour=shown is colours,
        options=_options(right, others, rng, answer),
        answer=answer,
    )


def matching_text(task: str) -> str:
    """The question of a matching task."""
    return WORDING[task]


def matching_options(task: str) -> tuple[str, ...]:
    """The options of a matching task, in the order of its candidates."""
    noun = "image" if task == "match_image" else "sound"
    return tuple(f"the {ordinal} {noun}" for ordinal in ORDINALS)


def _absent(present: tuple[int, ...], rng: Random) -> list[int]:
    """The classes that are not present, shuffled."""
    return _shuffled([c for c in range(N_CLASSES) if c not in present], rng)


def _others(present: tuple[int, ...], rng: Random) -> list[int]:
    """The classes that are present, shuffled, then the rest (needed in short clips alone)."""
    return _shuffled(list(present), rng) + _absent(present, rng)


def _options(right: int, others: list[int], rng: Random, answer: int) -> tuple[int, ...]:
    """`right` at place `answer` among the first of `others` that differ from it."""
    wrong = _shuffled([c for c in others if c != right][: N_OPTIONS - 1], rng)
    return (*wrong[:answer], right, *wrong[answer:])


def _shuffled(items: list[int], rng: Random) -> list[int]:
    rng.shuffle(items)
    return items
