"""Odd but honest files, as cameras, browsers and editors make them, and damaged ones."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from media_files import SPEC, decode, even, levels, write_video
from numpy.typing import NDArray
from PIL import Image

from avflow.datasets.media import MediaError, decode_media
from avflow.datasets.sample import MediaKind, MediaPart

RATE = 48_000


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


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp3", "libmp3lame"),
        ("a.flac", "flac"),
        ("a.ogg", "libopus"),
        ("a.opus", "libopus"),
        ("a.m4a", "aac"),
        ("a.aac", "aac"),
        ("a.mka", "aac"),
        ("a.webm", "libopus"),
        ("a.wav", "pcm_s16le"),
        ("a.aiff", "pcm_s16be"),
    ],
)
def test_sound_files_of_every_kind(tmp_path: Path, name: str, codec: str) -> None:
    media = decode(write_sound(tmp_path / name, codec, 3), kind="audio")
    assert media.waveform is not None
    assert len(media.waveform) == pytest.approx(48_000, abs=1000)  # an encoder's padding
    assert pitch(media.waveform) == pytest.approx(440, abs=1)
    with pytest.raises(MediaError, match="has no video track"):
        decode(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.flac", "flac"), ("a.mka", "aac"), ("a.wav", "pcm_s16le"), ("a.mp3", "libmp3lame")],
)
def test_truncated_sound_is_named(tmp_path: Path, name: str, codec: str) -> None:
    path = write_sound(tmp_path / name, codec, 8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"truncated|damaged"):
        decode(path, kind="audio")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.8])
def test_truncated_video_is_named(tmp_path: Path, name: str, kept: float) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_plain(tmp_path / name, codec, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(MediaError, match=r"truncated|damaged|no frame"):
        decode(path)


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


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "size"),
    [
        ("a.avi", "mpeg4", "yuv420p", (56, 56)),
        ("a.ts", "libx264", "yuv420p", (56, 56)),
        ("a.flv", "libx264", "yuv420p", (56, 56)),
        ("a.webm", "libvpx-vp9", "yuv420p", (57, 61)),
        ("a.mkv", "ffv1", "yuv420p", (61, 57)),
        ("odd.mp4", "libx264", "yuv444p", (57, 61)),
        ("ten_bits.mp4", "libx264", "yuv420p10le", (56, 56)),
        ("grey.mkv", "ffv1", "gray", (33, 35)),
        ("a.gif", "gif", "rgb8", (56, 56)),
    ],
)
def test_video_of_every_kind_and_size(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, size: tuple[int, int]
) -> None:
    media = decode(write_plain(tmp_path / name, codec, pix_fmt=pix_fmt, size=size))
    assert media.frames is not None
    assert media.frames.shape == (8, 3, *size)
    grey = media.frames.mean(axis=(1, 2, 3))
    assert grey == pytest.approx([20 + 20 * i for i in range(8)], abs=12)


def test_more_frames_than_the_model_takes_are_spread_and_noted(tmp_path: Path) -> None:
    media = decode(write_plain(tmp_path / "a.mp4", "libx264", seconds=70))
    assert media.frames is not None
    assert len(media.frames) == 128
    assert media.notes == ("frames spread over the whole video: one every 0.547 s",)


@pytest.mark.parametrize(("turn", "corner"), [(0, (0, 0)), (90, (0, 1)), (180, (1, 1))])
def test_a_turned_display_is_turned_back(
    tmp_path: Path, turn: int, corner: tuple[int, int]
) -> None:
    """`turn` degrees clockwise, as a phone writes it into the track's display matrix."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width = 56, 112
        video.pix_fmt = "yuv420p"
        picture = np.zeros((56, 112, 3), np.uint8)
        picture[:28, :56] = 255  # the upper left corner as stored
        for _ in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    one, minus = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    none, unit = bytes(4), (1 << 30).to_bytes(4, "big")
    rows = {
        0: one + none * 3 + one,
        90: none + one + none + minus + none,
        180: minus + none * 3 + minus,
    }
    data, upright = path.read_bytes(), rows[0] + none * 3 + unit
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + rows[turn] + none * 3 + unit + data[at + len(upright) :])
    media = decode(path)
    assert media.frames is not None
    height, width = media.frames.shape[-2:]
    assert (height, width) == ((56, 112) if turn != 90 else (112, 56))
    row, column = corner
    quarter = media.frames[0, 0, row * height // 2 :, column * width // 2 :]
    assert quarter[: height // 2, : width // 2].mean() > 240
    assert media.frames[0, 0].mean() == pytest.approx(64, abs=4)


def test_cover_art_is_neither_a_video_nor_in_the_way(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "song.mp3", "libmp3lame", 2, cover=True)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert pitch(decode(path, kind="audio").waveform) == pytest.approx(440, abs=1)
    with pytest.raises(MediaError, match="has no video track"):
        decode(path)


def test_of_several_sound_tracks_the_default_is_heard_and_noted(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mka", "aac", 2, hertz=(300, 600))
    media = decode(path, kind="audio")
    assert pitch(media.waveform) == pytest.approx(300, abs=1)
    assert media.notes == ("sound track 1 of 2 was used",)


def test_a_picture_that_starts_late_is_held_and_the_sound_kept(tmp_path: Path) -> None:
    times = [1.5 + t for t in even(2, 10)]
    path = write_video(tmp_path / "a.mkv", times, sound_s=3.5)
    media = decode(path, with_audio=True)
    assert levels(media) == [0, 0, 0, 0, 5, 10]  # 3.5 s, in whole patches
    assert media.waveform is not None
    assert len(media.waveform) == pytest.approx(56_000, abs=1000)
    assert media.notes == ("picture starts 1.500 s late: its first frame is held before",)
    assert levels(decode(path)) == [0, 5, 10, 15], "without its sound there is nothing to wait for"


def test_sound_just_ahead_of_the_picture_is_cut_to_it(tmp_path: Path) -> None:
    times = [0.05 + t for t in even(2, 10)]
    media = decode(write_video(tmp_path / "a.mkv", times, sound_s=2), with_audio=True)
    assert levels(media) == [0, 5, 10, 15]
    assert media.notes == ("sound starts 0.050 s early: its start was cut",)


def test_what_ends_early_is_noted(tmp_path: Path) -> None:
    short = decode(write_video(tmp_path / "a.mp4", even(4, 10), sound_s=2), with_audio=True)
    assert short.waveform is not None
    assert len(short.waveform) == 32_000
    assert short.notes == ("sound ends at 2.00 s of 3.90 s: nothing is heard after",)
    long = decode(write_video(tmp_path / "b.mp4", even(2, 10), sound_s=4), with_audio=True)
    assert len(levels(long)) == 4
    assert long.notes == ("picture ends at 1.90 s, sound at 4.00 s",)


def test_a_hole_in_the_sound_is_filled_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        for start in (0.0, 2.0):
            wave = (tone(1) * 2**15).astype(np.int16).T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = RATE, round(start * RATE)
            frame.time_base = Fraction(1, RATE)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    media = decode(path, kind="audio")
    assert media.waveform is not None
    assert len(media.waveform) == pytest.approx(48_000, abs=20)
    assert np.abs(media.waveform[16_100:31_900]).max() == 0
    assert pitch(media.waveform[32_000:]) == pytest.approx(440, abs=1)
    assert media.notes == ("sound has a hole at 1.00 s: 1.00 s of silence put in",)


def test_sound_whose_clock_jumps_by_days_is_no_silence_to_fill(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        for start in (0, 1_000_000):
            wave = (tone(1) * 2**15).astype(np.int16).T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = RATE, start * RATE
            frame.time_base = Fraction(1, RATE)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with pytest.raises(MediaError, match="time stamps of its sound jump by 999999 s"):
        decode(path, kind="audio")


def test_a_cut_made_without_encoding_again_is_what_a_player_shows(tmp_path: Path) -> None:
    """Such a clip starts at a key frame; its edit list hides what is before the cut."""
    whole = write_video(tmp_path / "a.mp4", even(6, 10), sound_s=6)
    clip = tmp_path / "clip.mp4"
    with av.open(str(whole)) as source, av.open(str(clip), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            offset = round(2 / packet.time_base)
            packet.stream, packet.pts, packet.dts = (
                streams[packet.stream.index],
                packet.pts - offset,
                packet.dts - offset,
            )
            target.mux(packet)
    media = decode(clip, with_audio=True)
    assert levels(media) == [20, 25, 30, 35, 40, 45, 50, 55]
    assert media.waveform is not None
    assert len(media.waveform) == pytest.approx(64_000, abs=1100)


def empty_video(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height = video.width = 56
        video.pix_fmt = "yuv420p"
        container.start_encoding()
    return path


def test_a_video_without_a_frame_is_named(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        with pytest.raises(MediaError, match=r"no frame|no video track|damaged"):
            decode(empty_video(tmp_path / name))


def test_sound_without_a_sample_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    with pytest.raises(MediaError, match=r"empty|no samples|damaged"):
        decode(tmp_path / "a.wav", kind="audio")


@pytest.mark.parametrize("kind", ["video", "audio", "image"])
@pytest.mark.parametrize("seed", range(8))
def test_bytes_flipped_at_random_are_an_error_or_decoded(
    tmp_path: Path, kind: MediaKind, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    good = {
        "video": lambda: write_video(tmp_path / "a.mp4", even(2, 10), sound_s=2),
        "audio": lambda: write_sound(tmp_path / "a.ogg", "libopus", 1),
        "image": lambda: save_noise(tmp_path / "a.png"),
    }[kind]()
    data = bytearray(good.read_bytes())
    for at in rng.integers(0, len(data), 12):
        data[at] = rng.integers(256)
    good.write_bytes(bytes(data))
    with contextlib.suppress(MediaError):
        media = decode(good, kind, with_audio=kind == "video")
        assert media.frames is not None or media.waveform is not None


def save_noise(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_titles_that_are_no_unicode_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "CAFE"
        track = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        wave = (tone(1) * 2**15).astype(np.int16).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
        frame.sample_rate = RATE
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    path.write_bytes(path.read_bytes().replace(b"CAFE", b"CAF\xe9"))
    assert decode(path, kind="audio").waveform is not None


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 30), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (30, 30), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (30, 30), (0, 0, 0, 255)).save(tmp_path / "print.jpg")
    Image.new("P", (30, 30), 0).save(tmp_path / "palette.gif")
    Image.new("1", (30, 31), 1).save(tmp_path / "bits.bmp")
    Image.new("RGB", (1, 1), (5, 5, 5)).save(tmp_path / "dot.webp", lossless=True)
    found = {path.name: decode(path, kind="image").frames for path in tmp_path.iterdir()}
    assert decode(tmp_path / "clear.png", kind="image").notes
    assert not decode(tmp_path / "palette.gif", kind="image").notes
    means = {name: round(float(f.mean())) for name, f in found.items() if f is not None}
    assert means == {
        "deep.png": 156, "clear.png": 255, "print.jpg": 0, "palette.gif": 0, "bits.bmp": 255,
        "dot.webp": 5,
    }  # fmt: skip


def test_hours_of_sound_are_not_held_in_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(16_000 * 60, np.float32), 16_000)
    part = MediaPart(kind="audio", path="a.flac")
    media = decode_media(tmp_path, part, replace(SPEC, max_audio_s=5))
    assert media.waveform is not None
    assert len(media.waveform) == 80_000
    assert media.waveform.base is None or media.waveform.base.nbytes < 2 * 80_000 * 4
    assert media.notes == ("sound cut from 60.00 s to 5 s",)
