"""`avflow models`: list what can be run, check a checkpoint."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from avflow.orchestrator.errors import ExitStatus

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo

app = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """The families and checkpoints that can be run, and what they need; `check` checks one."""
    if context.invoked_subcommand is None:
        _show_known(as_json=as_json)


def _show_known(*, as_json: bool) -> None:
    from avflow.orchestrator.known_models import PAPER_TOKENS, PUBLISHED, needed_bytes
    from avflow.orchestrator.views import open_console, plain_table
    from avflow.workers.models import FAMILIES

    if as_json:
        rows = [
            {**asdict(known), "needed_bytes": needed_bytes(known.info, "bfloat16")}
            for known in PUBLISHED
        ]
        print(json.dumps({"paper_tokens": PAPER_TOKENS, "checkpoints": rows}, indent=2))
        return
    console = open_console()
    families = plain_table("family", "what")
    for name, family in FAMILIES.items():
        families.add_row(name, family.about)
    console.print(families)
    table = plain_table("checkpoint", "layers", "params", "memory", "licence")
    table.columns[0].no_wrap = True
    for known in PUBLISHED:
        table.add_row(
            known.checkpoint,
            str(known.info.n_layers),
            f"{known.info.parameters / 1e9:.2f} B",
            _gib(needed_bytes(known.info, "bfloat16")),
            known.licence,
        )
    console.print()
    console.print(table)
    console.print(
        f"\nmemory: in bfloat16, with the paper's largest input ({PAPER_TOKENS:,} tokens) and a "
        "byte_budget of 2 GiB, counted from the published shapes: none of these was at hand.\n"
        "licence: as far as public pages tell (of video-SALMONN 2+ its code's, and that of the "
        "model it is built on): the checkpoint's own card decides.\n"
        "check one: avflow models check PATH",
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


@app.command()
def check(
    path: Annotated[
        str,
        typer.Argument(help="A local folder, a hub id, or `testbed`.", show_default=False),
    ],
    *,
    family: Annotated[
        str | None, typer.Option(help="Default: found by the checkpoint's config.json.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: branch, tag, commit.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"], typer.Option(help="Of weights and activations.")
    ] = "bfloat16",
    attention: Annotated[
        Literal["sdpa", "eager"], typer.Option(help="That the unmodified model runs with.")
    ] = "sdpa",
    gpus: Annotated[int, typer.Option(min=1, help="To spread it over, where there are any.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each kind of prompt.")] = 1,
    as_json: Json = False,
) -> None:
    """Load a checkpoint and put it through the conformance suite.

    Real prompts through the engine, against the model's own forward and generate. Exit status 3
    if a check fails, 2 if it is no checkpoint that can be run.
    """
    from pathlib import PurePath

    from avflow.orchestrator import checking_models
    from avflow.workers.models.base import ModelSpec
    from avflow.workers.models.placement import cuda_devices

    spec, info = checking_models.recognise(
        ModelSpec(
            name=PurePath(path).name,
            family=family or "",
            path=path,
            revision=revision,
            dtype=dtype,
            attention=attention,
        )
    )
    if not as_json:
        _show_info(spec.family, dtype, info)
    model = checking_models.load_checked(spec, cuda_devices(gpus))
    found = []
    for one in checking_models.checks(model, samples):
        found.append(one)
        if not as_json:
            where = f" ({one.sample})" if one.sample else ""
            print(f"{one.result:8}{one.name}{where}: {one.reason}", flush=True)
    failed, skipped = (sum(one.result == r for one in found) for r in ("failed", "skipped"))
    if as_json:
        print(json.dumps({"family": spec.family, "checks": [asdict(one) for one in found]}))
    else:
        print(f"\n{len(found)} checks, {failed} failed" + (f", {skipped} skipped" * bool(skipped)))
    raise typer.Exit(ExitStatus.WITH_FAILURES if failed else ExitStatus.DONE)


def _show_info(family: str, dtype: str, info: "ModelInfo") -> None:
    from avflow.orchestrator.known_models import needed_bytes

    print(
        f"{family}: {info.n_layers} layers of {info.hidden_size}, {info.n_heads} heads of "
        f"{info.head_size} ({info.n_kv_heads} for keys and values), {info.parameters:,} parameters"
    )
    print(
        f"weights {_gib(info.weight_bytes(dtype))} in {dtype}; with the paper's largest input "
        f"{_gib(needed_bytes(info, dtype))}\n"
    )
