"""Odd but honest files, as cameras, browsers and editors make them."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from media_files import (
    RATE,
    SPEC,
    decode,
    even,
    levels,
    pitch,
    tone,
    write_plain,
    write_seconds_of_sound,
    write_sound,
    write_video,
)
from PIL import Image

from avflow.datasets.media import MediaError, decode_media
from avflow.datasets.sample import MediaPart


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


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (0, 1)),  # a quarter turn clockwise
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (1, 0)),
        ((-1, 0, 0, 1), (0, 1)),  # mirrored, as by a phone's front camera
        ((1, 0, 0, -1), (1, 0)),
        ((0, 1, 1, 0), (0, 0)),
    ],
)
def test_a_turned_or_mirrored_display_is_undone(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int]
) -> None:
    """Where the upper left corner is shown, by what a phone writes into the display matrix."""
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

    def written(a: int, b: int, c: int, d: int) -> bytes:
        numbers = (a, b, 0, c, d, 0, 0, 0, 1 << 14)
        return b"".join((n << 16).to_bytes(4, "big", signed=True) for n in numbers)

    data, upright = path.read_bytes(), written(1, 0, 0, 1)
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + written(*matrix) + data[at + len(upright) :])
    media = decode(path)
    assert media.frames is not None
    height, width = media.frames.shape[-2:]
    assert (height, width) == ((56, 112) if matrix[0] else (112, 56))
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
    path = write_seconds_of_sound(tmp_path / "a.mkv", (0, 2))
    media = decode(path, kind="audio")
    assert media.waveform is not None
    assert len(media.waveform) == pytest.approx(48_000, abs=20)
    assert np.abs(media.waveform[16_100:31_900]).max() == 0
    assert pitch(media.waveform[32_000:]) == pytest.approx(440, abs=1)
    assert media.notes == ("sound has a hole at 1.00 s: 1.00 s of silence put in",)


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


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 8, 16])
def test_any_number_of_channels_becomes_their_mean(tmp_path: Path, channels: int) -> None:
    wave = np.arange(1, channels + 1) / 32 * np.ones((4800, 1))
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    heard = decode(tmp_path / "a.wav", kind="audio").waveform
    assert heard == pytest.approx(np.full(4800, (channels + 1) / 64), abs=1e-4)


def test_how_long_a_program_stream_is_follows_from_its_packets(tmp_path: Path) -> None:
    """FFmpeg guesses it from the bit rate, two thirds too short here."""
    path = tmp_path / "a.mpg"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg2video", rate=25)
        video.height = video.width = 64
        video.pix_fmt = "yuv420p"
        for i in range(75):
            grey = np.full((64, 64, 3), 4 * i % 256, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(video.encode(None))
    media = decode(path)
    assert media.duration == pytest.approx(3, abs=0.05)
    assert len(levels(media)) == 6


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
