"""A run folder as a whole: claimed by one sweep, with a line for each session."""

import json
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata

import yaml

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset
from avflow.orchestrator.errors import ConfigError, IdentityMismatch, StoreError
from avflow.orchestrator.identity import differences, identity_fields
from avflow.orchestrator.load import parse
from avflow.orchestrator.lock import driver, hold
from avflow.orchestrator.parts import serialise, write_atomically
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.plan_tables import plan_tables
from avflow.orchestrator.version import commit

__all__ = ["claim", "driver", "hold", "record_session", "sessions", "stored_config", "to_yaml"]

_PACKAGES = ("avflow", "torch", "transformers", "ray", "numpy", "pyarrow", "polars", "av")
_HEADER = """\
# Written by avflow: the sweep as it was resolved. It is itself a sweep file, and gives the same
# cells in another run folder: avflow sweep {name} --run ANOTHER_FOLDER
"""


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
    """Add a line to provenance.jsonl: versions, code, hosts, what was asked for.

    Raises ConfigError when it can't be written.
    """
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
    try:
        with paths.provenance.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"run folder {paths.root} can't be written: {error}") from error


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
