"""The `avflow` command: every verb, thin. What a verb does lives in the module it imports.

Heavy libraries are imported inside the verbs, so that `avflow --help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avflow.orchestrator import cli_datasets, cli_models
from avflow.orchestrator.errors import AvflowError, ExitStatus

if TYPE_CHECKING:
    from avflow.orchestrator.config import SweepConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Attention-knockout sweeps over audio-visual LLMs.

A first run: `avflow demo`, then `avflow ui runs/demo`. Running a sweep again goes on where it
stopped.

Exit status: 0 done, 1 unexpected error, 2 usage or configuration (nothing was started),
3 finished but something failed, 130/143 interrupted (what was done is kept).""",
)

Config = Annotated[Path, typer.Argument(help="The sweep file (YAML).", show_default=False)]
Run = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Workers, one a GPU (or a process where there is none). Default: the file's."
    ),
]
Executor = Annotated[
    Literal["ray", "local"] | None,
    typer.Option(help="`local` runs everything in one process, for debugging."),
]
Address = Annotated[
    str | None,
    typer.Option(help="A Ray cluster to join (`auto`, `host:6379`). Default: start Ray here."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first N samples of each task, for a first try.")
]


@app.command()
def plan(
    config: Config,
    *,
    as_json: Json = False,
    limit: Limit = None,
    accuracy: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of right baselines; wrong ones call for no curve."),
    ] = 1.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run one real sample here, and calibrate with it.")
    ] = False,
    measure_model: Annotated[
        str | None, typer.Option("--model", help="Of --measure. Default: the file's first.")
    ] = None,
) -> None:
    """Count what a sweep would run, without running it: jobs, cells, FLOPs, GPU-hours.

    What has not been fetched yet is counted from the paper and from published shapes.
    """
    from avflow.orchestrator.config import load_config
    from avflow.orchestrator.nominal import plan_anyway
    from avflow.orchestrator.sweep import plan_sweep
    from avflow.orchestrator.views_plan import show_plan

    loaded = load_config(config).with_execution(limit=limit)
    if not measure:
        nominal = plan_anyway(loaded)
        show_plan(nominal.plan, as_json=as_json, missing=nominal.missing, accuracy=accuracy)
        return
    from avflow.orchestrator.measure import measure as run_one

    planned = plan_sweep(loaded)
    measured = run_one(planned, measure_model or loaded.models[0].name)
    show_plan(planned, as_json=as_json, accuracy=accuracy, measured=measured)


@app.command()
def sweep(
    config: Config,
    *,
    run: Annotated[Path, typer.Option(help="The run folder: results, logs, figures, MLflow.")],
    workers: Workers = None,
    limit: Limit = None,
    executor: Executor = None,
    address: Address = None,
) -> None:
    """Run what the run folder lacks of a sweep. Running it again is resuming it."""
    from avflow.orchestrator.config import load_config

    loaded = load_config(config).with_execution(
        workers=workers, limit=limit, executor=executor, address=address
    )
    _run(loaded, run, only_failed=False)


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    *,
    workers: Workers = None,
    limit: Limit = None,
    executor: Executor = None,
    address: Address = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print its sweep file, to start your own from.")
    ] = False,
) -> None:
    """A real sweep of a minute: a tiny trained model, a small world, all 37 pathways."""
    shipped = Path(__file__).parents[1] / "configs" / "demo.yaml"
    if show:
        print(shipped.read_text(encoding="utf-8"), end="")
        return
    sweep(shipped, run=run, workers=workers, limit=limit, executor=executor, address=address)


@app.command()
def resume(
    run: Run,
    failed: Annotated[
        bool, typer.Option("--failed", help="Take up what was recorded as failed, and only that.")
    ] = False,
    workers: Workers = None,
    executor: Executor = None,
    address: Address = None,
) -> None:
    """Go on with a run from its own folder: what is missing, or what had failed."""
    from avflow.orchestrator.config import load_config
    from avflow.orchestrator.errors import StoreError
    from avflow.orchestrator.paths import RunPaths

    stored = RunPaths(run).sweep
    if not stored.is_file():
        raise StoreError(f"{run} is no run folder: there is no {stored.name} in it")
    loaded = load_config(stored).with_execution(workers=workers, executor=executor, address=address)
    _run(loaded, run, only_failed=failed)


def _run(config: "SweepConfig", run: Path, *, only_failed: bool) -> None:
    from avflow.orchestrator.sweep import run_sweep

    outcome = run_sweep(config, run, only_failed=only_failed)
    if outcome.exit_status in (ExitStatus.DONE, ExitStatus.WITH_FAILURES):
        print(_report(run))
    print(outcome.summary)
    raise typer.Exit(outcome.exit_status)


@app.command()
def status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 5 seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Where a run stands, from its files alone: works while it runs and after it died."""
    from avflow.orchestrator import views

    views.show_status(run, watch=watch, as_json=as_json)


@app.command()
def failures(run: Run, as_json: Json = False) -> None:
    """What failed for good, and why. `avflow resume RUN --failed` takes it up again."""
    from avflow.orchestrator import views

    views.show_failures(run, as_json=as_json)


@app.command()
def query(
    run: Run,
    sql: Annotated[
        str,
        typer.Argument(
            help="polars SQL over cells, samples and failures, for example "
            "`SELECT task, center_layer, avg(delta) FROM cells GROUP BY ALL`.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How to print it.")
    ] = "table",
) -> None:
    """Ask the tables of a run in SQL."""
    from avflow.orchestrator import views
    from avflow.orchestrator.results import query as ask

    views.show_frame(ask(run, sql), output)


@app.command()
def report(
    run: Run,
    only: Annotated[
        str | None, typer.Option(help="One figure or table alone, by name: `fig5`, `table4`.")
    ] = None,
    wrong: Annotated[
        bool, typer.Option("--wrong", help="Curves of wrongly answered samples, in report/wrong.")
    ] = False,
) -> None:
    """Draw what is stored into RUN/report: a page, figures, tables, and in words what was found."""
    print(_report(run, only=only, correct=not wrong))


def _report(run: Path, *, only: str | None = None, correct: bool = True) -> str:
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
    return f"\nWhat was found:\n{words(outcome)}\n\nreport:   {page}"


@app.command()
def effective(
    run: Run,
    out: Annotated[Path, typer.Option(help="The sweep file to write.")],
    window: Annotated[
        int | None, typer.Option(help="Width of the curves to go by, if there are several.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random choices to compare with.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of these choices.")] = 0,
) -> None:
    """Write a sweep that keeps only the pathways a run found open, to see if they are enough."""
    from avflow.orchestrator.effective import effective_sweep
    from avflow.orchestrator.outcome import read_outcome
    from avflow.orchestrator.paths import RunPaths, quoted
    from avflow.orchestrator.run_folder import stored_config, to_yaml

    paths = RunPaths(run)
    config = stored_config(paths)
    outcome = read_outcome(paths, config)
    made = effective_sweep(config, outcome, window=window, draws=draws, seed=seed)
    out.write_text(to_yaml(made), encoding="utf-8")
    print(f"{out}: {len(made.interventions)} tasks; run it in a folder of its own:")
    print(f"  avflow sweep {quoted(out)} --run {quoted(Path(f'{run}-effective'))}")


@app.command()
def track(run: Run) -> None:
    """Bring MLflow up to date with the store. Nothing is logged twice."""
    from avflow.orchestrator.paths import RunPaths
    from avflow.orchestrator.run_folder import stored_config
    from avflow.orchestrator.tracking import publish

    paths = RunPaths(run)
    done = publish(paths, stored_config(paths))
    print(
        f"{done.uri}: {done.created} runs created, {done.replaced} replaced, {done.unchanged} "
        f"unchanged; {done.unfinished} tasks wait for samples"
    )


@app.command()
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


@app.command()
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


@app.command()
def inspect(
    config: Config,
    sample: Annotated[
        str, typer.Option(help="A sample's id; a task's name gives the first of that task.")
    ],
    model: Annotated[str | None, typer.Option(help="Default: the file's first.")] = None,
    edges: Annotated[
        str | None, typer.Option(help="A pathway: print which segments may not see which.")
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(help="Write the exact model inputs and token groups to this .safetensors."),
    ] = None,
) -> None:
    """Show one sample as the model sees it: prompt, segments, token groups."""
    from avflow.orchestrator import inspecting

    inspecting.inspect_sample(config, sample, model=model, edges=edges, dump=dump)


app.add_typer(cli_models.app, name="models")
app.add_typer(cli_datasets.app, name="datasets")


@app.command()
def pathways() -> None:
    """The paper's 37 pathways: names, as figures print them, where the paper shows them."""
    from avflow.orchestrator import views

    views.show_pathways()


@app.command()
def schema() -> None:
    """Print the JSON schema of sweep files, for editors."""
    from avflow.orchestrator.config import json_schema

    print(json.dumps(json_schema(), indent=2))


def _version(wanted: bool) -> None:
    if wanted:
        from avflow.orchestrator.version import described

        print(f"avflow {described()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and the commit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console command: errors that a person can act on are printed without a traceback."""
    try:
        app()
    except AvflowError as error:
        print(f"avflow: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(ExitStatus.INTERRUPTED)
    except BrokenPipeError:
        # `avflow query … | head`: nobody reads on, which is not an error. What is still buffered
        # has nowhere to go, and Python would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
