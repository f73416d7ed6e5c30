"""One driver at a time in a run folder.

A lock of the kernel's, which lets go however the process dies; NFS and Lustre (mounted with
`flock`) pass it on between machines. Where a file system has no locks, a file made exclusively
stands in: it survives a killed driver, so one on another machine has to be removed by hand.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

from avflow.orchestrator.errors import ConfigError, RunLocked
from avflow.orchestrator.paths import RunPaths

_LOCK_TRIES = 5
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})

logger = logging.getLogger(__name__)


@contextmanager
def hold(paths: RunPaths) -> Iterator[None]:
    """Be the one driver of a run folder, made if missing, until the block (or the process) ends.

    Raises ConfigError when it can't be written, RunLocked when another driver holds it.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        file = paths.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run folder {paths.root} can't be written: {error}") from error
    with file:
        locked = _lock(file)
        if locked is False:
            raise RunLocked(
                f"{paths.root} is being written by {driver(paths) or 'another driver'}; "
                "wait for it to end, or stop it"
            )
        if locked is None:
            with _claimed(paths):
                yield
            return
        file.truncate(0)
        file.write(_who())
        file.flush()
        yield


def driver(paths: RunPaths) -> str | None:
    """`process 4711 on HOST`, if a driver holds the folder now."""
    try:
        with paths.lock.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _spelled(file.read())
            except OSError:
                return _spelled(paths.claim.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None


def _lock(file: TextIO) -> bool | None:
    """Whether it is ours now; None where the file system has no locks."""
    for _ in range(_LOCK_TRIES):
        try:
            # The kernel lets go of it when the process dies, however it dies.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # `driver` may be looking, for an instant
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return None
        else:
            return True
    return False


@contextmanager
def _claimed(paths: RunPaths) -> Iterator[None]:
    logger.warning("%s lies on a file system without locks", paths.root)
    while True:
        try:
            with paths.claim.open("x", encoding="utf-8") as file:
                file.write(_who())
            break
        except FileExistsError:
            _refuse_unless_dead(paths)
    try:
        yield
    finally:
        paths.claim.unlink(missing_ok=True)


def _refuse_unless_dead(paths: RunPaths) -> None:
    """Remove the claim of a process of this machine that has ended."""
    _judge(paths)
    # By now another driver may have removed it and claimed the folder: whoever removes judges again
    # where no other does.
    removing = paths.claim.with_name(f"{paths.claim.name}.removing")
    try:
        removing.open("x").close()
    except FileExistsError as error:
        raise RunLocked(
            f"{paths.root} is being claimed by another driver; if none runs, remove {removing}"
        ) from error
    try:
        _judge(paths)
        paths.claim.unlink(missing_ok=True)
    finally:
        removing.unlink()


def _judge(paths: RunPaths) -> None:
    """Raises RunLocked unless there is no claim, or that of a process here that has ended."""
    try:
        said = json.loads(paths.claim.read_text(encoding="utf-8"))
        host, pid = str(said["host"]), int(said["pid"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError):
        host, pid = "?", 0  # it is being written, or was torn
    if host == socket.gethostname() and not _runs(pid):
        return
    raise RunLocked(
        f"{paths.root} is being written by process {pid} on {host}; wait for it to end, or stop "
        f"it. This file system has no locks, so if that process is gone, remove {paths.claim}"
    )


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _who() -> str:
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": at}) + "\n"


def _spelled(text: str) -> str:
    who = json.loads(text or "{}")
    return f"process {who.get('pid', '?')} on {who.get('host', '?')}"
