"""A run folder as a whole: claimed by one sweep, held by one driver at a time."""

import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import TextIO

import yaml

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset
from avflow.orchestrator.errors import ConfigError, IdentityMismatch, RunLocked, StoreError
from avflow.orchestrator.identity import differences, identity_fields
from avflow.orchestrator.load import parse
from avflow.orchestrator.parts import serialise, write_atomically
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.plan_tables import plan_tables
from avflow.orchestrator.version import commit

_PACKAGES = ("avflow", "torch", "transformers", "ray", "numpy", "pyarrow", "polars", "av")
_LOCK_TRIES = 5
_HEADER = """\
# Written by avflow: the sweep as it was resolved. It is itself a sweep file, and gives the same
# cells in another run folder: avflow sweep {name} --run ANOTHER_FOLDER
"""


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
        if not _lock(file):
            raise RunLocked(
                f"{paths.root} is being written by {driver(paths) or 'another driver'}; "
                "wait for it to end, or stop it"
            )
        file.truncate(0)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        file.write(json.dumps(who) + "\n")
        file.flush()
        yield


def _lock(file: TextIO) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            # The kernel lets go of it when the process dies, however it dies.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # `driver` may be looking, for an instant
        else:
            return True
    return False


def driver(paths: RunPaths) -> str | None:
    """`process 4711 on HOST`, if a driver holds the folder now."""
    try:
        with paths.lock.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                who = json.loads(file.read() or "{}")
                return f"process {who.get('pid', '?')} on {who.get('host', '?')}"
    except (OSError, ValueError):
        return None
    return None


def claim(paths: RunPaths, plan: Plan) -> None:
    """Write the resolved sweep and its plan. Call it with the folder held.

    Raises IdentityMismatch, with the fields that differ, when the folder is another sweep's.
    sweep.yaml is written again only if run-time fields changed (`limit`, above all).
    """
    text = _HEADER.format(name=paths.sweep.name) + to_yaml(plan.config)
    try:
        if not paths.sweep.exists() or _changed(paths, plan.config):
            write_atomically(paths.sweep, text.encode(), paths.temporary)
        _sweep_away_drafts(paths)
        for path, table in plan_tables(paths, plan):
            write_atomically(path, serialise(table), paths.temporary)
    except OSError as error:
        raise ConfigError(f"run folder {paths.root} can't be written: {error}") from error


def to_yaml(config: SweepConfig) -> str:
    """A config as a sweep file."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def stored_config(paths: RunPaths) -> SweepConfig:
    """The sweep that a run folder holds, its checkpoints present or not.

    Raises StoreError when it holds none. To run it again, `load_config` sweep.yaml instead.
    """
    if not paths.sweep.is_file():
        raise StoreError(f"{paths.root} is no run folder: there is no {paths.sweep.name} in it")
    return parse(paths.sweep)


def record_session(paths: RunPaths, plan: Plan, argv: Sequence[str]) -> None:
    """Add a line to provenance.jsonl: versions, code, hosts, what was asked for."""
    line = {
        "at": _now(),
        "argv": list(argv),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "execution": plan.config.execution.model_dump(mode="json"),
        "models": {model.name: [model.path, model.revision] for model in plan.config.models},
        "datasets": {name: _as_read(loaded) for name, loaded in plan.datasets.items()},
        "counts": asdict(plan.counts()),
    }
    with paths.provenance.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _as_read(loaded: LoadedDataset) -> dict[str, object]:
    differ = [str(check) for check in loaded.checks if not check.good]
    return {
        "root": str(loaded.root),
        "samples": len(loaded.samples),
        "left_out": len(loaded.left_out),
        "counts_checked": len(loaded.checks),
        "counts_that_differ": differ,
    }


def sessions(paths: RunPaths) -> list[Mapping[str, object]]:
    """The lines of provenance.jsonl, oldest first; a torn last line is left out."""
    if not paths.provenance.is_file():
        return []
    lines = []
    for line in paths.provenance.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the driver was killed while it wrote this one
    return lines


def _changed(paths: RunPaths, config: SweepConfig) -> bool:
    """Whether run-time fields differ. Raises IdentityMismatch when others do."""
    stored = stored_config(paths)
    found = list(differences(identity_fields(config), identity_fields(stored)))
    if found:
        raise IdentityMismatch(
            f"{paths.root} holds the results of another sweep. What differs (this sweep's, then "
            "the folder's):\n  " + "\n  ".join(found) + "\ngive another --run folder"
        )
    return stored.model_dump() != config.model_dump()


def _sweep_away_drafts(paths: RunPaths) -> None:
    """What a killed driver left half-written."""
    if paths.temporary.is_dir():
        for draft in paths.temporary.glob("*.tmp"):
            draft.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
