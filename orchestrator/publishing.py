"""`avflow report` and `avflow track`: a run folder's results for people, made from the store."""

from pathlib import Path

from avflow.orchestrator.outcome import read_outcome
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.report import words, write_report
from avflow.orchestrator.run_folder import stored_config
from avflow.orchestrator.tracking import publish


def draw(run: Path | str) -> str:
    """Write RUN/report; returns what was found, in words, and where the figures are."""
    paths = RunPaths(Path(run))
    outcome = read_outcome(paths, stored_config(paths))
    write_report(paths, outcome)
    found = words(outcome) or "No curve is stored yet: nothing to draw."
    return f"{found}\nfigures:  {paths.report}"


def publish_run(run: Path | str) -> str:
    """Publish what there is, unfinished tasks marked so; returns what changed, in words."""
    paths = RunPaths(Path(run))
    done = publish(paths, stored_config(paths), complete_only=False)
    changes = f"{done.created} new, {done.replaced} replaced, {done.unchanged} unchanged"
    unfinished = f"; {done.unfinished} tasks are not finished" if done.unfinished else ""
    return f"MLflow runs: {changes}{unfinished}\nstore:  {done.uri}\ncharts: avflow ui {run}"
