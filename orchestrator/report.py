"""What a run found, drawn and in words: RUN/report, made from the store alone."""

from avflow.orchestrator import figures
from avflow.orchestrator.findings import findings
from avflow.orchestrator.outcome import read_outcome
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.run_folder import stored_config


def write_report(paths: RunPaths) -> str:
    """Draw every figure of the run as SVG and PNG into RUN/report; return what was found.

    A figure whose data is incomplete is drawn with what there is and says so on its face.
    """
    config = stored_config(paths)
    outcome = read_outcome(paths, config)
    drawn = figures.sweep_figures(outcome.curves, outcome.tasks, outcome.own)
    figures.save_figures(drawn, paths.report)
    words = findings(outcome.curves, outcome.own)
    (paths.report / "findings.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    found = words or ["nothing yet: no sample has a curve"]
    return "\n".join(["", "What was found:", *found, "", f"figures:  {paths.report}"])
