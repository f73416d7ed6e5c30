"""Merge parts in processes that SIGKILL themselves. `compact_harness.py RUN COPIES ROWS`

RUN is copied to COPIES/N, and in there a process forked for the purpose merges the parts and dies
at the N-th moment of those that matter (a draft written in part, before and after its rename,
before each removal), until one gets to its end. Prints how many died.
"""

import os
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from avflow.orchestrator.compact import compact
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.run_folder import hold


def strike_at(number: int) -> None:
    """Die at the `number`-th moment from now."""
    left = number

    def moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **kwargs: Any) -> Any:
            moment()
            return real(*args, **kwargs)

        return struck

    def torn(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if left == 1 and stat.S_ISREG(found.st_mode):
            os.ftruncate(descriptor, found.st_size // 2)
        moment()
        real_fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        moment()
        placed = real_replace(self, target)
        moment()
        return placed

    real_fsync, real_replace = os.fsync, Path.replace
    patched: Any = Path
    os.fsync, patched.replace = torn, renamed
    patched.unlink = before(Path.unlink)


def merge(run: Path, rows: int) -> None:
    with hold(RunPaths(run)):
        compact(RunPaths(run), rows=rows)


if __name__ == "__main__":
    run, copies, rows = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for number in count(1):
        copy = copies / str(number)
        shutil.copytree(run, copy)
        child = os.fork()
        if child == 0:
            try:
                strike_at(number)
                merge(copy, rows)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, ended = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(ended)
        if code != -signal.SIGKILL:
            sys.exit(code or print(number - 1))
