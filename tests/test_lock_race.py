"""Two drivers find the claim of one that was killed, where a file system has no locks."""

import fcntl
import json
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from avflow.orchestrator import lock
from avflow.orchestrator.errors import RunLocked
from avflow.orchestrator.lock import hold
from avflow.orchestrator.paths import RunPaths


def no_flock(*_: object) -> None:
    raise OSError(38, "Function not implemented")


def left_by_a_killed_driver(paths: RunPaths) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    paths.claim.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid}))


def overtaken(judge: Callable[[RunPaths], None], stack: ExitStack) -> Callable[[RunPaths], None]:
    """Another driver comes whole between the first look at the claim and its removal."""

    def judging(paths: RunPaths) -> None:
        judge(paths)
        lock._judge = judge
        stack.enter_context(hold(paths))

    return judging


def test_who_is_overtaken_removes_no_living_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    paths = RunPaths(tmp_path)
    left_by_a_killed_driver(paths)
    with ExitStack() as stack:
        monkeypatch.setattr(lock, "_judge", overtaken(lock._judge, stack))
        with pytest.raises(RunLocked, match=f"on {socket.gethostname()}"), hold(paths):
            pass
        assert paths.claim.exists(), "the other's"
    assert not list(tmp_path.glob("*claim*"))


def test_one_at_a_time_removes_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    paths = RunPaths(tmp_path)
    left_by_a_killed_driver(paths)
    removing = paths.claim.with_name(f"{paths.claim.name}.removing")
    removing.touch()
    with pytest.raises(RunLocked, match=f"if none runs, remove {removing}"), hold(paths):
        pass
    removing.unlink()
    with hold(paths):
        pass
