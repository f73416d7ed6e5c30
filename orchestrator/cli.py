"""The `avflow` command: every verb, thin. What a verb does lives in the module it imports.

Heavy libraries are imported inside the verbs, so that `avflow --help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avflow.orchestrator import cli_datasets, cli_models, cli_runs
from avflow.orchestrator.errors import AvflowError, ExitStatus

if TYPE_CHECKING:
    from avflow.orchestrator.config import SweepConfig

RUN, KNOW = "Plan and run", "What there is"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Attention-knockout sweeps over audio-visual LLMs.

A first run: `avflow demo`, then `avflow ui runs/demo`. A sweep of your own: `avflow demo --show`
prints a sweep file to start from; `avflow plan` it, `avflow sweep` it, and the same command again
goes on where it stopped.

Exit status: 0 done, 1 unexpected error, 2 usage or configuration (nothing was started),
3 finished but something failed, 129/130/143 interrupted (what was done is kept).""",
)

Config = Annotated[Path, typer.Argument(help="The sweep file (YAML).", show_default=False)]
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
    int | None,
    typer.Option(
        min=1,
        help="Only the first N samples of each task, for a first try. The same command without "
        "it goes on from there.",
    ),
]


@app.command(rich_help_panel=RUN)
def plan(
    config: Config,
    *,
    as_json: cli_runs.Json = False,
    limit: Limit = None,
    accuracy: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of samples that the model is expected to answer right when left alone; "
            "`samples: correct` runs no curve on the others.",
        ),
    ] = 1.0,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run one real sample here, and calibrate with it. Needs checkpoint and data.",
        ),
    ] = False,
    measure_model: Annotated[
        str | None,
        typer.Option("--model", help="The model that --measure runs. Default: the file's first."),
    ] = None,
) -> None:
    """Count what a sweep would run, without running it: jobs, cells, FLOPs, GPU-hours.

    The file is checked; a wrong field is named with its line. What has not been fetched yet is
    counted from the paper and from published shapes, and said so.

    A job is one (model, data set, task, pathway, window, centre layer); a cell is a job on one
    sample. `plain -> shared`: a forward pass a cell, and what avflow runs in its place.
    """
    from avflow.orchestrator.config import load_config
    from avflow.orchestrator.nominal import plan_anyway
    from avflow.orchestrator.sweep import plan_sweep
    from avflow.orchestrator.views_plan import show_plan

    if measure_model is not None and not measure:
        raise typer.BadParameter("goes with --measure alone", param_hint="--model")
    loaded = load_config(config).with_execution(limit=limit)
    if not measure:
        nominal = plan_anyway(loaded)
        show_plan(nominal.plan, as_json=as_json, missing=nominal.missing, accuracy=accuracy)
        return
    from avflow.orchestrator.measure import measure as run_one

    planned = plan_sweep(loaded)
    measured = run_one(planned, measure_model or loaded.models[0].name)
    show_plan(planned, as_json=as_json, accuracy=accuracy, measured=measured)


@app.command(rich_help_panel=RUN)
def sweep(
    config: Config,
    *,
    run: Annotated[Path, typer.Option(help="The run folder: results, logs, figures, MLflow.")],
    workers: Workers = None,
    limit: Limit = None,
    executor: Executor = None,
    address: Address = None,
) -> None:
    """Run what the run folder lacks of a sweep. Running it again is resuming it.

    For example `avflow sweep configs/demo.yaml --run runs/demo --limit 5`. Ctrl-C, SIGTERM or a
    terminal that goes away lets running samples finish and stores what came out; once more stops
    at once.
    """
    from avflow.orchestrator.config import load_config

    loaded = load_config(config).with_execution(
        workers=workers, limit=limit, executor=executor, address=address
    )
    _run(loaded, run, only_failed=False)


@app.command(rich_help_panel=RUN)
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


@app.command(rich_help_panel=RUN)
def resume(
    run: cli_runs.Run,
    failed: Annotated[
        bool, typer.Option("--failed", help="Take up what was recorded as failed, and only that.")
    ] = False,
    workers: Workers = None,
    executor: Executor = None,
    address: Address = None,
) -> None:
    """Go on with a run from its own folder: what is missing, or what had failed.

    The same as its `avflow sweep` command, from the sweep file that the folder holds.
    """
    from avflow.orchestrator.config import load_config
    from avflow.orchestrator.errors import StoreError
    from avflow.orchestrator.paths import RunPaths

    stored = RunPaths(run).sweep
    if not stored.is_file():
        raise StoreError(f"{run} is no run folder: there is no {stored.name} in it")
    loaded = load_config(stored).with_execution(workers=workers, executor=executor, address=address)
    _run(loaded, run, only_failed=failed)


def _run(config: "SweepConfig", run: Path, *, only_failed: bool) -> None:
    from avflow.orchestrator.paths import RunPaths, quoted
    from avflow.orchestrator.sweep import run_sweep

    try:
        outcome = run_sweep(config, run, only_failed=only_failed)
        if outcome.exit_status in (ExitStatus.DONE, ExitStatus.WITH_FAILURES):
            print(cli_runs.draw(run))
    except KeyboardInterrupt:  # a second Ctrl-C, or one while MLflow or the report is written
        if RunPaths(run).sweep.is_file():
            text = f"interrupted: what was stored is kept; go on: avflow resume {quoted(run)}"
            print(text, file=sys.stderr)
        raise
    print(outcome.summary)
    raise typer.Exit(outcome.exit_status)


app.add_typer(cli_runs.app)


@app.command(rich_help_panel=KNOW)
def inspect(
    config: Config,
    sample: Annotated[
        str, typer.Option(help="A sample's id; a task's name gives the first of that task.")
    ],
    model: Annotated[str | None, typer.Option(help="Default: the file's first.")] = None,
    edges: Annotated[
        str | None, typer.Option(help="A pathway's name: print which segments may not see which.")
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(help="Write the exact model inputs and token groups to this .safetensors."),
    ] = None,
) -> None:
    """Show one sample as the model sees it: prompt, segments, token groups.

    For example `avflow inspect configs/demo.yaml --sample sight --edges video_to_question`.
    """
    from avflow.orchestrator import inspecting

    inspecting.inspect_sample(config, sample, model=model, edges=edges, dump=dump)


app.add_typer(cli_models.app, name="models", rich_help_panel=KNOW)
app.add_typer(cli_datasets.app, name="datasets", rich_help_panel=KNOW)


@app.command(rich_help_panel=KNOW)
def pathways() -> None:
    """The paper's 37 pathways: names, as figures print them, where the paper shows them.

    `video -/-> question`: the question's tokens may not read the video's. `pathways:` in a sweep
    file adds your own; one with a name of these takes its place.
    """
    from avflow.orchestrator import views

    views.show_pathways()


@app.command(rich_help_panel=KNOW)
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
