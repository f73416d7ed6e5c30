"""The testbed's world: what a scene is, before anything is drawn, played or asked.

A scene is a clip of whole seconds. Each second shows one colour and plays one sound; no colour
and no sound comes twice in a scene. A class is an index into `COLOURS` or `SOUNDS`. The world
pairs them by index (`COLOURS[i]` goes with `SOUNDS[i]`): the matching tasks ask for that pairing,
clips ignore it.
"""

from dataclasses import dataclass
from random import Random

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SOUNDS = ("bell", "horn", "drum", "whistle", "buzzer", "siren", "rattle", "organ")
N_CLASSES = len(COLOURS)
CLIP_SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a clip shows and plays, second by second, and the seed of its looks.

    `colours` and `sounds` hold one class a second; both have the clip's length.
    `seed` settles what carries no meaning: shapes, places, noise, pitch.
    """

    colours: tuple[int, ...]
    sounds: tuple[int, ...]
    seed: int

    @property
    def seconds(self) -> int:
        """The clip's length in seconds."""
        return len(self.colours)


def sample_scene(rng: Random, *, seconds: int = CLIP_SECONDS) -> Scene:
    """Draw a scene: distinct colours and distinct sounds, independent of each other."""
    return Scene(
        colours=tuple(rng.sample(range(N_CLASSES), seconds)),
        sounds=tuple(rng.sample(range(N_CLASSES), seconds)),
        seed=rng.getrandbits(32),
    )
