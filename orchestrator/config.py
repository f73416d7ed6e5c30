"""The sweep file: strict, frozen, each field described and classified as identity or run time."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
)
from pydantic import field_validator as _field_validator
from pydantic import model_validator as _model_validator

from avflow.datasets.media_spec import DECODE_TIMEOUT_S
from avflow.orchestrator.dataset_config import DatasetConfig
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.extras_config import InterventionConfig, ProbeConfig
from avflow.orchestrator.fields import Layers, Name, Names, Strict, Where
from avflow.orchestrator.figure_config import FigureConfig
from avflow.orchestrator.identity import IDENTITY_VERSION, Identity, RunTime
from avflow.orchestrator.policy import Budgets
from avflow.orchestrator.source import FieldPath, Source, spell
from avflow.pathways.layout import LayoutKind, OptionSpan
from avflow.pathways.pathway import Direction, Pathway

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelSpec

Windows = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class ModelConfig(Strict):
    """A checkpoint and how to run it (the fields of `ModelSpec`), and its GPUs."""

    name: Identity[Name]
    """What tables and figures call it."""
    family: Identity[Name]
    """The adapter that knows such checkpoints; `avflow models` lists them."""
    path: RunTime[Where]
    """A local folder (relative to this file), a hub id, or `testbed` for the shipped checkpoint.
    Where it lies is run time; what it is enters the identity by its digest."""
    revision: RunTime[str | None] = None
    """A hub revision (branch, tag or commit); the digest says what was found there."""
    dtype: Identity[Literal["float32", "bfloat16", "float64"]] = "bfloat16"
    """Of weights and activations; probabilities are float64 from a float32 head, always."""
    attention: Identity[Literal["sdpa", "eager"]] = "sdpa"
    """The attention that the unmodified model runs with."""
    system_prompt: Identity[str | None] = None
    """Null: the family's stated default."""
    fps: Identity[PositiveFloat] = 2.0
    """Video frames a second."""
    max_frames: Identity[PositiveInt] = 128
    """Frames at most, a video."""
    frame_tokens: Identity[PositiveInt | None] = 144
    """Visual tokens at most of a frame pair, after merging; null: the checkpoint's own budget."""
    image_tokens: Identity[PositiveInt | None] = 576
    """Visual tokens at most of a standalone image; null: the checkpoint's own budget."""
    positions: Identity[Literal["generate", "train"]] = "generate"
    """video-SALMONN 2+ alone: position ids as the released inference or the training has them."""
    block_audio_padding: Identity[bool] = True
    """video-SALMONN 2+ alone: the group `audio` holds the silence that pads to 30 s."""
    gpus_per_model: RunTime[PositiveInt] = 1
    """GPUs that one worker spreads the model over, on machines that have any."""

    def spec(self) -> ModelSpec:
        """As workers take it. Imports torch."""
        from avflow.workers.models.base import ModelSpec

        return ModelSpec(**self.model_dump(exclude={"gpus_per_model"}))


class CellFilter(Strict):
    """Matches where every list that is given holds the cell's value."""

    models: Identity[tuple[Name, ...] | None] = None
    """Names of models."""
    datasets: Identity[tuple[Name, ...] | None] = None
    """Names of data sets."""
    tasks: Identity[tuple[Name, ...] | None] = None
    """Names of tasks."""
    pathways: Identity[tuple[Name, ...] | None] = None
    """Names of pathways."""
    windows: Identity[Windows | None] = None
    """Window widths."""


class ExperimentConfig(Strict):
    """Axes whose product is run: models x data sets x tasks x pathways x windows x centres."""

    name: RunTime[Name]
    """For people; results of two experiments that ask the same are shared."""
    models: Identity[Names] = "all"
    """Names from `models` above."""
    datasets: Identity[Names] = "all"
    """Names from `datasets` above."""
    tasks: Identity[Names] = "all"
    """Tasks of those data sets."""
    pathways: Identity[Names] = "all"
    """The paper's 37 and the sweep's own; each runs on samples of its kind of prompt."""
    windows: Identity[Windows] = (7,)
    """Layers masked at a time (the paper's k)."""
    center_layers: Identity[Layers] = "all"
    """Layers, from 0, that the window is centred on."""
    samples: Identity[Literal["correct", "all"]] = "correct"
    """`correct`: only samples that the model answers correctly without knockout."""
    option_span: Identity[OptionSpan] = "letter"
    """What an option is to a pathway: its letter, or its letter and text."""
    include: Identity[tuple[CellFilter, ...]] = ()
    """If given, only cells that match one of these."""
    exclude: Identity[tuple[CellFilter, ...]] = ()
    """Cells that match one of these are left out."""
    all_pathways: RunTime[bool] = False
    """Leave no pathway out: an `exclude` that names pathways is dropped."""

    @_model_validator(mode="after")
    def _without_excluded_pathways(self) -> Self:
        if not self.all_pathways:
            return self
        kept = tuple(cells for cells in self.exclude if cells.pathways is None)
        return self if kept == self.exclude else self.model_copy(update={"exclude": kept})


class PathwayConfig(Strict):
    """A pathway of the sweep's own: targets may not read sources."""

    name: Identity[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)]]
    """A plain identifier. The paper's name gives the paper's pathway a new meaning here."""
    layout: Identity[LayoutKind]
    """The kind of prompt it is for."""
    sources: Identity[Annotated[tuple[Name, ...], Field(min_length=1)]]
    """Token groups that are not read (keys)."""
    targets: Identity[Annotated[tuple[Name, ...], Field(min_length=1)]]
    """Token groups that don't read them (queries)."""
    direction: Identity[Direction] = "one_way"
    """`both_ways`: nor do the sources read the targets; `across`: no member reads another."""

    @_model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self.pathway()  # raises PathwayError, a ValueError, with the known groups
        return self

    def pathway(self) -> Pathway:
        """As workers take it."""
        return Pathway(
            name=self.name,
            layout=self.layout,
            sources=self.sources,
            targets=self.targets,
            direction=self.direction,
        )


_BUDGETS = Budgets()


class RetryConfig(Strict):
    """Tries before a failure of each kind is final (see `Budgets`)."""

    exception: RunTime[PositiveInt] = _BUDGETS.exception
    """For an error that the same inputs would give again."""
    transient: RunTime[PositiveInt] = _BUDGETS.transient
    """For input and output."""
    gpu_memory: RunTime[PositiveInt] = _BUDGETS.gpu_memory
    """Each try halves the batch."""
    host_memory: RunTime[PositiveInt] = _BUDGETS.host_memory
    """Each further try is alone in its worker."""
    worker_death: RunTime[PositiveInt] = _BUDGETS.worker_death
    """For a curve that killed its worker."""
    node_lost: RunTime[PositiveInt] = _BUDGETS.node_lost
    """For a curve (or sample) whose machine went away each time."""
    fatal: RunTime[PositiveInt] = _BUDGETS.fatal
    """For a curve that ruined its worker."""
    timeout: RunTime[PositiveInt] = _BUDGETS.timeout
    """For a curve that hung."""
    load: RunTime[PositiveInt] = _BUDGETS.load
    """For a model that can't be loaded."""
    breaker_units: RunTime[PositiveInt] = _BUDGETS.breaker_units
    """Deaths on more different samples than this (plus one a live worker) give the model up ..."""
    breaker_s: RunTime[PositiveFloat] = _BUDGETS.breaker_s
    """... within so many seconds."""

    def budgets(self) -> Budgets:
        """As the policy takes them."""
        return Budgets(**self.model_dump())


class ExecutionConfig(Strict):
    """How the sweep is run. All may change between sessions, save `threads` and `byte_budget`."""

    executor: RunTime[Literal["ray", "local"]] = "ray"
    """`ray`: actors, here or on a cluster; `local`: one process, for debugging."""
    address: RunTime[Where | None] = None
    """Of a Ray cluster ("auto", "host:6379"); null: start Ray on this machine."""
    workers: RunTime[PositiveInt | None] = None
    """Actors at most; null: as many as the GPUs hold, or the CPUs where there is no GPU."""
    threads: Identity[PositiveInt] = 1
    """Torch's threads a worker on the CPU. Decides the last bits of sums: identity."""
    limit: RunTime[PositiveInt | None] = None
    """Samples a task at most, for a first try. A later run without it goes on from there."""
    unit_deadline_s: RunTime[PositiveFloat] = 900.0
    """Seconds a worker may be silent over a sample before it is taken to hang."""
    decode_timeout_s: RunTime[PositiveFloat] = DECODE_TIMEOUT_S
    """Seconds that decoding one file may take before its sample fails."""
    load_deadline_s: RunTime[PositiveFloat] = 1800.0
    """Seconds a worker may take to load its model."""
    stop_grace_s: RunTime[PositiveFloat] = 20.0
    """Seconds that running samples get when the sweep is asked to stop (Ctrl-C, SIGTERM)."""
    retries: RunTime[RetryConfig] = RetryConfig()
    """Patience, by kind of failure."""
    byte_budget: Identity[PositiveInt] = 2**31
    """Bytes of activations that a batch may take. Decides how curves are batched, and thereby the
    last bits of float32: identity."""


STORES = frozenset({"file", "sqlite", "postgresql", "mysql", "mssql", "http", "https",
                    "databricks", "databricks-uc", "uc"})  # fmt: skip
"""What MLflow's tracking URIs begin with, plug-ins apart."""


class MlflowConfig(Strict):
    """Where curves are published."""

    tracking_uri: RunTime[Where | None] = None
    """Any MLflow tracking URI; null: an SQLite store in the run folder (keep that off NFS)."""

    @_field_validator("tracking_uri")
    @classmethod
    def _has_a_store(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        scheme, colon, rest = uri.partition(":")
        kind = scheme.partition("+")[0] if colon else "file"  # sqlite, postgresql+psycopg, ...
        plugins = entry_points(group="mlflow.tracking_store").names
        if kind not in STORES | plugins or (kind == "sqlite" and not rest.startswith("///")):
            raise ValueError(
                f"MLflow has no store at {uri!r}: give sqlite:////FOLDER/mlflow.db, "
                "http://HOST:5000, postgresql://USER@HOST/NAME, or leave it out"
            )
        return uri


class RecordedIdentity(Strict):
    """What names and paths stood for, written into a run folder's sweep.yaml.

    A sweep file that holds it is refused when its checkpoints or data sets are other ones.
    """

    version: Identity[int] = IDENTITY_VERSION
    """IDENTITY_VERSION of the run."""
    models: Identity[dict[str, str]] = Field(default={})
    """Model -> digest of its config and weights."""
    datasets: Identity[dict[str, str]] = Field(default={})
    """Data set -> fingerprint of its samples."""


class SweepConfig(Strict):
    """A sweep."""

    name: RunTime[Name]
    """The MLflow experiment, and the title of reports."""
    models: Identity[Annotated[tuple[ModelConfig, ...], Field(min_length=1)]]
    """Checkpoints."""
    datasets: Identity[Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]]
    """Data sets."""
    experiments: Identity[tuple[ExperimentConfig, ...]] = ()
    """Curves: pathways blocked in windows of layers."""
    interventions: Identity[tuple[InterventionConfig, ...]] = ()
    """Answers under fixed masks and discarded tokens."""
    probes: Identity[tuple[ProbeConfig, ...]] = ()
    """What the undisturbed pass shows."""
    pathways: Identity[tuple[PathwayConfig, ...]] = ()
    """Pathways of the sweep's own."""
    figures: RunTime[tuple[FigureConfig, ...]] = ()
    """What the report draws; empty: the paper's figures of every model and data set."""
    execution: Identity[ExecutionConfig] = ExecutionConfig()
    """How to run it."""
    mlflow: RunTime[MlflowConfig] = MlflowConfig()
    """Where to publish it."""
    identity: Identity[RecordedIdentity | None] = None
    """Written by avflow; leave it out."""

    _source: Source | None = PrivateAttr(default=None)

    @_model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not (self.experiments or self.interventions or self.probes):
            raise ValueError("give `experiments`, `interventions` or `probes`: nothing is asked")
        return self

    def attach(self, source: Source) -> None:
        """Remember the file, so that later errors can point at its lines."""
        self._source = source

    def error(self, field: FieldPath, message: str) -> ConfigError:
        """A ConfigError that points at a field, in its file if there is one."""
        if self._source is not None:
            return self._source.error(field, message)
        return ConfigError(f"{spell(field)}: {message}" if field else message)

    def own_pathways(self) -> tuple[Pathway, ...]:
        """The sweep's own pathways."""
        return tuple(pathway.pathway() for pathway in self.pathways)

    def model(self, name: str) -> ModelConfig:
        """Raises KeyError for a name that is not in the sweep."""
        return {model.name: model for model in self.models}[name]

    def with_execution(
        self,
        *,
        workers: int | None = None,
        executor: Literal["ray", "local"] | None = None,
        address: str | None = None,
        limit: int | None = None,
    ) -> SweepConfig:
        """The same sweep with what was said on the command line; None leaves a field alone.

        Raises ConfigError.
        """
        given = {"workers": workers, "executor": executor, "address": address, "limit": limit}
        changed = {key: value for key, value in given.items() if value is not None}
        try:
            execution = ExecutionConfig.model_validate(self.execution.model_dump() | changed)
        except ValidationError as error:
            texts = [f"execution.{e['loc'][0]}: {e['msg']}" for e in error.errors()]
            raise ConfigError("\n".join(texts)) from None
        return self.model_copy(update={"execution": execution})


def json_schema() -> dict[str, Any]:
    """JSON schema of a sweep file, for editors (`# yaml-language-server: $schema=...`)."""
    return SweepConfig.model_json_schema()


def load_config(path: Path | str) -> SweepConfig:
    """Read and check a sweep file. Raises ConfigError, with all that is wrong, by line."""
    from avflow.orchestrator.load import load  # it knows this module

    return load(Path(path))
