"""Run sweeps in processes that SIGKILL themselves at a chosen moment. `kill_harness.py CONFIG`

Each line of standard input is a step, JSON: {"run": FOLDER, "signal": "KILL", "at": "curve:3",
"executor": "local"}; without `at` it runs undisturbed. Each is a process of its own, forked from
this one so that the imports are paid once. It answers with a JSON line: how it ended, the curves it
handed to the store, how often each kind of moment came, a digest of the cells that the folder then
has, and which processes outlived it.

Moments: `load` (the model), `decode` (a sample), `curve` and `sample` (handed to the store, not yet
durable), and in each atomic write `torn` (half a draft is on disk), `fsync` (before it), `renamed`
(before the folder is synced). `:n` is the n-th, from 1.
"""

import hashlib
import importlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avflow.orchestrator import executors, store, sweep
from avflow.orchestrator.config import load_config
from avflow.orchestrator.progress import Silent
from avflow.workers.actor import ModelWorker

for slow in ("transformers", "avflow.workers.run_unit"):  # paid once, before the forks
    importlib.import_module(slow)


class Moments:
    """Counts moments, writes them down, and strikes at one."""

    def __init__(self, ledger: Path, strike_at: str | None, number: int) -> None:
        self._ledger = ledger.open("a")
        self._strike_at = strike_at
        self._number = number
        self._seen: Counter[str] = Counter()

    def pass_by(self, moment: str, about: str = "") -> bool:
        """Whether to strike now; the caller may do some damage first."""
        self._seen[moment] += 1
        self._ledger.write(f"{moment}\t{about}\n")
        self._ledger.flush()
        return f"{moment}:{self._seen[moment]}" == self._strike_at

    def strike(self) -> None:
        """Kill the driver alone; Ctrl-C reaches all processes that it has started."""
        if self._number == signal.SIGKILL:
            os.kill(os.getpid(), self._number)
        else:
            os.killpg(0, self._number)

    def before(self, owner: Any, name: str, moment: str, about: Callable[..., str]) -> None:
        """Let the moment pass by before each call of a function."""
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.pass_by(moment, about(*args)):
                self.strike()
            return real(*args, **kwargs)

        setattr(owner, name, watched)


def watch(moments: Moments, *, on_ray: bool) -> None:
    """Put the moments where they belong, and commit each unit apart."""
    store.COMMIT_UNITS = 1
    sweep._Tracker.finish = lambda self: None  # MLflow has tests of its own
    sweep._Tracker.request = lambda self: None
    if not on_ray:  # the class travels to Ray's workers, the ledger can't
        moments.before(ModelWorker, "__init__", "load", lambda *_: "")
    moments.before(executors, "decode_unit", "decode", lambda unit, _: unit.unit_id)
    add = store.ResultStore
    moments.before(add, "add_curve", "curve", lambda _, u, done: f"{u.unit_id} {done.curve}")
    moments.before(add, "add_sample", "sample", lambda _, u, done: u.unit_id)
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and moments.pass_by("torn"):
            os.ftruncate(descriptor, found.st_size // 2)
            moments.strike()
        if moments.pass_by("fsync"):
            moments.strike()
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        placed = real_replace(self, target)
        if moments.pass_by("renamed"):
            moments.strike()
        return placed

    patched: Any = Path
    os.fsync, patched.replace = fsync, replace


def run_step(config: str, step: dict[str, str], ledger: Path) -> int:
    """In the child: the driver's own process."""
    number = getattr(signal, "SIG" + step.get("signal", "KILL"))
    os.setpgid(0, 0)
    loaded = load_config(config).with_execution(executor=step.get("executor"))
    moments = Moments(ledger, step.get("at"), number)
    watch(moments, on_ray=loaded.execution.executor == "ray")
    return sweep.run_sweep(loaded, Path(step["run"]), progress=Silent()).exit_status


def cells_digest(run: Path) -> str:
    """Of the cells without their order. Raises if a part is not whole."""
    tables = [pq.read_table(part, partitioning=None) for part in run.glob("cells/**/*.parquet")]
    if not tables:
        return "none"
    keys = [("job_id", "ascending"), ("sample_id", "ascending")]
    table = pa.concat_tables(tables).sort_by(keys)
    return hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()


def answer(config: str, step: dict[str, str]) -> dict[str, Any]:
    """Fork the driver, wait for its end, and look at what it left."""
    run = Path(step["run"])
    run.mkdir(parents=True, exist_ok=True)
    ledger = run / f"ledger-{len(list(run.glob('ledger-*')))}.txt"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = run_step(config, step, ledger)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    outlived_by = processes_of(child)
    passed = [line.split("\t") for line in ledger.read_text().splitlines()]
    return {
        "ended": os.waitstatus_to_exitcode(ended),
        "curves": [about for moment, about in passed if moment == "curve"],
        "moments": Counter(moment for moment, _ in passed),
        "cells": cells_digest(run),
        "stored": stored_curves(run),
        "outlived_by": outlived_by,
    }


def processes_of(group: int, patience_s: float = 30) -> list[str]:
    """What still runs of a process group, once it had time to end."""
    until = time.monotonic() + patience_s
    while True:
        found = subprocess.run(
            ["ps", "-o", "args=", "-g", str(group)], capture_output=True, text=True, check=False
        )
        alive = [line for line in found.stdout.splitlines() if "<defunct>" not in line]
        if not alive or time.monotonic() > until:
            return alive
        time.sleep(0.5)


def stored_curves(run: Path) -> list[str]:
    from avflow.orchestrator.paths import RunPaths
    from avflow.orchestrator.stored import stored_state

    return [f"{unit} {curve}" for unit, curve in stored_state(RunPaths(run)).curves]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(sys.argv[1], json.loads(line))), flush=True)
