"""Every path of a run folder, and of the cache. Nothing else joins path strings."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

TableName = Literal["cells", "samples", "interventions", "probes", "failures"]
TABLES: tuple[TableName, ...] = get_args(TableName)

_NOT_IN_A_SLUG = re.compile(r"[^A-Za-z0-9._-]+")


def slug(name: str) -> str:
    """A name as a folder: letters, digits, `.`, `_` and `-`."""
    return _NOT_IN_A_SLUG.sub("-", name).strip(".-") or "-"


def quoted(path: Path) -> str:
    """A path as a shell takes it, for the commands that people are told to type."""
    return shlex.quote(str(path))


def cache_folder(name: str) -> Path:
    """Where rendered or downloaded things of this name go: $AVFLOW_CACHE or ~/.cache/avflow."""
    root = os.environ.get("AVFLOW_CACHE") or "~/.cache/avflow"
    return Path(root).expanduser() / slug(name)


@dataclass(frozen=True, slots=True)
class RunPaths:
    """A run folder (the results contract)."""

    root: Path

    @property
    def sweep(self) -> Path:
        """The resolved config; written once."""
        return self.root / "sweep.yaml"

    @property
    def provenance(self) -> Path:
        """A JSON line a session."""
        return self.root / "provenance.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the one driver that writes here."""
        return self.root / "driver.lock"

    @property
    def claim(self) -> Path:
        """The same, on file systems without locks."""
        return self.root / "driver.claim"

    @property
    def plan(self) -> Path:
        """Folder of the planned jobs and units."""
        return self.root / "plan"

    @property
    def jobs(self) -> Path:
        """The planned jobs."""
        return self.plan / "jobs.parquet"

    @property
    def units(self) -> Path:
        """The planned units."""
        return self.plan / "units.parquet"

    @property
    def curves(self) -> Path:
        """What the plan holds for each kind of sample: the curves and their jobs."""
        return self.plan / "curves.parquet"

    @property
    def extras(self) -> Path:
        """The planned interventions and probes, a row a sample."""
        return self.plan / "extras.parquet"

    @property
    def counts(self) -> Path:
        """The paper's numbers of questions against those of the data."""
        return self.plan / "counts.parquet"

    @property
    def left_out(self) -> Path:
        """Questions that the annotations hold and nobody can be asked, and why."""
        return self.plan / "left_out.parquet"

    @property
    def logs(self) -> Path:
        """Folder of log files."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        """Folder of figures and tables."""
        return self.root / "report"

    @property
    def temporary(self) -> Path:
        """Folder for files on their way to their place."""
        return self.root / "_tmp"

    @property
    def mlflow(self) -> Path:
        """The SQLite store that the sweep uses unless told otherwise."""
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """Artifacts of that store."""
        return self.root / "mlartifacts"

    def table(self, name: TableName) -> Path:
        """Folder of a table's parts."""
        return self.root / name

    def partition(self, table: TableName, model: str, dataset: str) -> Path:
        """Folder of the parts of one model and data set.

        The keys are `m=` and `d=`, not `model=`: polars would let a folder's name override the
        column of that name in the file.
        """
        return self.table(table) / f"m={slug(model)}" / f"d={slug(dataset)}"
