"""`avflow inspect`: one sample of a sweep as its model sees it."""

import re
from pathlib import Path

from rich.console import Console

from avflow.datasets import decode_sample
from avflow.datasets.sample import Sample
from avflow.orchestrator.config import ModelConfig, SweepConfig, load_config
from avflow.orchestrator.data import load_samples
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.source import unknown
from avflow.orchestrator.views import open_console, plain_table
from avflow.pathways.catalogue import find
from avflow.pathways.pathway import Pathway, PathwayError
from avflow.workers.inspect import dump as write_dump
from avflow.workers.inspect import edges_rows, layout_rows
from avflow.workers.models import load
from avflow.workers.models.base import Prepared, embed

_RUN = re.compile(r"(<\|\w+\|>)\1+")


def inspect_sample(
    config_path: Path, sample: str, *, model: str | None, edges: str | None, dump: Path | None
) -> None:
    """Print prompt, segments and groups; or a pathway's edges; and write the model's inputs.

    Raises ConfigError for an unknown sample, model or pathway, and the sample's own error when
    it can't be decoded or laid out: what a sweep would record as its failure.
    """
    config = load_config(config_path)
    spec = _model(config, model).spec()
    root, chosen = _find_sample(config, sample)
    pathway = _pathway(config, edges, chosen) if edges else None
    loaded = load(spec, "cpu")
    prepared = loaded.prepare(chosen, decode_sample(root, chosen, loaded.media_spec))
    console = open_console()
    if pathway is None:
        _show_layout(console, prepared)
    else:
        _show_edges(console, prepared, pathway)
    if dump is not None:
        write_dump(dump, prepared, embed(loaded, prepared))
        print(f"\nwrote {dump}")


def _model(config: SweepConfig, name: str | None) -> ModelConfig:
    names = [model.name for model in config.models]
    if name is not None and name not in names:
        raise ConfigError(unknown("model", name, names))
    return config.model(name or names[0])


def _find_sample(config: SweepConfig, wanted: str) -> tuple[Path, Sample]:
    """By id, or the first of a task (`dataset/task` where data sets share its name)."""
    tasks: list[str] = []
    for dataset in config.datasets:
        loaded = load_samples(dataset)
        for sample in loaded.samples:
            if wanted in (sample.sample_id, sample.task, f"{dataset.name}/{sample.task}"):
                return loaded.root, sample
            if sample.task not in tasks:
                tasks.append(sample.task)
    raise ConfigError(f"{unknown('sample', wanted, tasks)} (tasks; each gives its first sample)")


def _pathway(config: SweepConfig, name: str, sample: Sample) -> Pathway:
    try:
        found = find(name, config.own_pathways())
    except PathwayError as error:
        raise ConfigError(str(error)) from error
    for pathway in found:
        if pathway.layout == sample.layout:
            return pathway
    raise ConfigError(
        f"pathway {name} is for {found[0].layout} prompts, sample {sample.sample_id} is "
        f"{sample.layout}"
    )


def _show_layout(console: Console, prepared: Prepared) -> None:
    sample = prepared.sample
    console.print(f"{sample.sample_id}: {sample.task}, {sample.layout}", style="bold")
    console.print(f"{prepared.layout.n_tokens} tokens; answer {sample.answer_letter}\n")
    console.print(_shortened(prepared.prompt), soft_wrap=True)
    console.print()
    table = plain_table("segment", "span", "size", "groups", "starts with")
    for row in layout_rows(prepared):
        span, groups = f"[{row.start}, {row.stop})", ", ".join(row.groups)
        text = _shortened(row.text).replace("\n", "\\n")
        table.add_row(row.segment, span, str(row.n_tokens), groups, text)
    console.print(table)


def _shortened(prompt: str) -> str:
    """Runs of a placeholder as one, with their length."""
    return _RUN.sub(lambda m: f"{m[1]}×{len(m[0]) // len(m[1])}", prompt)


def _show_edges(console: Console, prepared: Prepared, pathway: Pathway) -> None:
    console.print(f"{pathway.name}: {pathway.label}", style="bold")
    table = plain_table("these queries", "may not read", "edges a layer")
    total = 0
    for row in edges_rows(prepared, pathway):
        table.add_row(row.target, ", ".join(row.sources), f"{row.n_edges:,}")
        total += row.n_edges
    console.print(table)
    console.print(f"{total:,} edges a layer are blocked")
