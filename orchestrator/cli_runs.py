"""The verbs that look at a run folder; `cli.py` has the ones that fill it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

LOOK = "Look at a run"

app = typer.Typer(rich_markup_mode="markdown")

Run = Annotated[
    Path,
    typer.Argument(help="The run folder, as given to `avflow sweep --run`.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command(rich_help_panel=LOOK)
def status(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every 5 seconds, until the run is complete.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Where a run stands, from its files alone: works while it runs and after it died.

    `right` and `wrong` are the model's answers when left alone.
    """
    from avflow.orchestrator import views

    views.show_status(run, watch=watch, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def failures(run: Run, as_json: Json = False) -> None:
    """What failed for good, and why. `avflow resume RUN --failed` takes it up again."""
    from avflow.orchestrator import views

    views.show_failures(run, as_json=as_json)


@app.command(rich_help_panel=LOOK)
def query(
    run: Run,
    sql: Annotated[
        str,
        typer.Argument(
            help="polars SQL, for example "
            "`SELECT task, center_layer, avg(delta) FROM cells GROUP BY ALL`.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How to print it.")
    ] = "table",
) -> None:
    """Ask the tables of a run in SQL.

    Tables: `cells` (a row a job and sample: delta, p_base, p_knockout, ...), `samples`,
    `interventions`, `probes`, `failures`, and of the plan `jobs`, `units`. `SELECT * FROM cells
    LIMIT 1` shows the columns.
    """
    from avflow.orchestrator import views
    from avflow.orchestrator.results import query as ask

    views.show_frame(ask(run, sql), output)


@app.command(rich_help_panel=LOOK)
def report(
    run: Run,
    only: Annotated[
        str | None, typer.Option(help="One figure or table alone, by name: `fig5`, `table4`.")
    ] = None,
    wrong: Annotated[
        bool, typer.Option("--wrong", help="Curves of wrongly answered samples, in report/wrong.")
    ] = False,
) -> None:
    """Draw what is stored into RUN/report: a page, figures, tables, and in words what was found.

    A sweep does it when it ends. Curves that are not complete yet are drawn, and say so.
    """
    print(draw(run, only=only, correct=not wrong))


def draw(run: Path, *, only: str | None = None, correct: bool = True) -> str:
    """Write the report, or one figure's files; what to print of it."""
    from avflow.orchestrator.errors import StoreError
    from avflow.orchestrator.outcome import read_outcome
    from avflow.orchestrator.paths import RunPaths
    from avflow.orchestrator.report import PAGE, report_folder, words, write_only, write_report
    from avflow.orchestrator.run_folder import stored_config

    paths = RunPaths(run)
    outcome = read_outcome(paths, stored_config(paths), correct=correct)
    try:
        if only is not None:
            return "\n".join(str(path) for path in write_only(paths, outcome, only))
        write_report(paths, outcome)
    except OSError as error:
        folder = report_folder(paths, outcome)
        raise StoreError(
            f"{folder}: the report can't be written: {error}. The results are stored: once that is "
            f"mended, `avflow report {run}`"
        ) from error
    page = report_folder(paths, outcome) / PAGE
    of = "rightly" if correct else "wrongly"
    found = words(outcome) or (
        f"nothing: no curve of {of} answered samples is complete"
        + ("" if correct else "; they take an experiment with `samples: all`")
    )
    return f"\nWhat was found:\n{found}\n\nreport:   {page}"


@app.command(rich_help_panel=LOOK)
def effective(
    run: Run,
    out: Annotated[Path, typer.Option(help="The sweep file to write.")],
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Of the curves to go by, where the run has several widths."),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(min=1, help="How many random choices of as many pathways to compare with."),
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the random choices.")] = 0,
) -> None:
    """Write a sweep that keeps only the pathways a run found open, to see if they are enough.

    For each task, all other pathways are closed at every layer; its report compares the accuracy
    with the baseline's, and with as many pathways chosen at random.
    """
    from avflow.orchestrator.effective import effective_sweep
    from avflow.orchestrator.errors import StoreError
    from avflow.orchestrator.outcome import read_outcome
    from avflow.orchestrator.paths import RunPaths, quoted
    from avflow.orchestrator.run_folder import stored_config, to_yaml

    paths = RunPaths(run)
    config = stored_config(paths)
    outcome = read_outcome(paths, config)
    made = effective_sweep(config, outcome, window=window, draws=draws, seed=seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(to_yaml(made), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"--out {out} can't be written: {error}") from error
    print(f"{out}: {len(made.interventions)} tasks; run it in a folder of its own:")
    print(f"  avflow sweep {quoted(out)} --run {quoted(Path(f'{run}-effective'))}")


@app.command(rich_help_panel=LOOK)
def track(run: Run) -> None:
    """Bring MLflow up to date with the store. Nothing is logged twice.

    Also makes it anew from the run folder alone, in the store that `mlflow.tracking_uri` in
    RUN/sweep.yaml names.
    """
    from avflow.orchestrator.paths import RunPaths
    from avflow.orchestrator.run_folder import stored_config
    from avflow.orchestrator.tracking import publish

    paths = RunPaths(run)
    done = publish(paths, stored_config(paths))
    print(
        f"{done.uri}: {done.created} runs created, {done.replaced} replaced, {done.unchanged} "
        f"unchanged; {done.unfinished} tasks wait for samples"
    )


@app.command(rich_help_panel=LOOK)
def compact(run: Run) -> None:
    """Merge a run's many small part files into few large ones. Reading goes on meanwhile."""
    from avflow.orchestrator.compact import compact as merge
    from avflow.orchestrator.paths import RunPaths
    from avflow.orchestrator.run_folder import hold, stored_config

    paths = RunPaths(run)
    stored_config(paths)  # refuses what is no run folder, before a lock is put there
    with hold(paths):
        done = merge(paths)
    print(f"{done.before} part files are now {done.after}")


@app.command(rich_help_panel=LOOK)
def ui(
    run: Run,
    port: Annotated[int | None, typer.Option(help="Default: 5000, or a free one.")] = None,
) -> None:
    """Open a run's curves in MLflow's own page (loopback only). Ctrl-C ends it."""
    from avflow.orchestrator.paths import RunPaths
    from avflow.orchestrator.run_folder import stored_config
    from avflow.orchestrator.ui import serve

    paths = RunPaths(run)
    serve(paths, stored_config(paths), port=port)
