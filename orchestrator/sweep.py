"""A sweep from its file to its results: plan, claim the run folder, run what it lacks.

Everything that can be refused is refused before anything is started.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from avflow.orchestrator.compact import MANY_PARTS, compact, count_parts
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.coordinator import Coordinator, Outcome, Patience, Placement
from avflow.orchestrator.data import all_warnings, load_samples
from avflow.orchestrator.errors import ExitStatus, StoreError, SweepAborted
from avflow.orchestrator.executors import Executor, LocalExecutor
from avflow.orchestrator.metrics import Metered
from avflow.orchestrator.paths import RunPaths, quoted
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.policy import FailurePolicy
from avflow.orchestrator.progress import Enduring, Progress, duration, log_file, open_progress
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.refusals import cautions
from avflow.orchestrator.run_folder import claim, hold, record_session
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import StoredState, remaining, stored_state
from avflow.workers.protocol import UnitSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCounts:
    """Units: planned, complete in the store now (given up for good included), given up for good,
    and taken up by this session."""

    planned: int
    ended: int
    failed: int
    ran: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutcome:
    """How a session ended, for the shell and in words."""

    exit_status: ExitStatus
    counts: SweepCounts
    summary: str


def plan_sweep(config: SweepConfig) -> Plan:
    """Read checkpoints' configs and data sets, and enumerate. Raises ConfigError, and starts
    nothing; the testbed's clips are rendered if they are missing."""
    from avflow.workers.models import describe

    models = {}
    for index, model in enumerate(config.models):
        try:
            models[model.name] = describe(model.spec())
        except (ValueError, OSError) as error:  # UnsupportedModelError, or files that are missing
            raise config.error(("models", index, "path"), str(error)) from error
    datasets = {dataset.name: load_samples(dataset) for dataset in config.datasets}
    return build_plan(config, datasets, models)


def run_sweep(
    config: SweepConfig,
    run: Path,
    *,
    only_failed: bool = False,
    progress: Progress | None = None,
) -> SweepOutcome:
    """Run what the folder `run` lacks of the sweep; with `only_failed`, what it holds as failed.

    `progress` None: on standard error. Raises ConfigError, IdentityMismatch or RunLocked before
    anything is started, StoreError when results can't be written, SweepAborted when no model could
    be run, KeyboardInterrupt at a second signal.
    """
    began = time.monotonic()
    plan = plan_sweep(config)
    paths = RunPaths(Path(run))
    with hold(paths), log_file(_log_path(paths)):
        claim(paths, plan)
        record_session(paths, plan, sys.argv)
        _warn(plan)
        units = _due(plan, stored_state(paths), only_failed=only_failed)
        logger.info("%d of %d samples to run", len(units), len(plan.units))
        tracker = _Tracker(paths, plan.config)
        outcome = _run(plan, paths, units, progress, tracker) if units else _NOTHING
        if outcome.signal is None:
            tracker.finish()
            _tidy(paths)
        state = stored_state(paths)
    if units and outcome.given_up.keys() >= {unit.model for unit in units}:
        reasons = "\n  ".join(f"{model}: {why}" for model, why in outcome.given_up.items())
        failures = f"avflow failures {quoted(paths.root)}"
        raise SweepAborted(f"no model could be run:\n  {reasons}\nsee `{failures}`")
    counts = _counts(plan, state, len(units))
    status = _status(counts, outcome)
    words = _words(paths.root, counts, outcome, time.monotonic() - began)
    return SweepOutcome(exit_status=status, counts=counts, summary="\n".join(words))


def _warn(plan: Plan) -> None:
    """Data that differ from the paper's are run all the same; the run folder says how they do.
    Of prompts that a model refuses it says so before each sample does."""
    for warning in (*all_warnings(plan.datasets), *cautions(plan)):
        logger.warning(warning)
        print(f"warning: {warning}", file=sys.stderr)


def _tidy(paths: RunPaths) -> None:
    """Leave no heap of small files. That it fails costs nothing but tidiness."""
    if count_parts(paths) <= MANY_PARTS:
        return
    try:
        compact(paths)
    except StoreError as error:
        logger.warning("parts were not merged", exc_info=True)
        print(f"warning: {error}; later: avflow compact {quoted(paths.root)}", file=sys.stderr)


_NOTHING = Outcome(signal=None, failures=0, given_up={})


def _due(plan: Plan, state: StoredState, *, only_failed: bool) -> list[UnitSpec]:
    if not only_failed:
        return remaining(plan, state)
    failed = {unit_id for unit_id, _ in state.failures}
    return [u for u in remaining(plan, state, retry_failed=True) if u.unit_id in failed]


def _run(
    plan: Plan,
    paths: RunPaths,
    units: Sequence[UnitSpec],
    progress: Progress | None,
    tracker: "_Tracker",
) -> Outcome:
    execution = plan.config.execution
    policy = FailurePolicy(budgets=execution.retries.budgets())
    shown: Progress = Enduring(open_progress() if progress is None else progress)
    try:
        executor = _executor(plan.config)
        if execution.executor == "ray":
            shown = Metered(shown, plan.config.name)
        coordinator = Coordinator(
            queue=WorkQueue(units, policy=policy, deadline_s=execution.unit_deadline_s),
            units={unit.unit_id: unit for unit in units},
            models={
                model.name: Placement(
                    spec=replace(
                        model.spec(),
                        digest=plan.model_digests[model.name],
                        byte_budget=execution.byte_budget,
                    ),
                    gpus=model.gpus_per_model,
                )
                for model in plan.config.models
            },
            executor=executor,
            recorder=ResultStore(paths, plan),
            progress=shown,
            patience=Patience(load_s=execution.load_deadline_s, grace_s=execution.stop_grace_s),
            on_task_stored=tracker.request,
        )
        return coordinator.run()
    finally:
        shown.close()


def _executor(config: SweepConfig) -> Executor:
    execution = config.execution
    if execution.executor == "local":
        return LocalExecutor(threads=execution.threads)
    from avflow.orchestrator.ray_executor import RayExecutor

    return RayExecutor(
        workers=execution.workers, threads=execution.threads, address=execution.address
    )


class _Tracker:
    """Brings MLflow up to date beside the sweep. A view of the store: its failing is a warning."""

    def __init__(self, paths: RunPaths, config: SweepConfig) -> None:
        self._paths = paths
        self._config = config
        self._running: threading.Thread | None = None

    def request(self) -> None:
        """Publish what is complete, in the background; pass if that is under way."""
        if self._running is None or not self._running.is_alive():
            self._running = threading.Thread(target=self._publish, daemon=True)
            self._running.start()

    def finish(self) -> None:
        """Publish all that is complete, and wait for it."""
        if self._running is not None:
            self._running.join()
        self._publish()

    def _publish(self) -> None:
        from avflow.orchestrator.tracking import publish

        try:
            publish(self._paths, self._config)
        except Exception:  # whatever MLflow raises: results are safe, and can be published later
            logger.warning("MLflow is not up to date", exc_info=True)
            text = f"warning: MLflow could not be brought up to date (see {self._paths.logs})"
            print(f"{text}; later: avflow track {quoted(self._paths.root)}", file=sys.stderr)


def _counts(plan: Plan, state: StoredState, ran: int) -> SweepCounts:
    left = len(remaining(plan, state))
    failed = len(remaining(plan, state, retry_failed=True)) - left
    planned = len(plan.units)
    return SweepCounts(planned=planned, ended=planned - left, failed=failed, ran=ran)


def _status(counts: SweepCounts, outcome: Outcome) -> ExitStatus:
    if outcome.signal is not None:
        return ExitStatus(128 + outcome.signal)
    return ExitStatus.WITH_FAILURES if counts.failed or outcome.given_up else ExitStatus.DONE


def _words(root: Path, counts: SweepCounts, outcome: Outcome, seconds: float) -> list[str]:
    run = quoted(root)
    head = "done" if outcome.signal is None else "stopped"
    lines = [
        f"{head} after {duration(seconds)}: {counts.ended} of {counts.planned} samples have ended, "
        f"{counts.ran} were due now, {counts.failed} hold failures"
    ]
    lines += [f"given up: {model}: {why}" for model, why in outcome.given_up.items()]
    if counts.ended < counts.planned:
        lines.append(f"go on:    avflow resume {run}")
    if counts.failed:
        lines.append(f"failures: avflow failures {run}; mended? avflow resume {run} --failed")
    lines.append(f"results:  {root} (avflow status {run}, avflow query {run} SQL)")
    lines.append(f"charts:   avflow ui {run}")
    return lines


def _log_path(paths: RunPaths) -> Path:
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return paths.logs / f"{at}-{os.getpid()}.jsonl"
