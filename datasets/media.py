"""From media files to arrays: frames at even times, one mono wave, pictures.

Decoding knows nothing of models: an adapter says what its processor needs through `MediaSpec`.
PyAV reads video and sound (its wheel brings FFmpeg), Pillow reads pictures.

Time zero of a video is its first frame; its sound is shifted to that clock, so that what is seen
and heard at once stays together. Of a sound track only the duration that the file states is kept:
what an encoder pads at the end (AAC) must not become tokens.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
from avflow.datasets.sample import MediaKind, MediaPart, Sample
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_SLACK_S = 1e-3  # containers round times to a millisecond
_MISSING_S = 0.5  # a stream that ends this much before its stated duration is truncated


class MediaError(ValueError):
    """A media file can't be used: which file, what is wrong, what to do. The sample fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSpec:
    """What a model's processor takes. Pixels are height x width of one frame or picture.

    `fps` frames a second, at most `max_frames` a video (then evenly over its whole duration);
    their count is a multiple of `temporal_patch`. Sides come to multiples of `patch_multiple`
    where a picture is made smaller. `sample_rate` in Hz; sound after `max_audio_s` is cut.
    """

    fps: float
    max_frames: int
    temporal_patch: int
    frame_min_pixels: int
    frame_max_pixels: int
    image_min_pixels: int
    image_max_pixels: int
    patch_multiple: int
    sample_rate: int
    max_audio_s: float | None
    decode_timeout_s: float = 120

    def __post_init__(self) -> None:
        for name in ("fps", "temporal_patch", "patch_multiple", "sample_rate", "decode_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_frames < self.temporal_patch:
            raise ValueError(
                f"max_frames is {self.max_frames}; it must be at least {self.temporal_patch}, the "
                "frames of one temporal patch"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedMedia:
    """One file's arrays. T frames (a picture: T = 1) and n samples; None where the kind has none.

    `frame_times` are the asked-for times in seconds from the first frame, `seconds_per_frame`
    their spacing. `duration` is the video's, else the sound's (s; 0 for a picture). `notes` say
    what decoding changed ("sound cut to 300 s ...").
    """

    kind: MediaKind
    frames: NDArray[np.uint8] | None  # [T, 3, H, W]
    waveform: NDArray[np.float32] | None  # [n], mono at the spec's sample rate
    frame_times: tuple[float, ...]
    seconds_per_frame: float | None
    duration: float
    notes: tuple[str, ...]


def decode_sample(root: Path, sample: Sample, spec: MediaSpec) -> tuple[DecodedMedia, ...]:
    """All media of a sample, in the order of `sample.media`. Raises MediaError."""
    return tuple(decode_media(root, part, spec) for part in sample.media)


def decode_media(root: Path, part: MediaPart, spec: MediaSpec) -> DecodedMedia:
    """Decode one file below `root`.

    Raises MediaError: outside of root, missing, empty, damaged, truncated, of another kind than
    `part.kind`, without the sound it must have, or past `spec.decode_timeout_s`. An OSError of
    the disk itself is not caught: reading again may help.
    """
    path = _locate(root, part)
    try:
        match part.kind:
            case "image":
                return _decode_image(path, spec)
            case "video":
                return _decode_video(path, part.with_audio, spec)
            case "audio":
                return _decode_sound(path, spec)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise MediaError(
            f"{path}: damaged or not a {part.kind} file ({error.strerror}); fetch the file again "
            "or leave its samples out"
        ) from error


def _locate(root: Path, part: MediaPart) -> Path:
    # By the name alone: following links would forbid the caches that link media from elsewhere.
    relative = PurePosixPath(os.path.normpath(part.path))
    if relative.is_absolute() or relative.parts[:1] in ((), ("..",)):
        raise MediaError(
            f"{part.path!r} leaves the data set's root {root}; paths of media are relative to it"
        )
    path = root / relative
    if not path.is_file():
        raise MediaError(f"{path}: no such file; check the data set's root and that it is complete")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty; fetch it again")
    return path


def _fit(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Size within the budget, sides as multiples; unchanged if it fits already.

    The same rounding as Qwen-VL's `smart_resize`, so that the processor leaves the result as is.
    """
    if height * width <= max_pixels:
        return height, width
    shrink = (height * width / max_pixels) ** 0.5
    return (
        max(multiple, int(height / shrink / multiple) * multiple),
        max(multiple, int(width / shrink / multiple) * multiple),
    )


def _decode_image(path: Path, spec: MediaSpec) -> DecodedMedia:
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{path}: damaged or not an image ({error}); fetch it again or leave its samples out"
        ) from error
    except OSError as error:
        if error.errno is not None:  # the disk's error; Pillow's own carry no number
            raise
        raise MediaError(
            f"{path}: damaged image ({error}); fetch it again or leave its samples out"
        ) from error
    height, width = _fit(picture.height, picture.width, spec.image_max_pixels, spec.patch_multiple)
    if (height, width) != (picture.height, picture.width):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    frames = np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)[None]
    return DecodedMedia(
        kind="image",
        frames=np.ascontiguousarray(frames),
        waveform=None,
        frame_times=(),
        seconds_per_frame=None,
        duration=0.0,
        notes=(),
    )


def _decode_sound(path: Path, spec: MediaSpec) -> DecodedMedia:
    with av.open(str(path)) as container:
        track = _sound_track(path, container)
        sound = _Sound(track, spec.sample_rate)
        for frame in _decoded(path, container, [track], spec):
            if isinstance(frame, av.AudioFrame):
                sound.add(frame)
        wave, notes = sound.finish(path, zero=None, max_s=spec.max_audio_s)
    return DecodedMedia(
        kind="audio",
        frames=None,
        waveform=wave,
        frame_times=(),
        seconds_per_frame=None,
        duration=len(wave) / spec.sample_rate,
        notes=notes,
    )


def _decode_video(path: Path, with_audio: bool, spec: MediaSpec) -> DecodedMedia:
    with av.open(str(path)) as container:
        stream = _picture_track(path, container)
        track = _sound_track(path, container) if with_audio else None
        duration = _video_duration(path, container, stream, spec)
        times, spacing = _sampling_times(duration, spec)
        picker = _FramePicker(times, spec)
        sound = _Sound(track, spec.sample_rate) if track else None
        stream.thread_type = "AUTO"
        for frame in _decoded(path, container, [s for s in (stream, track) if s], spec):
            if isinstance(frame, av.VideoFrame):
                picker.add(frame)
            elif sound:
                sound.add(frame)
        frames, end = picker.finish(path)
        if end < duration - _MISSING_S:
            raise MediaError(
                f"{path}: the video ends at {end:.2f} s of {duration:.2f} s; the file is "
                "truncated, fetch it again"
            )
        wave, notes = (
            sound.finish(path, zero=picker.zero, max_s=spec.max_audio_s) if sound else (None, ())
        )
    return DecodedMedia(
        kind="video",
        frames=frames,
        waveform=wave,
        frame_times=times,
        seconds_per_frame=spacing,
        duration=duration,
        notes=notes,
    )


def _picture_track(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    pictures = [s for s in container.streams.video if not _is_cover(s)]
    if not pictures:
        raise MediaError(f"{path}: has no video track; is its kind really 'video'?")
    name = container.format.name
    if name.endswith("_pipe") or name == "image2":
        raise MediaError(f"{path}: is a picture ({name}); its kind is 'image', not 'video'")
    return pictures[0]


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _sound_track(path: Path, container: av.container.InputContainer) -> av.AudioStream:
    if not container.streams.audio:
        raise MediaError(
            f"{path}: has no sound track, and the question needs one; leave its samples out or "
            "read the data set without sound"
        )
    return container.streams.audio[0]


def _decoded(
    path: Path,
    container: av.container.InputContainer,
    streams: list[av.VideoStream | av.AudioStream],
    spec: MediaSpec,
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Frames of the streams as they come. The deadline is looked at between packets."""
    for packet in _packets(path, container, streams, spec):
        for frame in packet.decode():
            if frame.pts is None:
                raise MediaError(
                    f"{path}: a {packet.stream.type} frame has no time stamp; rewrap the file "
                    "(ffmpeg -i IN -c copy OUT.mp4)"
                )
            yield frame


def _packets(
    path: Path,
    container: av.container.InputContainer,
    streams: list[av.VideoStream | av.AudioStream],
    spec: MediaSpec,
) -> Iterator[Any]:
    deadline = time.monotonic() + spec.decode_timeout_s
    for packet in container.demux(streams):
        if time.monotonic() > deadline:
            raise MediaError(
                f"{path}: decoding took more than {spec.decode_timeout_s:g} s; cut the file "
                "shorter or raise decode_timeout_s"
            )
        yield packet


def _video_duration(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, spec: MediaSpec
) -> float:
    """Seconds from the first frame to the end of the last, read from the index or the packets.

    Matroska states one duration for all its streams, so a video's own is found by going through
    the packets (without decoding) when the stream does not say.
    """
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    starts: list[float] = []
    ends = {s.index: 0.0 for s in container.streams}
    for packet in _packets(path, container, [stream, *container.streams.audio], spec):
        if packet.pts is None or packet.time_base is None:
            continue
        start = float(packet.pts * packet.time_base)
        end = start + float((packet.duration or 0) * packet.time_base)
        ends[packet.stream.index] = max(ends[packet.stream.index], end)
        if packet.stream.index == stream.index:
            starts.append(start)
    stated = (container.duration or 0) / av.time_base
    if not starts or max(ends.values()) < stated - _MISSING_S:
        raise MediaError(
            f"{path}: ends at {max(ends.values()):.2f} s of {stated:.2f} s; the file is truncated, "
            "fetch it again"
        )
    container.seek(0)
    return ends[stream.index] - min(starts)


def _sampling_times(duration: float, spec: MediaSpec) -> tuple[tuple[float, ...], float]:
    """Times in seconds and their spacing: every 1/fps while the video lasts.

    The count is rounded down to a multiple of the temporal patch (but not to none); past
    `max_frames` that many times are spread over the whole duration.
    """
    patch = spec.temporal_patch
    count = max(patch, int(np.ceil((duration - _SLACK_S) * spec.fps)) // patch * patch)
    spacing = 1 / spec.fps
    if count > spec.max_frames:
        count = spec.max_frames // patch * patch
        spacing = duration / count
    return tuple(i * spacing for i in range(count)), spacing


class _FramePicker:
    """Keeps, for each asked-for time, the frame that is on the screen then.

    Works on time stamps, so a variable frame rate needs nothing special; a frame is turned into
    an array only when it is kept.
    """

    def __init__(self, times: tuple[float, ...], spec: MediaSpec) -> None:
        self.zero: float | None = None  # the first frame's time in the container, s
        self._times = times
        self._spec = spec
        self._shown: av.VideoFrame | None = None
        self._kept: list[NDArray[np.uint8]] = []

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next frame in order of time."""
        if self.zero is None:
            self.zero = frame.time
        self._keep_until(frame.time - self.zero)
        self._shown = frame

    def finish(self, path: Path) -> tuple[NDArray[np.uint8], float]:
        """Frames [T, 3, H, W] and where the last decoded frame ends, s from the first."""
        if self._shown is None or self.zero is None:
            raise MediaError(f"{path}: no frame could be decoded; fetch the file again")
        self._keep_until(np.inf)
        if len({kept.shape for kept in self._kept}) > 1:
            raise MediaError(f"{path}: the picture's size changes on the way; encode it again")
        held = float((self._shown.duration or 0) * (self._shown.time_base or 0))
        return np.stack(self._kept), self._shown.time - self.zero + held

    def _keep_until(self, now: float) -> None:
        while (
            self._shown is not None
            and len(self._kept) < len(self._times)
            and self._times[len(self._kept)] < now - _SLACK_S
        ):
            self._kept.append(_frame_array(self._shown, self._spec))


def _frame_array(frame: av.VideoFrame, spec: MediaSpec) -> NDArray[np.uint8]:
    """One frame as [3, H, W], upright, within the pixel budget."""
    height, width = _fit(frame.height, frame.width, spec.frame_max_pixels, spec.patch_multiple)
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    turns = round((frame.rotation or 0) / 90) % 4  # phones store the turn beside the picture
    return np.ascontiguousarray(np.rot90(rgb, turns).transpose(2, 0, 1))


class _Sound:
    """Gathers a sound track as mono float32 at one sample rate."""

    def __init__(self, track: av.AudioStream, rate: int) -> None:
        self._track = track
        self._rate = rate
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        self._pieces: list[NDArray[np.float32]] = []
        self._start: float | None = None

    def add(self, frame: av.AudioFrame) -> None:
        """Take the next frame of the track."""
        if self._start is None:
            self._start = frame.time
        self._resample(frame)

    def _resample(self, frame: av.AudioFrame | None) -> None:
        for out in self._resampler.resample(frame):
            self._pieces.append(out.to_ndarray().reshape(-1).astype(np.float32, copy=False))

    def finish(
        self, path: Path, *, zero: float | None, max_s: float | None
    ) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """The wave [n] from time `zero` (None: its own start) and what was changed."""
        if self._start is None:
            raise MediaError(f"{path}: its sound track is empty; fetch the file again")
        self._resample(None)
        wave = np.concatenate(self._pieces)
        if self._track.duration and self._track.time_base:
            stated = float(self._track.duration * self._track.time_base)
            if len(wave) < (stated - _MISSING_S) * self._rate:
                raise MediaError(
                    f"{path}: the sound ends at {len(wave) / self._rate:.2f} s of {stated:.2f} s; "
                    "the file is truncated, fetch it again"
                )
            wave = wave[: round(stated * self._rate)]
        notes = []
        shift = 0 if zero is None else round((self._start - zero) * self._rate)
        if shift > 0:
            wave = np.concatenate([np.zeros(shift, np.float32), wave])
            notes.append(f"sound starts {shift / self._rate:.3f} s late: silence put before it")
        elif shift < 0:
            wave = wave[-shift:]
            notes.append(f"sound starts {-shift / self._rate:.3f} s early: its start was cut")
        if max_s is not None and len(wave) > max_s * self._rate:
            notes.append(f"sound cut from {len(wave) / self._rate:.2f} s to {max_s:g} s")
            wave = wave[: int(max_s * self._rate)]
        if not len(wave):
            raise MediaError(f"{path}: its sound has no samples; fetch the file again")
        return np.ascontiguousarray(wave, dtype=np.float32), tuple(notes)
