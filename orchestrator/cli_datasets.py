"""`avflow datasets`: list the readers, fetch a benchmark, check a folder."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avflow.datasets.media_spec import DECODE_TIMEOUT_S
from avflow.orchestrator.errors import ExitStatus

if TYPE_CHECKING:
    from avflow.orchestrator.checking import DatasetCheck

MOST_LISTED = 20

app = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")

Name = Annotated[str, typer.Argument(help="A reader's name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.callback()
def datasets(context: typer.Context) -> None:
    """The data sets that can be read, and their tasks; `get` fetches one, `check` checks one."""
    if context.invoked_subcommand is None:
        from avflow.orchestrator import views

        views.show_datasets()


@app.command()
def get(
    name: Name,
    to: Annotated[Path, typer.Option(help="The folder to put it into.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
) -> None:
    """Fetch a benchmark from the Hugging Face hub: only what is read, resumed where it stopped.

    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold as everywhere.
    """
    from avflow.orchestrator.fetching import fetch
    from avflow.orchestrator.paths import quoted

    done = fetch(name, to, revision=revision, say=lambda text: print(text, file=sys.stderr))
    print(f"{to} holds {done.repository} at {done.commit}")
    print(f"check it: avflow datasets check {name} --root {quoted(to)}")


@app.command()
def check(
    name: Name,
    *,
    root: Annotated[Path, typer.Option(help="The data set's folder.")],
    media: Annotated[bool, typer.Option(help="Decode every file, not only count.")] = True,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Decoders at a time. Default: one a CPU that it may use."),
    ] = None,
    decode_timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Seconds that one file may take, as in a sweep file.")
    ] = DECODE_TIMEOUT_S,
    as_json: Json = False,
) -> None:
    """Compare a folder with the paper's tables, and decode every file of its questions.

    Exit status: 0 all is there, 2 the folder is not that data set, 3 something differs.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from avflow.orchestrator.checking import check_dataset

    columns = (TextColumn("media"), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    silent = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        bar = progress.add_task("media", total=None, visible=media)
        found = check_dataset(
            name,
            root,
            decode=media,
            processes=processes or len(os.sched_getaffinity(0)),
            timeout_s=decode_timeout_s,
            on_start=lambda files: progress.update(bar, total=files),
            on_file=lambda _file: progress.advance(bar),
        )
    if as_json:
        print(json.dumps(_as_json(found)))
    else:
        _show(found)
    raise typer.Exit(ExitStatus.DONE if found.good else ExitStatus.WITH_FAILURES)


def _as_json(found: "DatasetCheck") -> dict[str, object]:
    files = found.files or ()
    return {
        "dataset": found.name,
        "root": found.root,
        "good": found.good,
        "questions": found.questions,
        "counts": [asdict(count) | {"good": count.good} for count in found.counts],
        "left_out": [asdict(row) for row in found.left_out],
        "media": None if found.files is None else len(files),
        "bad_media": [{"path": file.part.path, "error": file.error} for file in found.bad],
        "notes": list(found.notes),
        "media_notes": [{"path": f.part.path, "notes": list(f.notes)} for f in files if f.notes],
        "durations": [asdict(row) for row in found.durations],
    }


def _show(found: "DatasetCheck") -> None:
    from avflow.orchestrator.views import open_console, plain_table

    console = open_console()
    if found.counts:
        table = plain_table("task", "part", "#paper", "#here", "")
        for count in found.counts:
            verdict = "" if count.good else "DIFFERS"
            table.add_row(count.task, count.part, str(count.expected), str(count.found), verdict)
        console.print(table)
    if found.durations:
        table = plain_table("task", "media", "#files", "#shortest s", "#median s", "#longest s")
        for row in found.durations:
            seconds = (f"{value:.1f}" for value in (row.shortest, row.median, row.longest))
            table.add_row(row.task, row.kind, str(row.files), *seconds)
        console.print(table)
    _list("left out", [str(row) for row in found.left_out])
    _list("can't be used", [file.error or "" for file in found.bad])
    for note in found.notes:
        print(f"mind: {note}")
    noted = sum(bool(file.notes) for file in found.files or ())
    good = len(found.files or ()) - len(found.bad)
    decoded = "media not looked at" if found.files is None else f"{good:,} media decoded"
    print(f"{found.questions:,} questions; {decoded}, {noted:,} of them with notes (see --json)")
    print("all as in the paper" if found.good and found.counts else _verdict(found))


def _verdict(found: "DatasetCheck") -> str:
    if found.good:
        return "nothing is missing or damaged"
    differ = sum(not count.good for count in found.counts)
    return (
        f"{differ} counts differ, {len(found.left_out)} questions left out, {len(found.bad)} media "
        "can't be used"
    )


def _list(what: str, lines: list[str]) -> None:
    for line in lines[:MOST_LISTED]:
        print(f"{what}: {line}")
    if len(lines) > MOST_LISTED:
        print(f"{what}: and {len(lines) - MOST_LISTED} more")
