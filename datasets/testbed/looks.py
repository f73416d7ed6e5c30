"""How a colour looks and how a sound sounds: one second of each as arrays.

Everything that carries no meaning (shape, place, size, noise, pitch, phase) is drawn from the
generator passed in, so that a class is never one fixed picture or wave.
"""

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 56
FRAMES_PER_SECOND = 4
SAMPLE_RATE_HZ = 16_000
FADE_S = 0.06  # longer than half an analysis window, so that no second is heard in the next
PEAK = 0.5
NOISE_LEVEL = 0.002

RGB = {
    "red": (215, 25, 25),
    "orange": (245, 130, 10),
    "yellow": (240, 230, 30),
    "green": (25, 150, 40),
    "cyan": (40, 215, 225),
    "blue": (30, 50, 215),
    "purple": (150, 35, 190),
    "white": (245, 245, 245),
}

Frame = NDArray[np.uint8]
Wave = NDArray[np.float32]


def draw_frames(colour: str, n_frames: int, rng: np.random.Generator) -> list[Frame]:
    """`n_frames` pictures [SIDE_PX, SIDE_PX, 3] of one shape drifting over a grey background."""
    grey = rng.uniform(70, 110)
    shape = rng.integers(3)
    radius = rng.uniform(15, 21)
    centre = rng.uniform(SIDE_PX / 2 - 7, SIDE_PX / 2 + 7, size=2)
    drift = rng.uniform(-1.5, 1.5, size=2)
    shade = rng.uniform(-12, 12, size=3)
    rows, columns = np.mgrid[0:SIDE_PX, 0:SIDE_PX].astype(np.float64)
    frames = []
    for index in range(n_frames):
        y, x = np.array([rows, columns]) - (centre + drift * index)[:, None, None]
        match int(shape):
            case 0:
                inside = x**2 + y**2 < radius**2
            case 1:
                inside = np.maximum(abs(x), abs(y)) < 0.88 * radius
            case _:
                inside = abs(x) + abs(y) < 1.25 * radius
        picture = np.full((SIDE_PX, SIDE_PX, 3), grey)
        picture[inside] = np.array(RGB[colour]) + shade
        picture += rng.normal(0, 5, size=picture.shape)
        frames.append(picture.clip(0, 255).round().astype(np.uint8))
    return frames


def play_second(sound: str, rng: np.random.Generator) -> Wave:
    """One second of a sound [SAMPLE_RATE_HZ], mono, peak near `PEAK`, faded at both ends."""
    t = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    bend = rng.uniform(0.94, 1.06)
    wave = _timbre(sound, t, bend, rng)
    wave = wave / np.abs(wave).max() * PEAK * rng.uniform(0.8, 1.0)
    fade = np.minimum(1.0, np.minimum(t, t[::-1]) / FADE_S)
    wave = wave * fade + rng.normal(0, NOISE_LEVEL, size=wave.shape)
    faded: Wave = wave.astype(np.float32)
    return faded


def _timbre(
    sound: str, t: NDArray[np.float64], bend: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The raw wave of a sound at times `t` (seconds); `bend` scales its pitch."""
    phase = 2 * np.pi * t * bend
    wave: NDArray[np.float64]
    match sound:
        case "bell":  # inharmonic partials, struck twice a second
            wave = np.sin(560 * phase) + 0.7 * np.sin(1545 * phase) + 0.4 * np.sin(3020 * phase)
            wave = wave * np.exp(-6 * (t % 0.5))
        case "horn":  # a low saw-tooth, held
            wave = np.sum([np.sin(110 * k * phase) / k for k in range(1, 9)], axis=0)
        case "drum":  # low thumps, five a second
            wave = np.sin(70 * phase) * np.exp(-18 * (t % 0.2))
        case "whistle":  # one high tone with vibrato
            wave = np.sin(2300 * phase + 12 * np.sin(2 * np.pi * 6 * t))
        case "buzzer":  # a square wave, gated ten times a second
            wave = np.sign(np.sin(330 * phase)) * (np.sin(20 * np.pi * t) > 0)
        case "siren":  # a tone that sweeps between 500 and 1500 Hz
            wave = np.sin(1000 * phase + 250 * np.sin(2 * np.pi * 2 * t))
        case "rattle":  # bursts of high noise, eight a second
            wave = np.diff(rng.normal(size=t.size + 2), n=2) * np.exp(-25 * (t % 0.125))
        case "organ":  # a held major chord of pure tones
            wave = np.sum([np.sin(f * phase) for f in (392.0, 494.0, 587.0, 784.0)], axis=0)
        case _:
            raise ValueError(f"no such sound: {sound!r}")
    return wave
