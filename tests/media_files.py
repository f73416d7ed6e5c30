"""Real media files, made by PyAV when a test needs them, and how to decode them."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from avflow.datasets.media import DecodedMedia, MediaSpec, decode_media
from avflow.datasets.sample import MediaKind, MediaPart

SPEC = MediaSpec(
    fps=2,
    max_frames=128,
    temporal_patch=2,
    frame_min_pixels=28 * 28,
    frame_max_pixels=144 * 28 * 28,
    image_min_pixels=28 * 28,
    image_max_pixels=576 * 28 * 28,
    patch_multiple=28,
    sample_rate=16_000,
    max_audio_s=300,
)
RATE = 48_000  # of `tone`, Hz


def write_video(
    path: Path,
    times: Sequence[float],
    *,
    sound_s: float | None = None,
    sound_from: float = 0.0,
    rate: int = 16_000,
    size: tuple[int, int] = (56, 56),
    options: dict[str, str] | None = None,
) -> Path:
    """A video whose frame i is grey of level 4 i, shown from times[i]; a tone if `sound_s`."""
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=1000)
        video.height, video.width = size
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        video.options = {"crf": "4", "bf": "0"}
        sound = container.add_stream("aac", rate=rate, layout="stereo") if sound_s else None
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                np.full((*size, 3), 4 * i % 256, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None and sound_s:
            phase = np.arange(round(sound_s * rate)) * 2 * np.pi * 440 / rate
            wave = np.tile(0.3 * np.sin(phase), (2, 1)).astype(np.float32)
            track = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
            track.sample_rate, track.pts = rate, round(sound_from * rate)
            container.mux(sound.encode(track))
            container.mux(sound.encode(None))
    return path


def write_plain(
    path: Path,
    codec: str,
    *,
    seconds: float = 4,
    size: tuple[int, int] = (56, 56),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """10 frames a second in any codec; frame i has noise around grey 4 i."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codec, rate=10)
        video.height, video.width = size
        video.pix_fmt = pix_fmt
        for i in range(round(seconds * 10)):
            noise = rng.integers(-4, 5, (*size, 3)) + 4 * i + 20
            frame = av.VideoFrame.from_ndarray(noise.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def tone(seconds: float, hertz: float = 440) -> NDArray[np.float32]:
    wave = 0.3 * np.sin(np.arange(round(seconds * RATE)) * 2 * np.pi * hertz / RATE)
    return np.tile(wave, (2, 1)).astype(np.float32)


def pitch(wave: NDArray[np.float32] | None) -> float:
    """The loudest frequency of a wave at 16 kHz, Hz."""
    assert wave is not None
    return float(np.argmax(np.abs(np.fft.rfft(wave)))) * 16_000 / len(wave)


def write_sound(
    path: Path, codec: str, seconds: float, *, hertz: Sequence[float] = (440,), cover: bool = False
) -> Path:
    """A file of tones, a track each."""
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream(codec, rate=RATE, layout="stereo") for _ in hertz]
        picture = container.add_stream("mjpeg", rate=1) if cover else None
        if picture:
            picture.width = picture.height = 64
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
        for track, each in zip(tracks, hertz, strict=True):
            wave = tone(seconds, each)
            for at in range(0, wave.shape[1], 4608):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(wave[:, at : at + 4608]), format="fltp", layout="stereo"
                )
                frame.sample_rate, frame.pts = RATE, at
                frame.time_base = Fraction(1, RATE)
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return path


def write_seconds_of_sound(path: Path, starts: Sequence[float]) -> Path:
    """A second of tone from each start, in seconds; between them the track has nothing."""
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        for start in starts:
            wave = (tone(1) * 2**15).astype(np.int16).T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = RATE, round(start * RATE)
            frame.time_base = Fraction(1, RATE)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def even(seconds: float, fps: float) -> list[float]:
    return [i / fps for i in range(round(seconds * fps))]


def decode(path: Path, kind: MediaKind = "video", *, with_audio: bool = False) -> DecodedMedia:
    return decode_media(
        path.parent, MediaPart(kind=kind, path=path.name, with_audio=with_audio), SPEC
    )


def levels(media: DecodedMedia) -> list[int]:
    """Which of `write_video`'s frames these are."""
    assert media.frames is not None
    return [round(float(frame.mean()) / 4) for frame in media.frames]
