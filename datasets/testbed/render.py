"""Turns scenes into real files: mp4 (H.264 and AAC), PNG and WAV.

A file appears whole or not at all (written under a temporary name, then renamed), and the same
scene gives the same file.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

from avflow.datasets.testbed.looks import (
    FRAMES_PER_SECOND,
    SAMPLE_RATE_HZ,
    SIDE_PX,
    draw_frames,
    play_second,
)
from avflow.datasets.testbed.world import COLOURS, SOUNDS, Scene


def render_clip(scene: Scene, path: Path) -> None:
    """Write a scene as mp4: `SIDE_PX` square, `FRAMES_PER_SECOND`, one mono sound track."""
    looks, noises = np.random.default_rng([scene.seed, 0]), np.random.default_rng([scene.seed, 1])
    frames = [
        frame
        for colour in scene.colours
        for frame in draw_frames(COLOURS[colour], FRAMES_PER_SECOND, looks)
    ]
    wave = np.concatenate([play_second(SOUNDS[sound], noises) for sound in scene.sounds])
    _write_atomically(path, lambda name: _encode(name, frames, wave))


def render_image(colour: int, seed: int, path: Path) -> None:
    """Write one picture of a colour as PNG."""
    frame = draw_frames(COLOURS[colour], 1, np.random.default_rng([seed, 2, colour]))[0]
    _write_atomically(path, lambda name: Image.fromarray(frame).save(name, format="PNG"))


def render_sound(sound: int, seed: int, path: Path) -> None:
    """Write one second of a sound as 16-bit WAV."""
    wave = play_second(SOUNDS[sound], np.random.default_rng([seed, 3, sound]))
    _write_atomically(path, lambda name: soundfile.write(name, wave, SAMPLE_RATE_HZ, format="WAV"))


def _encode(name: str, frames: list[np.ndarray], wave: np.ndarray) -> None:
    """Mux frames [SIDE_PX, SIDE_PX, 3] and a mono wave into the file `name`."""
    with av.open(name, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        video.width = video.height = SIDE_PX
        video.pix_fmt = "yuv420p"
        # One thread and no look-ahead: otherwise the bytes differ from run to run.
        video.options = {"crf": "16", "preset": "veryfast", "tune": "zerolatency"}
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        audio.bit_rate = 64_000
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        track = av.AudioFrame.from_ndarray(wave[None, :], format="fltp", layout="mono")
        track.sample_rate = SAMPLE_RATE_HZ
        track.pts = 0  # without it the encoder's priming would be heard as a delay of 64 ms
        container.mux(audio.encode(track))
        container.mux(audio.encode(None))


def _write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(descriptor)
    try:
        write(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
