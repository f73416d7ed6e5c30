"""From media files to arrays: frames at even times, one mono wave, pictures.

Decoding knows nothing of models: an adapter says what its processor needs through `MediaSpec`.
PyAV reads video and sound (its wheel brings FFmpeg), Pillow reads pictures.

Time zero of a video is its first frame, or its sound where that begins well before; picture and
sound are put on this one clock, so that what is seen and heard at once stays together. Of a sound
track only the duration that the file states is kept: what an encoder pads at the end (AAC) must
not become tokens.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from avflow.datasets.media_spec import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.pictures import read_picture
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.sampling import spread_times
from avflow.datasets.stored_media import opened
from avflow.datasets.tracks import LEAD_S, MISSING_S, SLACK_S, FramePicker, Sound, truncated
from avflow.datasets.unseen import Unseen

__all__ = ["DecodedMedia", "MediaError", "MediaSpec", "decode_media", "decode_sample"]

# By content, whatever the file is called. Playlists (HLS, DASH, concat) are not among them: they
# would open other files, or the network.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,gif,"
    "wav,w64,aiff,au,caf,flac,mp3,aac,ac3,eac3,amr"
)
_GUESSED = frozenset({"aac", "ac3", "eac3", "amr", "mpeg"})  # how long it is, by its bit rate
_PICTURES = "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,image2"  # known, to say so
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": f"{_FORMATS},{_PICTURES}"}


def decode_sample(root: Path, sample: Sample, spec: MediaSpec) -> tuple[DecodedMedia, ...]:
    """All media of a sample, in the order of `sample.media`. Raises MediaError."""
    return tuple(decode_media(root, part, spec) for part in sample.media)


def decode_media(root: Path, part: MediaPart, spec: MediaSpec) -> DecodedMedia:
    """Decode one file below `root`, or a cell of one, in this process.

    Raises MediaError: outside of root, missing, empty, damaged, truncated, of another kind than
    `part.kind`, without the sound it must have, or past `spec.decode_timeout_s`, which is looked
    at between packets (`Decoder` also ends a library that is stuck, or crashes). An OSError of
    the disk itself is not caught: reading again may help.
    """
    with opened(root, part.path) as path:
        _check_there(path)
        try:
            match part.kind:
                case "image":
                    return read_picture(path, spec)
                case "video":
                    return _decode_video(path, part.with_audio, spec)
                case "audio":
                    return _decode_sound(path, spec)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                _read_through(path)  # FFmpeg also calls a short file an input/output error
            raise MediaError(
                f"{path}: damaged, or no {part.kind} file ({error.strerror}); fetch the file again "
                "or leave its samples out"
            ) from error


def _read_through(path: Path) -> None:
    """Raises the OSError of a disk that can't give the file."""
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise MediaError(f"{path}: no such file; check the data set's root and that it is complete")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty; fetch it again")
    _check_riff(path)


def _check_riff(path: Path) -> None:
    """WAV and AVI state their size first; FFmpeg takes what is there for the whole."""
    with path.open("rb") as file:
        head = file.read(12)
    stated, held = int.from_bytes(head[4:8], "little"), path.stat().st_size - 8
    if head[:4] == b"RIFF" and head[8:] in (b"WAVE", b"AVI ") and held < stated < 0x7FFFF000:
        raise MediaError(  # more stands for "not known", as recorders write it
            f"{path}: holds {held:,} of {stated:,} bytes; the file is truncated, fetch it again"
        )


def _open(path: Path) -> av.container.InputContainer:
    # Titles that are no UTF-8 are common, and no reason to fail.
    return av.open(str(path), options=dict(_OPTIONS), metadata_errors="replace")


def _decode_sound(path: Path, spec: MediaSpec) -> DecodedMedia:
    with _open(path) as container:
        track, notes = _sound_track(path, container)
        sound = Sound(path, spec, stated_s=_stated_s(container, track))
        for packet in _packets(path, container, [track], spec):
            for frame in _frames(path, packet):
                sound.add(frame)
        wave = sound.finish(zero=None)
    return DecodedMedia(
        kind="audio",
        frames=None,
        waveform=wave,
        frame_times=(),
        seconds_per_frame=None,
        duration=len(wave) / spec.sample_rate,
        notes=(*notes, *sound.notes),
    )


def _decode_video(path: Path, with_audio: bool, spec: MediaSpec) -> DecodedMedia:
    seen, stamps = _survey(path, spec)
    with _open(path) as container:
        stream = _picture_track(path, container)
        track, notes = _sound_track(path, container) if with_audio else (None, ())
        lead = _lead(stream, track)
        times, spacing = sampling_times(seen + lead, spec, _frames_in(seen + lead, stream))
        picker = FramePicker(path, times, spec, lead)
        sound = Sound(path, spec, stated_s=_stated_s(container, track)) if track else None
        stream.codec_context.thread_count = 1  # a decoding task has one CPU; threads cost 15% more
        unseen = Unseen(stream, stamps, times)
        for packet in _packets(path, container, [s for s in (stream, track) if s], spec):
            unseen.before(packet, picker.zero)
            for frame in _frames(path, packet):
                if isinstance(frame, av.VideoFrame):
                    picker.add(frame)
                elif sound:
                    sound.add(frame)
        frames, last = picker.finish()
        if last < max(stamps, default=0) * float(stream.time_base or 0) - MISSING_S:
            raise truncated(path, "video", last, seen)
        wave = sound.finish(zero=picker.zero) if sound else None
    return DecodedMedia(
        kind="video",
        frames=frames,
        waveform=wave,
        frame_times=times,
        seconds_per_frame=spacing,
        duration=seen + lead,
        notes=(
            *notes,
            *_picture_notes(spacing, lead, spec),
            *(sound.notes if sound else ()),
            *(sound.against(seen + lead) if sound else ()),
        ),
    )


def _picture_notes(spacing: float, lead: float, spec: MediaSpec) -> Iterator[str]:
    if spacing > 1 / spec.fps:
        yield f"frames spread over the whole video: one every {spacing:.3f} s"
    if lead:
        yield f"picture starts {lead:.3f} s late: its first frame is held before"


def _lead(stream: av.VideoStream, track: av.AudioStream | None) -> float:
    """Seconds by which the sound begins before the picture; 0 for what a cut does not harm."""
    starts = [
        float(s.start_time * s.time_base)
        for s in (stream, track)
        if s is not None and s.start_time is not None and s.time_base is not None
    ]
    lead = starts[0] - starts[1] if len(starts) == 2 else 0.0
    return lead if lead > LEAD_S else 0.0


def _picture_track(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    pictures = [s for s in container.streams.video if not _is_cover(s)]
    name = container.format.name
    if name.endswith("_pipe") or name == "image2":
        raise MediaError(f"{path}: is a picture ({name}); its kind is 'image', not 'video'")
    if not pictures:
        raise MediaError(f"{path}: has no video track; is its kind really 'video'?")
    _check_codec(path, pictures[0])
    return pictures[0]


def _check_codec(path: Path, stream: av.stream.Stream) -> None:
    if stream.codec_context is None:
        raise MediaError(
            f"{path}: its {stream.type} track is encrypted or of an unknown codec; encode it again"
        )


def _is_cover(stream: av.stream.Stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _sound_track(
    path: Path, container: av.container.InputContainer
) -> tuple[av.AudioStream, tuple[str, ...]]:
    """The track that a player plays, and a note if there are others."""
    tracks = list(container.streams.audio)
    if not tracks:
        raise MediaError(
            f"{path}: has no sound track, and the question needs one; leave its samples out or "
            "read the data set without sound"
        )
    chosen = next((t for t in tracks if t.disposition & av.stream.Disposition.default), tracks[0])
    _check_codec(path, chosen)
    if len(tracks) == 1:
        return chosen, ()
    return chosen, (f"sound track {tracks.index(chosen) + 1} of {len(tracks)} was used",)


def _stated_s(container: av.container.InputContainer, track: av.AudioStream) -> float | None:
    """How long the file says that its sound is; None where that would be a guess."""
    if container.format.name in _GUESSED:
        return None
    if track.duration and track.time_base:
        return float(track.duration * track.time_base)
    others = [s for s in container.streams if s is not track and not _is_cover(s)]
    return None if others or not container.duration else container.duration / av.time_base


def _frames(path: Path, packet: Any) -> Iterator[Any]:
    """What a packet holds, of whichever track it is."""
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
    """Packets of the streams as they come. The deadline is looked at between them."""
    deadline = time.monotonic() + spec.decode_timeout_s
    for packet in container.demux(streams):
        if time.monotonic() > deadline:
            raise too_slow(path, spec)
        yield packet


def too_slow(path: Path, spec: MediaSpec) -> MediaError:
    """The error for a file that takes longer than `spec.decode_timeout_s`."""
    return MediaError(
        f"{path}: decoding took more than {spec.decode_timeout_s:g} s; give it longer "
        "(decode_timeout_s), cut the file shorter, or leave its samples out"
    )


def _survey(path: Path, spec: MediaSpec) -> tuple[float, list[int]]:
    """Seconds from the first frame to the end of the last, and the time stamps of all frames.

    Nothing is decoded. Matroska states one duration for all its streams, so where the stream does
    not say, its own is found from the packets. Raises MediaError when there are fewer packets
    than the file says.
    """
    stamps: list[int] = []
    with _open(path) as container:
        stream = _picture_track(path, container)
        base = float(stream.time_base or 0)
        stated = container.format.name not in _GUESSED
        of_stream = (stream.duration or 0) * base if stated else 0.0
        of_file = (container.duration or 0) / av.time_base if stated else 0.0
        ends = {s.index: 0.0 for s in container.streams}
        for packet in _packets(path, container, [stream, *container.streams.audio], spec):
            if packet.pts is None or packet.time_base is None:
                continue
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[packet.stream.index] = max(ends[packet.stream.index], end)
            if packet.stream.index == stream.index:
                stamps.append(packet.pts)
        own_end, last_end = ends[stream.index], max(ends.values())
    if not stamps:
        raise MediaError(f"{path}: no frame could be decoded; fetch the file again")
    held = own_end - min(stamps) * base
    if of_stream and held < of_stream - MISSING_S:
        raise truncated(path, "video", held, of_stream)
    if not of_stream and last_end < of_file - MISSING_S:
        raise truncated(path, "file", last_end, of_file)
    return of_stream or held, stamps


def _frames_in(duration: float, stream: av.VideoStream) -> int:
    """How many frames of the stream's mean rate that is."""
    return max(1, round(duration * float(stream.average_rate or stream.guessed_rate or 1)))


def sampling_times(
    duration: float, spec: MediaSpec, n_source: int
) -> tuple[tuple[float, ...], float]:
    """Times in seconds and their spacing: every 1/fps while the video lasts.

    `n_source` frames are there to be had; `spec.sampling` may be another rule. The count is
    rounded down to a multiple of the temporal patch (but not to none); past `max_frames` that
    many times are spread over the whole duration.
    """
    if spec.sampling == "spread":
        return spread_times(duration, n_source, spec)
    patch = spec.temporal_patch
    count = max(patch, int(np.ceil((duration - SLACK_S) * spec.fps)) // patch * patch)
    spacing = 1 / spec.fps
    if count > spec.max_frames:
        count = spec.max_frames // patch * patch
        spacing = duration / count
    return tuple(i * spacing for i in range(count)), spacing
