"""Damaged, truncated, sealed and nonsensical files: each is named, none crashes or hangs."""

import contextlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from media_files import (
    decode,
    even,
    write_plain,
    write_seconds_of_sound,
    write_sound,
    write_video,
)
from PIL import Image

from avflow.datasets.media import MediaError
from avflow.datasets.sample import MediaKind


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


def test_sound_whose_clock_jumps_by_days_is_no_silence_to_fill(tmp_path: Path) -> None:
    path = write_seconds_of_sound(tmp_path / "a.mkv", (0, 1_000_000))
    with pytest.raises(MediaError, match="time stamps of its sound jump by 999999 s"):
        decode(path, kind="audio")


def test_sound_that_is_no_numbers_is_named(tmp_path: Path) -> None:
    wave = np.zeros(1600)
    wave[100] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    with pytest.raises(MediaError, match="samples that are no numbers"):
        decode(tmp_path / "a.wav", kind="audio")


def test_a_picture_whose_clock_starts_again_is_named(tmp_path: Path) -> None:
    once = write_plain(tmp_path / "a.ts", "libx264", seconds=2)
    (tmp_path / "twice.ts").write_bytes(once.read_bytes() * 2)
    with pytest.raises(MediaError, match=r"time stamps of its picture jump back, from \d\.\d+ s"):
        decode(tmp_path / "twice.ts")


@pytest.mark.parametrize(("codec", "kind"), [(b"avc1", "video"), (b"mp4a", "audio")])
def test_what_is_encrypted_or_unknown_is_named(tmp_path: Path, codec: bytes, kind: str) -> None:
    path = write_video(tmp_path / "a.mp4", even(2, 10), sound_s=2)
    sealed = {b"avc1": b"encv", b"mp4a": b"enca"}[codec]
    data = path.read_bytes().replace(codec, sealed)
    # FFmpeg would know AAC by its description all the same.
    path.write_bytes(data.replace(b"esds", b"free") if codec == b"mp4a" else data)
    with pytest.raises(MediaError, match=f"its {kind} track is encrypted or of an unknown codec"):
        decode(path, with_audio=True)


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
