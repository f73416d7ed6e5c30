"""One driver a run folder: the second is refused by name, with and without the system's locks."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from avflow.orchestrator.errors import RunLocked
from avflow.orchestrator.lock import driver, hold
from avflow.orchestrator.paths import RunPaths

HOLDER = """
import errno, fcntl, sys
if {without_locks}:
    def flock(*_):
        raise OSError(errno.ENOSYS, "not here")
    fcntl.flock = flock
from pathlib import Path
from avflow.orchestrator.lock import hold
from avflow.orchestrator.paths import RunPaths
with hold(RunPaths(Path({run!r}))):
    print("held", flush=True)
    sys.stdin.read()
"""


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("without_locks", [False, True])
def test_the_second_driver_is_refused_by_the_first_s_host_and_pid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_locks: bool
) -> None:
    if without_locks:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    paths = RunPaths(tmp_path / "run")
    code = HOLDER.format(run=str(paths.root), without_locks=without_locks)
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    who = f"process {first.pid} on {socket.gethostname()}"
    with pytest.raises(RunLocked, match=f"is being written by {who}"), hold(paths):
        pass
    assert driver(paths) == who
    first.kill()
    first.communicate()
    with hold(paths):  # what a killed driver of this machine left is no claim
        assert driver(paths) == f"process {os.getpid()} on {socket.gethostname()}"
    assert driver(paths) is None
    assert not paths.claim.exists()


def test_without_locks_a_claim_of_another_machine_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    paths = RunPaths(tmp_path)
    paths.claim.write_text('{"host": "elsewhere", "pid": 1}\n')
    with pytest.raises(RunLocked, match=r"process 1 on elsewhere; .* remove .*driver\.claim"):
        hold(paths).__enter__()
    assert paths.claim.exists()
    paths.claim.write_text("")  # being written just now
    with pytest.raises(RunLocked):
        hold(paths).__enter__()


def test_a_disk_that_fails_is_not_taken_for_one_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        hold(RunPaths(tmp_path)).__enter__()
