"""The decoding process: what a hang, a crash or a kill costs, and that the next file is decoded."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media_files import SPEC, even, levels, write_video
from PIL import Image

from avflow.datasets.decoder import Decoder
from avflow.datasets.media import MediaError, MediaSpec, decode_media
from avflow.datasets.sample import MediaPart
from avflow.orchestrator.executors import LocalExecutor
from avflow.workers.decode import Decoded, as_own, decode_unit, media_notes, same_media
from avflow.workers.protocol import UnitFailure, UnitSpec

BIG = MediaPart(kind="image", path="big.jpg")
SMALL = MediaPart(kind="video", path="small.mp4", with_audio=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip, and a picture whose decoding is one call into C that takes most of a second."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "small.mp4", even(2, 10), sound_s=2)
    Image.new("RGB", (9400, 9400)).save(folder / "big.jpg", progressive=True)
    return folder


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder() as one:
        yield one


def after(seconds: float, action: Callable[[], None]) -> None:
    threading.Timer(seconds, action).start()


def test_it_gives_what_decoding_here_gives(root: Path, decoder: Decoder) -> None:
    ours, theirs = decode_media(root, SMALL, SPEC), decoder.decode(root, SMALL, SPEC)
    assert levels(theirs) == levels(ours)
    assert ours.waveform is not None
    assert theirs.waveform is not None
    assert np.array_equal(theirs.waveform, ours.waveform)
    assert (theirs.frame_times, theirs.duration, theirs.notes) == (
        ours.frame_times,
        ours.duration,
        ours.notes,
    )


def test_a_bad_file_leaves_the_process_as_it_is(root: Path, decoder: Decoder) -> None:
    decoder.decode(root, SMALL, SPEC)
    before = decoder.pid
    with pytest.raises(MediaError, match=r"missing\.mp4: no such file"):
        decoder.decode(root, replace(SMALL, path="missing.mp4"), SPEC)
    assert levels(decoder.decode(root, SMALL, SPEC)) == [0, 5, 10, 15]
    assert decoder.pid == before


def test_a_library_that_does_not_come_back_ends_by_the_alarm(root: Path, decoder: Decoder) -> None:
    decoder.decode(root, SMALL, SPEC)
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"big\.jpg: decoding took more than 0.01 s"):
        # Pillow's decoder neither looks at a clock nor lets Python run.
        decoder.decode(root, BIG, replace(SPEC, decode_timeout_s=0.01))
    assert time.monotonic() - began < 10
    assert levels(decoder.decode(root, SMALL, SPEC)) == [0, 5, 10, 15]


def test_a_process_that_not_even_the_alarm_ends_is_given_up(
    root: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.datasets.decoder._PATIENCE_S", 0.3)
    decoder.decode(root, SMALL, SPEC)
    assert decoder.pid is not None
    stuck = decoder.pid
    os.kill(stuck, signal.SIGSTOP)  # takes no signal, like one that waits for a dead disk
    with pytest.raises(MediaError, match=r"took more than 0\.1 s"):
        decoder.decode(root, SMALL, replace(SPEC, decode_timeout_s=0.1))
    assert not Path(f"/proc/{stuck}").exists()
    assert levels(decoder.decode(root, SMALL, SPEC)) == [0, 5, 10, 15]


@pytest.mark.parametrize(
    ("sign", "error", "says"),
    [
        (signal.SIGSEGV, MediaError, r"crashed its decoder \(SIGSEGV\)"),
        (signal.SIGKILL, ChildProcessError, "was killed, perhaps for want of memory"),
    ],
)
def test_a_crash_is_the_files_fault_and_a_kill_is_not(
    root: Path, decoder: Decoder, sign: signal.Signals, error: type[Exception], says: str
) -> None:
    decoder.decode(root, SMALL, SPEC)
    pid = decoder.pid
    assert pid is not None
    after(0.1, lambda: os.kill(pid, sign))
    with pytest.raises(error, match=says):
        decoder.decode(root, BIG, SPEC)
    assert levels(decoder.decode(root, SMALL, SPEC)) == [0, 5, 10, 15]


def test_one_that_died_between_two_files_is_replaced(root: Path, decoder: Decoder) -> None:
    decoder.decode(root, SMALL, SPEC)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert levels(decoder.decode(root, SMALL, SPEC)) == [0, 5, 10, 15]


def in_python(root: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run lines in a Python of their own, after `decode()` has started `decoder`."""
    start = (
        "import os, signal, sys; from pathlib import Path",
        "from avflow.datasets.decoder import Decoder",
        "from avflow.datasets.sample import MediaPart",
        "from media_files import SPEC, levels",
        "part, decoder = MediaPart(kind='video', path='small.mp4'), Decoder()",
        "decode = lambda: decoder.decode(Path(sys.argv[1]), part, SPEC)",
        "decode()",
    )
    return subprocess.run(
        [sys.executable, "-c", "\n".join((*start, *lines)), str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )


def test_it_does_not_outlive_who_started_it(root: Path) -> None:
    parent = in_python(
        root, "print(decoder.pid, flush=True)", "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(parent.stdout)
    until = time.monotonic() + 10
    while running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(pid)


def test_it_works_in_a_process_with_many_files_open(root: Path) -> None:
    done = in_python(
        root,
        "import resource",
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))",
        "held = [open(os.devnull) for _ in range(1100)]",
        "decoder.close(); decode()",
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_starts_its_own(root: Path) -> None:
    done = in_python(
        root,
        "before = decoder.pid",
        "if os.fork() == 0:",
        "    decode(); os._exit(0 if decoder.pid != before else 1)",
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0",
        "decode()",
        "assert decoder.pid == before",
    )
    assert done.returncode == 0, done.stderr


def running(pid: int) -> bool:
    """An orphan whose new parent does not reap it stays as a zombie: that is not running."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_unit_fails_as_data_and_the_next_one_is_decoded(root: Path, tmp_path: Path) -> None:
    from faulty import unit

    def of(path: str) -> UnitSpec:
        return replace(unit("u", root, media=path))

    (root / "noise.mp4").write_bytes(b"no video at all")
    failed = decode_unit(of("noise.mp4"), SPEC)
    assert isinstance(failed, UnitFailure)
    assert (failed.stage, failed.error, failed.retryable) == ("decode", "MediaError", False)
    assert isinstance(decode_unit(of("small.mp4"), SPEC), Decoded)


def test_without_ray_too_samples_about_one_file_have_it_decoded_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faulty import coordinate, faulty_worker, unit

    asked: list[str] = []

    def decode(unit: UnitSpec, spec: MediaSpec) -> Decoded | UnitFailure:
        asked.append(unit.unit_id)
        return decode_unit(unit, spec)

    monkeypatch.setattr("avflow.orchestrator.executors.decode_unit", decode)
    (root / "noise.mp4").write_bytes(b"no video at all")
    units = [
        unit(f"{i}-{path}", root, media=path)
        for path in ("small.mp4", "noise.mp4")
        for i in range(2)
    ]
    units = [replace(u, sample=replace(u.sample, media_group=u.unit_id[2:])) for u in units]
    local = LocalExecutor(threads=1, worker_class=faulty_worker())
    _, notes = coordinate(units, local)
    assert sorted(asked) == ["0-noise.mp4", "0-small.mp4", "1-noise.mp4"], "a failure is not kept"
    assert set(notes.samples) == {"0-small.mp4", "1-small.mp4"}


def test_whose_decoding_it_was(root: Path) -> None:
    from faulty import unit

    first, second = (unit(name, root, media="small.mp4") for name in "ab")
    decoded = decode_unit(first, SPEC)
    assert isinstance(decoded, Decoded)
    assert decoded.seconds > 0
    assert as_own(first, decoded) is decoded
    shared = as_own(second, decoded)
    assert shared == replace(decoded, unit_id="b", seconds=0)
    assert same_media(first, second)
    others = (
        unit("c", root, media="noise.mp4"),
        unit("c", root / "other", media="small.mp4"),
        replace(second, decode_timeout_s=1.0),
        replace(second, sample=replace(second.sample, parts=(SMALL,))),
    )
    assert not any(same_media(first, other) for other in others)
    assert not same_media(unit("a", root), unit("b", root)), "there is nothing to share"


def test_a_sweep_may_limit_its_units_otherwise_than_the_model_does(root: Path) -> None:
    from faulty import unit

    hurried = replace(unit("u", root, media="small.mp4"), decode_timeout_s=1e-6)
    failed = decode_unit(hurried, SPEC)
    assert isinstance(failed, UnitFailure)
    assert "took more than 1e-06 s; give it longer (decode_timeout_s)" in failed.message
    unhurried = replace(hurried, decode_timeout_s=60)
    assert isinstance(decode_unit(unhurried, replace(SPEC, decode_timeout_s=1e-6)), Decoded)


def test_what_decoding_changed_is_told_by_file(root: Path) -> None:
    from faulty import unit

    write_video(root / "quiet.mp4", even(3, 10), sound_s=1)
    sample = unit("u", root, media="quiet.mp4").sample
    heard = replace(sample.media[0], with_audio=True)
    decoded = (decode_media(root, heard, SPEC),)
    assert media_notes(sample, decoded) == (
        "quiet.mp4: sound ends at 1.00 s of 2.90 s: nothing is heard after",
    )
