"""configs/paper-testbed.yaml, whole: the paper's experiments, figures and tables by one command."""

from pathlib import Path

import pytest

from avflow.orchestrator import drafts
from avflow.orchestrator.config import load_config
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.results import standing_failures, status
from avflow.orchestrator.sweep import run_sweep

ITEMS = {*(f"fig{number}" for number in range(1, 30)), "table1", "table4"}
"""Every figure and table of the paper."""
CONFIG = Path(__file__).parents[1] / "configs" / "paper-testbed.yaml"


def shown_items(paths: RunPaths) -> set[str]:
    drawn = {path.stem.partition("_")[0] for path in paths.report.glob("*.pdf")}
    return drawn | {path.stem.partition("_")[0] for path in paths.report.glob("table*.csv")}


def test_the_papers_sweep_at_its_smallest_shows_every_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample a task: all experiments, MLflow and the report, in the time that CI has. The
    picture of each of MLflow's 40 runs is left to other tests."""
    monkeypatch.setattr(drafts, "_fill_cell", lambda curves, task, own, folder: None)
    config = load_config(CONFIG).with_execution(executor="local", limit=1)
    outcome = run_sweep(config, tmp_path / "run", progress=Silent())
    assert outcome.exit_status == 0, standing_failures(tmp_path / "run")
    assert status(tmp_path / "run").complete
    assert shown_items(RunPaths(tmp_path / "run")) == ITEMS


@pytest.mark.slow
def test_the_papers_sweep_in_miniature_is_whole(tmp_path: Path) -> None:
    from avflow.orchestrator.outcome import read_outcome
    from avflow.orchestrator.report import write_report

    # Without a limit: the sample that probes draw must be among those that are run.
    config = load_config(CONFIG).with_execution(executor="local")
    outcome = run_sweep(config, tmp_path / "run", progress=Silent())
    assert outcome.exit_status == 0, standing_failures(tmp_path / "run")
    assert status(tmp_path / "run").complete
    paths = RunPaths(tmp_path / "run")
    shown = read_outcome(paths, config)
    write_report(paths, shown)
    page = (paths.report / "report.html").read_text()
    assert "INCOMPLETE" not in page
    for figure in config.figures:
        assert f'id="{figure.name}"' in page
    assert shown_items(paths) == ITEMS
    for name, curves in shown.panels.items():  # each line has a point a centre layer
        assert curves["center_layer"].n_unique() == 8, name
