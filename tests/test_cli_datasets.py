"""`avflow datasets get` against a local hub, and `check` against folders made here."""

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_snapshots import odyssey_rows, write_odyssey
from hub import COMMIT, Hub, serving
from in_process import avflow
from media_files import even, write_video

from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.fetching import FetchError, Members, unpack

REPOSITORY = "honglyhly/WorldSense"
QA = b'{"v1": {"video_id": "v1"}}'


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {
        "README.md": b"not needed",
        "worldsense_qa.json": QA,
        "worldsense_subtitles.zip": b"not needed either",
        "worldsense_videos_0.zip": zipped({"videos/v1.mp4": b"1" * 300_000, "videos/": b""}),
        "worldsense_videos_1.zip": zipped({"a/../../v2.mp4": b"2" * 1000}),
    }
    with serving(Hub(repository=REPOSITORY, files=files)) as running:
        yield running


def get(hub: Hub, to: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its environment once."""
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(to.parent / "hf"), **environment}
    command = [sys.executable, "-c", "from avflow.orchestrator.cli import main; main()"]
    return subprocess.run(
        [*command, "datasets", "get", "worldsense", "--to", str(to), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **here},
    )


def test_a_benchmark_is_fetched_unpacked_and_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "worldsense"
    first = get(hub, to)
    assert first.returncode == 0, first.stderr
    assert f"{to} holds {REPOSITORY} at {COMMIT}" in first.stdout
    assert (to / "worldsense_qa.json").read_bytes() == QA
    assert (to / "videos" / "v1.mp4").read_bytes() == b"1" * 300_000
    assert (to / "videos" / "v2.mp4").stat().st_size == 1000, "under its bare name, inside"
    assert not (to / "README.md").exists()
    assert not (to / "worldsense_subtitles.zip").exists()
    record = json.loads((to / "fetched.json").read_text())
    assert (record["repository"], record["commit"]) == (REPOSITORY, COMMIT)
    assert set(record["files"]) == {
        "worldsense_qa.json",
        *(f"worldsense_videos_{i}.zip" for i in (0, 1)),
    }

    hub.sent.clear()
    assert get(hub, to).returncode == 0
    assert hub.sent == []

    offline = get(hub, to, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    (to / "worldsense_qa.json").write_text("cut")
    offline = get(hub, to, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set" in offline.stderr


def test_a_download_that_stopped_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    big = b"1" * 24_000_000  # the hub's library writes 10 MB at a time
    hub.files["worldsense_videos_0.zip"] = zipped({"videos/v1.mp4": big})
    hub.cut.add("worldsense_videos_0.zip")
    to = tmp_path / "worldsense"
    done = get(hub, to)
    if done.returncode != 0:  # the hub's library may give up, or go on by itself
        assert "goes on from there" in done.stderr
        done = get(hub, to)
    assert done.returncode == 0, done.stderr
    (asked,) = [r for r in hub.ranges if "videos_0" in r]
    assert int(asked.partition("bytes=")[2].rstrip("-")) > 0
    assert (to / "videos" / "v1.mp4").read_bytes() == big


def test_what_can_not_be_fetched_is_said_before_anything_is(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "worldsense"
    for words, environment, says in [
        (("--revision", "v9"), {}, "has no revision 'v9'"),
        ((), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached"),
        ((), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ]:
        done = get(hub, to, *words, **environment)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
    assert not (to / "worldsense_qa.json").exists()
    unknown = avflow("datasets", "get", "nonsense", "--to", str(to))
    assert (unknown.returncode, "av_odyssey" in unknown.stderr) == (2, True)


def test_a_repository_that_is_not_there_or_holds_something_else(tmp_path: Path) -> None:
    with serving(Hub(repository="some/thing", files={})) as hub:
        done = get(hub, tmp_path / "a")
    assert (done.returncode, "is not there, or asks for a login" in done.stderr) == (2, True)
    with serving(Hub(repository=REPOSITORY, files={"README.md": b"moved"})) as hub:
        done = get(hub, tmp_path / "b")
    assert (done.returncode, "holds none of worldsense_qa.json" in done.stderr) == (2, True)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = zipped({"v.mp4": b"".join(b"%d" % n**5 for n in range(900))}, zipfile.ZIP_DEFLATED)
    for data in (whole[:500], whole[:40] + b"\xff" * 400 + whole[440:]):
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(FetchError, match=r"a\.zip: damaged"):
            unpack(tmp_path / "a.zip", tmp_path / "out", {})


def test_an_archive_with_a_password_and_a_full_disk_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bytearray(zipped({"v.mp4": b"1" * 100}))
    (tmp_path / "a.zip").write_bytes(whole)
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        whole[whole.index(signature) + flags] |= 1  # encrypted
    (tmp_path / "sealed.zip").write_bytes(whole)
    with pytest.raises(FetchError, match=r"sealed\.zip: .*password.*; unpack it by hand into "):
        unpack(tmp_path / "sealed.zip", tmp_path / "out", {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("avflow.orchestrator.fetching.shutil.copyfileobj", full)
        with pytest.raises(FetchError, match=r"stopped \(.*No space left.*\); the same command"):
            unpack(tmp_path / "a.zip", tmp_path / "out", {})
    assert unpack(tmp_path / "a.zip", tmp_path / "out", {}) == 1


def test_two_files_of_one_name_are_not_written_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"x/v.mp4": b"1", "y/v.mp4": b"22"}))
    with pytest.raises(FetchError, match=r"a\.zip/x/v\.mp4 and a\.zip/y/v\.mp4 would be one file"):
        unpack(tmp_path / "a.zip", tmp_path / "out", {})


def test_nor_are_files_of_one_name_in_two_archives(tmp_path: Path) -> None:
    members: Members = {}
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"else")):
        (tmp_path / f"{name}.zip").write_bytes(zipped({"x/v.mp4": content}))
    assert unpack(tmp_path / "a.zip", tmp_path / "out", members) == 1
    assert unpack(tmp_path / "b.zip", tmp_path / "out", members) == 0
    with pytest.raises(FetchError, match=r"a\.zip/x/v\.mp4 and c\.zip/x/v\.mp4 would be one file"):
        unpack(tmp_path / "c.zip", tmp_path / "out", members)
    assert (tmp_path / "out" / "v.mp4").read_bytes() == b"same"


def test_a_disk_that_is_too_small_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avflow.orchestrator import fetching

    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"has 0\.0 GB free"):
        fetching._check_room(tmp_path / "not" / "yet", 2000)


def worldsense(root: Path, *, videos: int) -> Path:
    """A folder in WorldSense's layout with three questions about short videos."""
    (root / "videos").mkdir(parents=True)
    for number in range(videos):
        write_video(root / "videos" / f"v{number}.mp4", even(2 + number, 10), sound_s=2 + number)
    task: dict[str, Any] = {
        "task_domain": "Recognition",
        "task_type": "Audio Counting",
        "question": "How many?",
        "answer": "B",
        "candidates": ["A. one", "B. two", "C. three", "D. four"],
    }
    table = {
        f"v{n}": {"video_id": f"v{n}", "video_duration": "2s", "duration": "<1min",
                  "task0": task, "task1": task}
        for n in range(3)
    }  # fmt: skip
    (root / "worldsense_qa.json").write_text(json.dumps(table))
    return root


def test_a_folder_is_compared_with_the_paper_and_its_media_decoded(tmp_path: Path) -> None:
    root = worldsense(tmp_path / "ws", videos=2)
    (root / "videos" / "v1.mp4").write_bytes(b"no video")
    done = avflow("datasets", "check", "worldsense", "--root", str(root), "--json")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert (found["questions"], found["media"], found["good"]) == (6, 3, False)
    counts = {row["task"]: row for row in found["counts"]}
    assert (counts["Audio Counting"]["expected"], counts["Audio Counting"]["found"]) == (38, 6)
    errors = {row["path"]: row["error"] for row in found["bad_media"]}
    assert set(errors) == {"videos/v1.mp4", "videos/v2.mp4"}
    assert "damaged, or no video file" in errors["videos/v1.mp4"]
    assert "no such file" in errors["videos/v2.mp4"]
    (row,) = found["durations"]
    assert (row["task"], row["kind"], row["files"]) == ("Audio Counting", "video", 1)
    assert row["longest"] == pytest.approx(2, abs=0.11)
    text = avflow("datasets", "check", "worldsense", "--root", str(root), "--processes", "2")
    assert text.returncode == 3
    assert "DIFFERS" in text.stdout
    assert "v2.mp4: no such file" in text.stdout
    assert "6 questions; 1 media decoded, 0 of them with notes" in text.stdout
    words = ("check", "worldsense", "--root", str(root), "--decode-timeout-s", "0.001")
    assert "v0.mp4: decoding took more than 0.001 s" in avflow("datasets", *words).stdout
    counted = avflow("datasets", "check", "worldsense", "--root", str(root), "--no-media", "--json")
    assert json.loads(counted.stdout)["media"] is None


def test_what_a_plan_warns_of_is_told_here_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avflow.datasets import stored_media

    monkeypatch.setattr(stored_media, "_COARSE_BYTES", 0)
    root = write_odyssey(tmp_path / "o", odyssey_rows({"Animal Recognition": 4}))
    words = ("datasets", "check", "av_odyssey", "--root", str(root), "--no-media")
    assert "mind: " in avflow(*words).stdout
    found = json.loads(avflow(*words, "--json").stdout)
    assert "write the file anew with smaller groups" in found["notes"][0]


def test_no_more_files_are_decoded_at_a_time_than_it_has_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's share of a node, that is: on a share of one, 64 decoders would all run late."""
    from avflow.orchestrator import checking

    asked: list[int] = []
    whole = checking.check_files

    def noted(root: Path, parts: Any, spec: Any, processes: int, on_file: Any) -> Any:
        asked.append(processes)
        return whole(root, parts, spec, processes, on_file)

    monkeypatch.setattr(checking, "check_files", noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    avflow("datasets", "check", "worldsense", "--root", str(worldsense(tmp_path / "w", videos=0)))
    assert asked == [1]


def test_whatever_decoding_a_file_raises_is_that_file_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avflow.orchestrator import checking

    def raises(*_: object) -> None:
        raise ValueError("never seen before")

    monkeypatch.setattr(checking.Decoder, "decode", raises)
    root = worldsense(tmp_path / "ws", videos=0)
    done = avflow("datasets", "check", "worldsense", "--root", str(root))
    assert done.returncode == 3, done.stderr
    assert "videos/v0.mp4: ValueError: never seen before" in done.stdout


def test_a_folder_that_is_whole_passes(tmp_path: Path) -> None:
    for number in range(2):
        write_video(tmp_path / f"v{number}.mp4", even(2, 10), sound_s=3)
    lines = [
        {"media": f"v{n}.mp4", "question": "?", "options": ["a", "b"], "answer": "A", "task": "t"}
        for n in (0, 1, 0)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = avflow("datasets", "check", "jsonl", "--root", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["good"], found["questions"], found["media"]) == (True, 3, 2)
    assert found["media_notes"][0]["notes"] == ["picture ends at 1.90 s, sound at 3.00 s"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("worldsense", "no annotations of WorldSense"),
        ("jsonl", "must hold one .jsonl file"),
        ("nonsense", "no reader is called 'nonsense'"),
    ],
)
def test_a_folder_that_is_something_else_is_refused(tmp_path: Path, name: str, says: str) -> None:
    done = avflow("datasets", "check", name, "--root", str(tmp_path))
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert done.stderr.startswith("avflow: "), "no bar is drawn into a file"


def test_the_list_of_readers_is_what_the_bare_verb_prints() -> None:
    done = avflow("datasets")
    assert done.returncode == 0
    assert {"testbed", "worldsense", "av_odyssey"} <= {*done.stdout.split()}
