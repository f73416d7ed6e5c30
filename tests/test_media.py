"""Decoding: which frames, how many samples, and a clear error for every bad file."""

import errno
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from media_files import SPEC, decode, even, levels, write_video
from PIL import Image

from avflow.datasets.media import MediaError, decode_media, decode_sample, sampling_times
from avflow.datasets.sample import MediaKind, MediaPart, Sample


def test_frames_are_those_on_the_screen_at_even_times(tmp_path: Path) -> None:
    media = decode(write_video(tmp_path / "a.mp4", even(4, 10)))
    assert media.frames is not None
    assert media.frames.dtype == np.uint8
    assert media.frames.shape == (8, 3, 56, 56)
    assert levels(media) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert media.frame_times == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    assert media.seconds_per_frame == 0.5
    assert media.duration == pytest.approx(4, abs=0.11)
    assert media.waveform is None


def test_a_variable_frame_rate_is_sampled_by_time_and_not_by_number(tmp_path: Path) -> None:
    times = [0, 0.1, 0.2, 0.3, 1.2, 1.3, 2.9, 3.0, 3.1, 3.2, 3.3, 3.9]
    media = decode(write_video(tmp_path / "vfr.mp4", times))
    shown = [max(i for i, t in enumerate(times) if t <= asked) for asked in media.frame_times]
    assert levels(media) == shown


def test_too_many_frames_are_spread_over_the_whole_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", even(6, 10))
    media = decode_media(
        tmp_path, MediaPart(kind="video", path=path.name), replace(SPEC, max_frames=5)
    )
    assert len(levels(media)) == 4
    assert media.seconds_per_frame == pytest.approx(1.5, abs=0.05)
    assert levels(media)[-1] > 40


def test_a_single_frame_still_fills_a_temporal_patch(tmp_path: Path) -> None:
    assert levels(decode(write_video(tmp_path / "one.mp4", [0.0]))) == [0, 0]


@given(
    duration=st.floats(0.01, 4000),
    fps=st.floats(0.1, 30),
    max_frames=st.integers(2, 768),
    patch=st.sampled_from([1, 2]),
)
def test_sampled_times_fill_whole_patches_within_the_video(
    duration: float, fps: float, max_frames: int, patch: int
) -> None:
    spec = replace(SPEC, fps=fps, max_frames=max_frames, temporal_patch=patch)
    times, spacing = sampling_times(duration, spec, n_source=round(duration * 25))
    assert len(times) % patch == 0
    assert patch <= len(times) <= max_frames
    assert all(t < duration for t in times[patch:])
    assert np.allclose(np.diff(times), spacing)
    # Either the asked-for rate with less than a patch left over, or the whole duration.
    left_over = duration - len(times) * spacing
    assert left_over < patch / fps + 0.01
    assert spacing == pytest.approx(1 / fps) or spacing * len(times) == pytest.approx(duration)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_a_sound_track_has_the_samples_of_its_stated_duration(tmp_path: Path, rate: int) -> None:
    path = write_video(tmp_path / "a.mp4", even(4, 10), sound_s=4, rate=rate)
    media = decode(path, with_audio=True)
    assert media.waveform is not None
    assert media.waveform.dtype == np.float32
    assert media.waveform.shape == (64_000,)
    assert media.notes == ()
    assert decode(path, kind="audio").waveform is not None
    # The tone itself, not only its length: 440 periods a second.
    middle = media.waveform[16_000:32_000]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440


def test_sound_is_put_on_the_clock_of_the_frames(tmp_path: Path) -> None:
    late = decode(
        write_video(tmp_path / "a.mkv", even(4, 10), sound_s=2, sound_from=1), with_audio=True
    )
    assert late.waveform is not None
    assert np.abs(late.waveform[:15_000]).max() == 0
    assert np.abs(late.waveform[18_000:30_000]).max() > 0.1
    assert "silence put before it" in late.notes[0]


def test_sound_past_the_models_limit_is_cut_and_noted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(48_000, np.float32), 16_000)
    media = decode_media(
        tmp_path, MediaPart(kind="audio", path="a.wav"), replace(SPEC, max_audio_s=2)
    )
    assert media.waveform is not None
    assert len(media.waveform) == 32_000
    assert media.notes == ("sound cut from 3.00 s to 2 s",)


def test_a_wave_file_is_mixed_to_mono_at_the_models_rate(tmp_path: Path) -> None:
    stereo = np.stack([np.full(44_100, 0.5), np.full(44_100, -0.1)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 44_100)
    media = decode(tmp_path / "a.wav", kind="audio")
    assert media.waveform is not None
    assert media.waveform.shape == (16_000,)
    assert media.waveform[4000:12_000] == pytest.approx(0.2, abs=1e-3)
    assert media.duration == 1.0


def test_mono_samples_at_the_models_rate_are_untouched(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).integers(-20_000, 20_000, 1600, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    media = decode(tmp_path / "a.wav", kind="audio")
    assert media.waveform is not None
    assert np.array_equal(media.waveform, wave.astype(np.float32) / 2**15)


def test_big_pictures_come_within_the_budget_in_whole_patches(tmp_path: Path) -> None:
    video = decode(write_video(tmp_path / "a.mp4", [0, 0.5], size=(720, 1280)))
    Image.new("RGB", (3000, 2000)).save(tmp_path / "a.jpg")
    for media, budget in ((video, 144), (decode(tmp_path / "a.jpg", kind="image"), 576)):
        assert media.frames is not None
        height, width = media.frames.shape[-2:]
        assert height % 28 == width % 28 == 0
        assert budget * 0.8 < height * width / 28**2 <= budget


def test_an_image_is_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    Image.new("LA", (30, 30), (7, 255)).save(tmp_path / "a.png")
    turned, grey = decode(tmp_path / "a.jpg", kind="image"), decode(tmp_path / "a.png", "image")
    assert turned.frames is not None
    assert turned.frames.shape == (1, 3, 40, 20)
    assert grey.frames is not None
    assert (grey.frames == 7).all()


def bad_file(tmp_path: Path, what: str) -> tuple[Path, MediaKind, bool]:
    """A file that can't be used, and how it is asked for."""
    path = tmp_path / {"truncated mkv": "a.mkv", "picture": "a.png", "noise wav": "a.wav"}.get(
        what, "a.mp4"
    )
    if what in ("truncated mp4", "truncated mkv"):
        write_video(path, even(8, 10), sound_s=8, options={"movflags": "faststart"})
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    elif what == "no index":
        write_video(path, even(4, 10))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif what == "silent":
        write_video(path, even(2, 10))
        return path, "video", True
    elif what == "picture":
        Image.new("RGB", (30, 30)).save(path)
    elif what == "no picture":
        soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16_000)
        path = tmp_path / "a.wav"
    elif what == "noise wav":
        path.write_bytes(b"RIFF" + bytes(300))
        return path, "audio", False
    elif what == "video as image":
        return write_video(path, even(1, 4)), "image", False
    elif what == "empty":
        path.touch()
    return path, "video", False


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such file"),
        ("empty", "is empty"),
        ("no index", "damaged, or no video file"),
        ("truncated mp4", "truncated|damaged"),
        ("truncated mkv", "truncated"),
        ("silent", "has no sound track"),
        ("picture", "its kind is 'image'"),
        ("no picture", "has no video track"),
        ("noise wav", "damaged|no sound track"),
        ("video as image", "damaged or not an image"),
    ],
)
def test_a_bad_file_is_a_clear_error_that_survives_pickle(
    tmp_path: Path, what: str, message: str
) -> None:
    path, kind, with_audio = bad_file(tmp_path, what)
    with pytest.raises(MediaError, match=message) as caught:
        decode(path, kind, with_audio=with_audio)
    assert str(path) in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is MediaError
    assert str(copy) == str(caught.value)


def test_decoding_stops_at_its_deadline(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", even(4, 10))
    with pytest.raises(MediaError, match="took more than 1e-09 s"):
        decode_media(
            tmp_path,
            MediaPart(kind="video", path=path.name),
            replace(SPEC, decode_timeout_s=1e-9),
        )


def test_an_error_of_the_system_is_not_the_files_fault(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 300}.mp4"  # longer than a file system takes
    with pytest.raises(OSError, match="too long") as caught:
        decode(path)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_sample_is_decoded_in_the_order_of_its_parts(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", even(1, 4))
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    sample = Sample(
        sample_id="s",
        dataset="d",
        task="t",
        category="c",
        layout="interleaved",
        parts=(MediaPart(kind="image", path="b.png"), MediaPart(kind="video", path="a.mp4")),
        answer=0,
        media_group="g",
    )
    assert [m.kind for m in decode_sample(tmp_path, sample, SPEC)] == ["image", "video"]


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="fps is 0"):
        replace(SPEC, fps=0)
    with pytest.raises(ValueError, match="at least 2"):
        replace(SPEC, max_frames=1)
