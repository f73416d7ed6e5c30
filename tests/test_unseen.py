"""Frames that nobody looks at are passed over, and those that are looked at are the same."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import SPEC, decode, even

from avflow.datasets.media import MediaSpec, decode_media
from avflow.datasets.sample import MediaPart
from avflow.datasets.tracks import FramePicker
from avflow.datasets.unseen import Unseen


def write_moving(path: Path, times: Sequence[float], *, codec: str = "libx264") -> Path:
    """Squares that move over noise, with B-frames as the encoder likes them."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 256, (120, 160 + 4 * len(times), 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=1000)
        video.height, video.width = 120, 160
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            video.options = {"preset": "veryfast", "x264-params": "bframes=3:b-pyramid=normal"}
        for i, time in enumerate(times):
            picture = np.ascontiguousarray(ground[:, 2 * i : 2 * i + 160])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def uneven(n: int) -> list[float]:
    gaps = np.random.default_rng(1).choice([0.02, 0.033, 0.1, 0.7], n, p=[0.3, 0.4, 0.25, 0.05])
    return np.cumsum(gaps).round(3).tolist()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of all frames that come out of the decoder."""
    times: list[float] = []
    add = FramePicker.add

    def counted(self: FramePicker, frame: av.VideoFrame) -> None:
        times.append(float(frame.time or 0))
        add(self, frame)

    monkeypatch.setattr(FramePicker, "add", counted)
    return times


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("times", [even(6, 30), uneven(120)], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, fps=3.7), replace(SPEC, max_frames=6)], ids=["2", "3.7", "six"]
)
def test_what_is_looked_at_is_the_same_to_the_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[float],
    name: str,
    times: list[float],
    spec: MediaSpec,
) -> None:
    path = write_moving(tmp_path / name, times)
    part = MediaPart(kind="video", path=name)
    thrifty = decode_media(tmp_path, part, spec)
    n_thrifty = len(decoded)
    monkeypatch.setattr(Unseen, "before", lambda self, packet, zero: None)
    whole = decode_media(tmp_path, part, spec)
    assert len(decoded) - n_thrifty == len(times)
    assert n_thrifty < 0.8 * len(times), "nothing was passed over"
    assert whole.frames is not None
    assert np.array_equal(thrifty.frames, whole.frames)
    assert (thrifty.frame_times, thrifty.notes) == (whole.frame_times, whole.notes)
    assert path.is_file()


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264")]
)
def test_what_promises_less_is_decoded_whole(
    tmp_path: Path, decoded: list[float], name: str, codec: str
) -> None:
    write_moving(tmp_path / name, even(2, 30), codec=codec)
    decode_media(tmp_path, MediaPart(kind="video", path=name), SPEC)
    assert len(decoded) == 60


def test_a_last_frame_that_is_held_long_is_not_a_missing_end(tmp_path: Path) -> None:
    """With B-frames a packet's duration need not be that of its own frame."""
    path, held = write_moving(tmp_path / "a.mp4", even(3.5, 10)), tmp_path / "held.mp4"
    with av.open(str(path)) as source, av.open(str(held), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux() if packet.dts is not None]
        stamps = [packet.pts for packet in packets if packet.pts is not None]
        assert stamps[-1] < max(stamps), "the frame that is shown last must not be stored last"
        packets[-1].duration = round(5 / Fraction(packets[-1].time_base or 1))
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    media = decode(held)
    assert media.frames is not None
    assert media.duration == pytest.approx(8.4, abs=0.2)
    assert len(media.frames) == 16
    assert np.ptp(media.frames[8:].mean(axis=(1, 2, 3))) == 0
