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
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from avflow.datasets.media_spec import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.tracks import MISSING_S, SLACK_S, FramePicker, Sound, fit

__all__ = ["DecodedMedia", "MediaError", "MediaSpec", "decode_media", "decode_sample"]


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
            f"{path}: damaged, or no {part.kind} file ({error.strerror}); fetch the file again "
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


def _decode_image(path: Path, spec: MediaSpec) -> DecodedMedia:
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error; Pillow's own carry no number
        raise MediaError(
            f"{path}: damaged or not an image ({error}); fetch it again or leave its samples out"
        ) from error
    height, width = fit(picture.height, picture.width, spec.image_max_pixels, spec.patch_multiple)
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
        sound = Sound(track, spec.sample_rate)
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
        times, spacing = sampling_times(duration, spec)
        picker = FramePicker(times, spec)
        sound = Sound(track, spec.sample_rate) if track else None
        stream.thread_type = "AUTO"
        for frame in _decoded(path, container, [s for s in (stream, track) if s], spec):
            if isinstance(frame, av.VideoFrame):
                picker.add(frame)
            elif sound:
                sound.add(frame)
        frames, end = picker.finish(path)
        if end < duration - MISSING_S:
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
    if not starts or max(ends.values()) < stated - MISSING_S:
        raise MediaError(
            f"{path}: ends at {max(ends.values()):.2f} s of {stated:.2f} s; the file is truncated, "
            "fetch it again"
        )
    container.seek(0)
    return ends[stream.index] - min(starts)


def sampling_times(duration: float, spec: MediaSpec) -> tuple[tuple[float, ...], float]:
    """Times in seconds and their spacing: every 1/fps while the video lasts.

    The count is rounded down to a multiple of the temporal patch (but not to none); past
    `max_frames` that many times are spread over the whole duration.
    """
    patch = spec.temporal_patch
    count = max(patch, int(np.ceil((duration - SLACK_S) * spec.fps)) // patch * patch)
    spacing = 1 / spec.fps
    if count > spec.max_frames:
        count = spec.max_frames // patch * patch
        spacing = duration / count
    return tuple(i * spacing for i in range(count)), spacing
