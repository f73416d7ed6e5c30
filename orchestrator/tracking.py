"""MLflow as a view of the store: flat runs, one a (model, data set, task, window, variant), one a
category of tasks, and of interventions and probes one a task (`drafts`, `extras_drafts`).

The store is the truth; whatever is here can be made again from it. A run holds a metric a pathway
with step = centre layer, so that MLflow's chart view draws the paper's panels by itself, a line a
run (runs nested under a parent would leave that view empty).

Publishing again changes nothing: a run is found by its `cell_key` and kept if its
`publish_digest`, set last of all, is that of the numbers in the store. Otherwise a new run takes
its place and the old one is deleted (softly), because MLflow's metrics can only be added to. Times
are those of the sweep's creation. Only one process, the coordinator, writes.

In the default SQLite store artifacts are addressed relative to the server (`mlflow-artifacts:`),
not by absolute path, so that a run folder can be moved; they are put where `ui.serve`, or plain
`mlflow ui` in the run folder, looks for them.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.drafts import STRIDE, Draft, curve_drafts, sweep_draft
from avflow.orchestrator.errors import AvflowError
from avflow.orchestrator.extras_drafts import extra_drafts
from avflow.orchestrator.identity import digest, identity_fields
from avflow.orchestrator.outcome import is_complete, read_outcome
from avflow.orchestrator.paths import RunPaths, quoted, slug

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow would colour runs by a hash of their id, and two tasks alike. Okabe-Ito, then Tol's muted.
_COLOURS: Final = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
    "#882255", "#999933", "#44AA99",
)  # fmt: skip
_PROXIED: Final = "mlflow-artifacts:/"
_LONGEST_PARAM: Final = 6000
_LONGEST_TAG: Final = 5000
_NOTE: Final = """\
**Step = centre layer** of the knockout window.

`dp/PATHWAY` is the mean over correctly answered samples of (p_knockout - p_base) / p_base, where p
is the probability of the predicted answer letter; `dp_low` and `dp_high` are its 95% bootstrap
band, `flip` the share of samples whose answer changed, `n` their number. `effect_log_odds` and
`effect_accuracy` are the same as differences of the log-odds and of the share of right answers,
`q` the corrected p value of no effect. `peak_dp` and `peak_layer` say where a curve is furthest
from zero, `first_layer` and `last_layer` between which centres a sure effect of that sign lies.
Runs tagged `kind = cell` are of a task, `kind = category` of a category's tasks pooled, `kind =
accuracy` of the answers under masks and discards, `kind = probe` of attention, norms and sinks
(step = layer); figures and the report are in the run tagged `kind = sweep`. docs/mlflow.md has
search strings.
"""


class TrackingError(AvflowError):
    """MLflow can't be reached or written. Results are not touched by this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What `publish` did: numbers of MLflow runs."""

    uri: str
    created: int
    replaced: int
    unchanged: int
    unfinished: int
    """Tasks that wait for samples, and so are not published."""


def tracking_uri(paths: RunPaths, config: SweepConfig) -> str:
    """Where the sweep is published."""
    return config.mlflow.tracking_uri or f"sqlite:///{paths.mlflow.resolve().as_posix()}"


def publish(paths: RunPaths, config: SweepConfig) -> PublishReport:
    """Bring MLflow in line with the store; see the module.

    A task is published when all of its samples have ended, well or not; the sweep's own run, with
    its figures, when all tasks are. Raises TrackingError if MLflow can't be reached or written.
    """
    uri = tracking_uri(paths, config)
    outcome = read_outcome(paths, config)
    drafts = [*curve_drafts(outcome, config), *extra_drafts(outcome, config)]
    unfinished = sum(not is_complete(task) for task in outcome.tasks)
    if outcome.tasks and not unfinished:
        drafts.append(sweep_draft(outcome, config, paths))
    with _mlflow_errors(uri, paths):
        shelf = _open_shelf(uri, paths, config, outcome.created_ms)
        done = Counter(shelf.put(draft) for draft in drafts)
    return PublishReport(
        uri=uri,
        created=done["created"],
        replaced=done["replaced"],
        unchanged=done["unchanged"],
        unfinished=unfinished,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shelf:
    """One sweep's runs in one experiment."""

    client: MlflowClient
    experiment_id: str
    sweep: str
    created_ms: int
    artifacts: Path | None
    """Where the server of the default store looks for artifacts; None: ask MLflow to put them."""
    held: Mapping[str, Sequence[Run]]

    def put(self, draft: Draft) -> Literal["created", "replaced", "unchanged"]:
        """Make the draft the one run of its key."""
        held = self.held.get(draft.key, ())
        wanted = draft.digest
        kept = next((run for run in held if run.data.tags.get("publish_digest") == wanted), None)
        if kept is None:
            self._create(draft, wanted)
        for run in held:  # also what an earlier publication left half done
            if run is not kept:
                self.client.delete_run(run.info.run_id)
        if kept is not None:
            return "unchanged"
        return "replaced" if held else "created"

    def _create(self, draft: Draft, wanted: str) -> None:
        from mlflow.entities import Metric, Param, RunTag

        # The chart view lists the newest first: the sweep's own run, without curves, goes last.
        start = self.created_ms - (draft.key == "sweep")
        tags = {"cell_key": draft.key, "sweep_id": self.sweep}
        if draft.line is not None:
            tags["mlflow.runColor"] = self._colour(draft.line)
        run = self.client.create_run(
            self.experiment_id, start_time=start, run_name=draft.name, tags=tags
        )
        run_id = run.info.run_id
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, start, step) for name, value, step in draft.metrics],
            params=[Param(name, value[:_LONGEST_PARAM]) for name, value in draft.params.items()],
            tags=[RunTag(name, value[:_LONGEST_TAG]) for name, value in draft.tags.items()],
        )
        with tempfile.TemporaryDirectory() as folder:
            draft.fill(Path(folder))
            self._upload(run, Path(folder))
        self.client.set_terminated(run_id, end_time=start)
        self.client.set_tag(run_id, "publish_digest", wanted)

    def _colour(self, line: int) -> str:
        """Other sweeps of the store have other colours for the same task, to be compared."""
        number = int(self.experiment_id) if self.experiment_id.isdecimal() else 0
        return _COLOURS[(line + STRIDE * (number - 1)) % len(_COLOURS)]

    def _upload(self, run: Run, folder: Path) -> None:
        uri = run.info.artifact_uri
        if self.artifacts is not None and uri.startswith(_PROXIED):
            shutil.copytree(folder, self.artifacts / uri.removeprefix(_PROXIED), dirs_exist_ok=True)
        else:
            self.client.log_artifacts(run.info.run_id, str(folder))


def _open_shelf(uri: str, paths: RunPaths, config: SweepConfig, created_ms: int) -> _Shelf:
    own_store = config.mlflow.tracking_uri is None
    if own_store and not paths.mlflow.exists():
        _make_store(paths)
    client = connect(uri)
    experiment = client.get_experiment_by_name(config.name)
    if experiment is None:
        location = f"{_PROXIED}{slug(config.name)}" if own_store else None
        experiment_id = client.create_experiment(config.name, artifact_location=location)
        client.set_experiment_tag(experiment_id, "mlflow.note.content", _NOTE)
    else:
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment_id)
    sweep = digest(identity_fields(config))[:12]
    held: dict[str, list[Run]] = {}
    for run in _runs(client, experiment_id, f"tags.sweep_id = '{sweep}'"):
        held.setdefault(run.data.tags["cell_key"], []).append(run)
    return _Shelf(
        client=client,
        experiment_id=experiment_id,
        sweep=sweep,
        created_ms=created_ms,
        artifacts=paths.mlflow_artifacts if own_store else None,
        held=held,
    )


def _make_store(paths: RunPaths) -> None:
    """A new store gets its name when it is whole: MLflow can never go on with one whose tables a
    kill, or a full disk, left half made."""
    paths.temporary.mkdir(parents=True, exist_ok=True)
    draft = paths.temporary / f"{uuid.uuid4().hex}.tmp"
    try:
        connect(f"sqlite:///{draft.resolve().as_posix()}")
        draft.replace(paths.mlflow)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _runs(client: MlflowClient, experiment_id: str, query: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def connect(uri: str) -> MlflowClient:
    """A quiet client: no telemetry, no minutes of retries while a server is down."""
    _settle_environment()
    from mlflow import MlflowClient

    for chatty in ("alembic", "mlflow.store.db.utils"):  # a new store's migrations, line by line
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _settle_environment() -> None:
    """Before mlflow is imported; whatever a person has set stays."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


@contextmanager
def _mlflow_errors(uri: str, paths: RunPaths) -> Iterator[None]:
    """Turn whatever a store or server raises into a TrackingError that says what to do."""
    _settle_environment()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrackingError(
            f"MLflow at {uri} can't be written: {error}. The results in {paths.root} are not "
            f"touched by this; publish them later with: avflow track {quoted(paths.root)}"
        ) from error
