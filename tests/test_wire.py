"""What the decoding process says: arrays and errors whole, and nonsense that can do nothing."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from media_files import SPEC

from avflow.datasets.media_spec import DecodedMedia, MediaError
from avflow.datasets.sample import MediaPart
from avflow.datasets.wire import (
    WireError,
    receive_answer,
    receive_request,
    send_answer,
    send_request,
)


def there_and_back(answer: DecodedMedia | Exception) -> DecodedMedia | Exception:
    pipe = io.BytesIO()
    send_answer(pipe, answer)
    pipe.seek(0)
    return receive_answer(pipe)


def test_a_request_arrives_whole() -> None:
    pipe = io.BytesIO()
    part = MediaPart(kind="video", path="ä b.mp4", role="candidate", index=2, with_audio=True)
    send_request(pipe, Path("/data set"), part, SPEC)
    pipe.seek(0)
    assert receive_request(pipe) == (Path("/data set"), part, SPEC)
    with pytest.raises(EOFError):
        receive_request(pipe)


def test_arrays_arrive_to_the_bit_and_can_be_written_to() -> None:
    rng = np.random.default_rng(0)
    sent = DecodedMedia(
        kind="video",
        frames=rng.integers(0, 256, (3, 3, 4, 5), dtype=np.uint8),
        waveform=rng.random(7, dtype=np.float32),
        frame_times=(0.0, 1 / 3),
        seconds_per_frame=1 / 3,
        duration=0.1,
        notes=("cut",),
    )
    came = there_and_back(sent)
    assert isinstance(came, DecodedMedia)
    for name in ("frames", "waveform"):
        ours, theirs = getattr(sent, name), getattr(came, name)
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert theirs.tobytes() == ours.tobytes()
        assert theirs.flags.writeable
    assert (came.frame_times, came.seconds_per_frame, came.duration, came.notes) == (
        sent.frame_times,
        sent.seconds_per_frame,
        sent.duration,
        sent.notes,
    )


class StrangeError(Exception):
    """Of a library, say."""


@pytest.mark.parametrize(
    ("sent", "kind", "says"),
    [
        (MediaError("x.mp4: damaged"), MediaError, "x.mp4: damaged"),
        (
            FileNotFoundError(2, "No such file", "x"),
            FileNotFoundError,
            "[Errno 2] No such file: 'x'",
        ),
        (OSError("no number"), OSError, "no number"),
        (MemoryError("much"), MemoryError, "much"),
        (ZeroDivisionError("by zero"), ZeroDivisionError, "by zero"),
        (StrangeError("odd"), RuntimeError, "StrangeError: odd"),
        (
            UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
            RuntimeError,
            "UnicodeDecodeError: 'utf-8' codec can't decode byte 0x78 in position 0: bad",
        ),
    ],
)
def test_errors_arrive_as_what_they_are(sent: Exception, kind: type[Exception], says: str) -> None:
    sent.add_note("In the decoding process: line 7")
    came = there_and_back(sent)
    assert (type(came), str(came)) == (kind, says)
    assert came.__notes__ == ["In the decoding process: line 7"]


@pytest.mark.parametrize(
    "header",
    [
        b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.",
        b"[]",
        b"{}",
        b'{"error": {"kind": "SystemExit"}}',
        b'{"media": {}, "shapes": {"frames": [1, -3, 2, 2], "waveform": null}}',
        b'{"media": {}, "shapes": {"frames": [1, 3, 2], "waveform": null}}',
        b'{"media": {"kind": "x"}, "shapes": {"frames": null, "waveform": null}}',
    ],
)
def test_nonsense_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        receive_answer(io.BytesIO(struct.pack("<I", len(header)) + header))


def test_an_answer_that_breaks_off_is_an_end() -> None:
    header = json.dumps({"media": {}, "shapes": {"frames": [9, 3, 2, 2], "waveform": None}})
    with pytest.raises(EOFError):
        receive_answer(io.BytesIO(struct.pack("<I", len(header)) + header.encode() + b"1234"))
