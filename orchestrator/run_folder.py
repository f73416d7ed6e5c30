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
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset
from avflow.orchestrator.errors import ConfigError, IdentityMismatch, StoreError
from avflow.orchestrator.identity import canonical_json, differences, identity_fields
from avflow.orchestrator.load import parse
from avflow.orchestrator.lock import driver, hold
from avflow.orchestrator.parts import serialise, write_atomically
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan
from avflow.orchestrator.plan_tables import plan_tables
from avflow.orchestrator.version import commit

__all__ = ["claim", "driver", "hold", "record_session", "sessions", "stored_config", "to_yaml"]

_PACKAGES = ("avflow", "torch", "transformers", "ray", "numpy", "pyarrow", "polars", "av")
_IDENTITY = b"avflow.identity"  # in the plan's footers: what the folder's rows were made with
_HEADER = """\
# Written by avflow: the sweep as it was resolved. It is itself a sweep file, and gives the same
# cells in another run folder: avflow sweep {name} --run ANOTHER_FOLDER
"""


def claim(paths: RunPaths, plan: Plan) -> None:
    """Write the resolved sweep and its plan. Call it with the folder held.

    Raises IdentityMismatch, with the fields that differ, when the folder is another sweep's.
    sweep.yaml is written again only if run-time fields changed (`limit`, above all). It may have
    been edited by hand, so the plan holds the identity, too.
    """
    _refuse_another(paths, plan.config)
    text = _HEADER.format(name=paths.sweep.name) + to_yaml(plan.config)
    try:
        if not paths.sweep.exists() or _changed(paths, plan.config):
            write_atomically(paths.sweep, text.encode(), paths.temporary)
        _sweep_away_drafts(paths)
        footer = {_IDENTITY: canonical_json(identity_fields(plan.config)).encode()}
        for path, table in plan_tables(paths, plan):
            stamped = table.replace_schema_metadata(footer)
            write_atomically(path, serialise(stamped), paths.temporary)
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
        with paths.provenance.open("a+b") as file:
            if _is_torn(file):
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"run folder {paths.root} can't be written: {error}") from error


def _is_torn(file: BinaryIO) -> bool:
    """Whether the last line has no end: its driver was killed, and this one must not go with it."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


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


def _refuse_another(paths: RunPaths, config: SweepConfig) -> None:
    """Raises IdentityMismatch when the folder's rows were made for another sweep."""
    theirs: list[tuple[object, str, str]] = []
    if paths.sweep.exists():
        theirs.append((identity_fields(stored_config(paths)), "the folder's", ""))
    if (planned := _planned_identity(paths)) is not None:
        mend = f"put {paths.sweep} back as it was if that was edited, or "
        theirs.append((planned, "that of the rows there", mend))
    # Through JSON, as one of them has come: a tuple there is a list here.
    mine = json.loads(canonical_json(identity_fields(config)))
    for identity, whose, mend in theirs:
        found = list(differences(mine, json.loads(canonical_json(identity))))
        if found:
            raise IdentityMismatch(
                f"{paths.root} holds the results of another sweep. What differs (this sweep's, "
                f"then {whose}):\n  " + "\n  ".join(found) + f"\n{mend}give another --run folder"
            )


def _planned_identity(paths: RunPaths) -> object:
    """None in a folder without a whole plan, or of a version that did not keep it."""
    try:
        footer = pq.read_metadata(paths.units).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return json.loads(footer[_IDENTITY]) if _IDENTITY in footer else None


def _changed(paths: RunPaths, config: SweepConfig) -> bool:
    """Whether run-time fields differ."""
    return stored_config(paths).model_dump() != config.model_dump()


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
