"""What the read-only verbs print: tables for people, JSON for programs."""

import json
import time
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from avflow.orchestrator.paths import quoted

if TYPE_CHECKING:
    import polars as pl

    from avflow.orchestrator.results import RunStatus

WATCH_EVERY_S = 5.0
_ANY_WIDTH = 60_000  # polars counts to 65,535

_LONGEST_SHOWN = 60  # characters of a text in a terminal's table


def open_console() -> Console:
    """Standard output, where names in brackets are just that, and no markup. What is no terminal
    (a file, a pipe) has no width to wrap lines at."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    return console


def plain_table(*columns: str) -> Table:
    """A plain table; columns whose name starts with `#` hold numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        number = column.startswith("#")
        table.add_column(
            column.removeprefix("#"), justify="right" if number else "left", overflow="fold"
        )
    return table


def heading(table: Table, text: str) -> None:
    """A line of a table that names the rows below it."""
    table.add_row(text, style="bold")


def thousands(number: int) -> str:
    """`1,234`."""
    return f"{number:,}"


def show_status(run: Path, *, watch: bool, as_json: bool) -> None:
    """Jobs and samples by state; with `watch` until the run is complete, or Ctrl-C."""
    from avflow.orchestrator.results import status

    if as_json:
        print(json.dumps(asdict(status(run))))
        return
    if not watch:
        open_console().print(_told(status(run)))
        return
    with Live(_told(status(run)), console=open_console(), auto_refresh=False) as live:
        while True:
            now = status(run)
            live.update(_told(now), refresh=True)
            if now.complete:
                return
            time.sleep(WATCH_EVERY_S)


def _told(now: "RunStatus") -> Group:
    driver = f"written now by {now.driver}" if now.driver else "no driver is running"
    waiting = now.jobs - now.jobs_done - now.jobs_running - now.jobs_failed
    words = (
        f"{now.jobs:,} jobs: {now.jobs_done:,} done, {now.jobs_running:,} running, "
        f"{now.jobs_failed:,} failed, {waiting:,} waiting\n"
        f"{now.samples:,} samples: {now.samples_done:,} done ({now.samples_correct:,} answered "
        f"correctly), {now.samples_failed:,} failed; {now.cells:,} cells; {driver}\n"
    )
    if now.extras:
        waiting = now.extras - now.extras_done - now.extras_failed
        words += (
            f"{now.extras:,} interventions and probes: {now.extras_done:,} done, "
            f"{now.extras_failed:,} failed, {waiting:,} waiting\n"
        )
    table = plain_table("task", "#samples", "#right", "#wrong", "#failed", "#to do")
    for (model, dataset), tasks in groupby(now.tasks, key=lambda task: (task.model, task.dataset)):
        heading(table, f"{model}, {dataset}")
        for task in tasks:
            to_do = task.planned - task.right - task.wrong - task.failed
            numbers = (task.planned, task.right, task.wrong, task.failed, to_do)
            table.add_row(f"  {task.task}", *map(thousands, numbers))
    return Group(words, table)


def show_failures(run: Path, *, as_json: bool) -> None:
    """What later attempts did not mend, newest last: samples, curves, models given up whole."""
    from avflow.orchestrator.results import standing_failures

    frame = standing_failures(run)
    if as_json:
        print(frame.write_json())
        return
    if frame.is_empty():
        print("Nothing has failed.")
        return
    for row in frame.iter_rows(named=True):
        which = row["unit_id"] or f"{row['model']} (whole model)"
        what = f"curve {row['curve']}" if row["curve"] else "all curves"
        print(f"{which}, {what}: {row['error']} in stage {row['stage']}")
        print(indent(row["message"], "  "))
    print()
    if frame["unit_id"].null_count():
        print(f"Models that were given up are tried again by: avflow resume {quoted(run)}")
    if frame["unit_id"].count():
        print(f"Take them up again: avflow resume {quoted(run)} --failed")


def show_frame(frame: "pl.DataFrame", output: Literal["table", "csv", "json"]) -> None:
    """A query's answer, whole."""
    import polars as pl

    match output:
        case "csv":
            print(frame.write_csv(), end="")
        case "json":
            print(frame.write_json())
        case "table":
            console = open_console()
            if console.is_terminal and _too_wide(frame, console.width):
                _show_records(frame)
                return
            with pl.Config(
                tbl_rows=-1,
                tbl_cols=-1,
                tbl_width_chars=console.width,
                fmt_str_lengths=_LONGEST_SHOWN if console.is_terminal else _ANY_WIDTH,
                fmt_table_cell_list_len=-1,
                tbl_hide_dataframe_shape=True,
            ):
                print(frame)


def _too_wide(frame: "pl.DataFrame", width: int) -> bool:
    """Whether the names of the columns do not fit side by side, each between its rules."""
    return sum(len(name) + 3 for name in frame.columns) + 1 > width


def _show_records(frame: "pl.DataFrame") -> None:
    """A line a column, for each row."""
    widest = max(map(len, frame.columns))
    for number, row in enumerate(frame.iter_rows(named=True), start=1):
        print(f"row {number:,}")
        for name, value in row.items():
            print(f"  {name:{widest}}  {'null' if value is None else value}")


def show_datasets() -> None:
    """Readers and their tasks."""
    from avflow.orchestrator.data import about_tasks, readers

    table = plain_table("reader", "task", "kind of prompt", "what it asks")
    for reader in readers():
        for task in about_tasks(reader):
            table.add_row(reader, task.name, task.layout, task.about)
    open_console().print(table)


def show_pathways() -> None:
    """The paper's pathways."""
    from avflow.pathways.catalogue import ALL

    table = plain_table("name", "as figures print it", "in")
    table.columns[0].no_wrap = True  # names are there to be copied
    for layout, of_layout in groupby(ALL, key=lambda pathway: pathway.layout):
        heading(table, f"on {layout} prompts:")
        for pathway in of_layout:
            table.add_row(f"  {pathway.name}", pathway.label, ", ".join(pathway.figures))
    open_console().print(table)
