"""Decoding in a process of its own, so that a file which hangs or crashes FFmpeg costs only itself.

Nothing in Python ends a C library that is stuck, and a crash takes its whole process along. So
the process that gives way is one that holds nothing else: neither a Ray worker nor the sweep.
Before each file it sets an alarm that the kernel rings, whatever the library does then; where
even that can't help (a disk that does not answer), the caller stops waiting.

    request: root, part, spec  ->  answer: DecodedMedia, or an exception (see `wire`)
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from avflow.datasets.media import decode_media, too_slow
from avflow.datasets.media_spec import DecodedMedia, MediaError, MediaSpec
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.wire import (
    WireError,
    receive_answer,
    receive_request,
    send_answer,
    send_request,
)

_ALARM_S = 0.2  # after the limit, which decoding itself looks at first
_PATIENCE_S = 2.0  # after the alarm


class Decoder:
    """One decoding process: started when first needed, and again after a file has ended it.

    Not for several threads at once: give each its own.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def decode_sample(
        self, root: Path, sample: Sample, spec: MediaSpec
    ) -> tuple[DecodedMedia, ...]:
        """All media of a sample, in the order of `sample.media`; raises as `decode` does."""
        return tuple(self.decode(root, part, spec) for part in sample.media)

    def decode(self, root: Path, part: MediaPart, spec: MediaSpec) -> DecodedMedia:
        """As `decode_media`, and MediaError too for a file that hangs or crashes the decoder.

        A decoder killed from outside (by the system, for want of memory) is a ChildProcessError:
        the same file may pass another time.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            send_request(process.stdin, root, part, spec)
            process.stdin.flush()
            limit_s = spec.decode_timeout_s + _ALARM_S + _PATIENCE_S
            if not _ready(process.stdout, limit_s):
                raise too_slow(root / part.path, spec)
            answer = receive_answer(process.stdout)
        except (EOFError, BrokenPipeError):
            raise self._ended(root / part.path, spec) from None
        except WireError as error:
            self.close()
            raise MediaError(f"{root / part.path}: its decoder sent nonsense: {error}") from error
        except BaseException:  # an answer that comes later must not be taken for the next file's
            self.close()
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """Kill the process. It is not waited for: one that hangs in the kernel never ends."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_PATIENCE_S)
            _close_pipes(self._process)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # forked since: the process is the parent's
            self._process, self._owner = None, os.getpid()
        if self._process is not None and self._process.poll() is not None:
            self.close()  # ended between two files: by nobody's fault that is here
        if self._process is None:
            # -P: a file of the current folder must not pass for a module. A session of its own:
            # Ctrl-C is for the sweep, which ends this by closing the pipe.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "avflow.datasets.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        return self._process

    def _ended(self, path: Path, spec: MediaSpec) -> Exception:
        """Why the process has gone while it decoded `path`."""
        assert self._process is not None
        status = self._process.wait()
        _close_pipes(self._process)
        self._process = None
        if status == -signal.SIGALRM:
            return too_slow(path, spec)
        if status == -signal.SIGKILL:
            return ChildProcessError(
                f"{path}: the decoding process was killed, perhaps for want of memory"
            )
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return MediaError(
            f"{path}: the file crashed its decoder ({cause}); encode it again or leave its "
            "samples out"
        )


def _ready(pipe: IO[bytes], limit_s: float) -> bool:
    """Whether there is something to read, or nobody left to write, within so many seconds."""
    waiting = select.poll()  # select() itself takes no descriptor past 1,023
    waiting.register(pipe, select.POLLIN)
    return bool(waiting.poll(limit_s * 1000))


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


def serve() -> None:
    """Answer requests on standard input until it is closed: the decoding process itself."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    while True:
        try:
            root, part, spec = receive_request(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, spec.decode_timeout_s + _ALARM_S)
        try:
            answer: DecodedMedia | Exception = decode_media(root, part, spec)
        except Exception as error:  # whatever it is, it is this file's, and goes to who asked
            answer = _with_traceback(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(BrokenPipeError):
            send_answer(answers, answer)
            answers.flush()


def _with_traceback(error: Exception) -> Exception:
    """Its traceback stays behind in this process, so it goes along as a note."""
    if not isinstance(error, MediaError):
        error.add_note("In the decoding process:\n" + "".join(traceback.format_exception(error)))
    return error


if __name__ == "__main__":
    serve()
