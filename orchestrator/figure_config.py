"""The `figures` section of a sweep file: what the report draws, and what each item needs."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from avflow.orchestrator.data import names_task
from avflow.orchestrator.extras_config import PlainName
from avflow.orchestrator.fields import Layer, Name, Names, Strict
from avflow.orchestrator.identity import RunTime
from avflow.pathways.layout import OptionSpan

Shows = Literal[
    "curves", "windows", "attention", "maps", "norms", "sinks", "masks", "discards", "effective"
]
TABLES: tuple[Shows, ...] = ("masks", "discards", "effective")
PROBE_OF: dict[str, str] = {
    "attention": "last_attention",
    "maps": "attention_map",
    "norms": "norms",
    "sinks": "sinks",
}


class FigureConfig(Strict):
    """One figure or table. Only how stored numbers are shown: change it and report again."""

    name: RunTime[PlainName]
    """The stem of its files, and what `avflow report RUN --only` takes."""
    shows: RunTime[Shows]
    """`curves`: change against the centre layer, a panel a task; `windows`: the same, a panel a
    width of the window; `attention`, `maps`, `norms`, `sinks`: of a probe; `masks`: a table of
    accuracies under masks; `discards`: likewise, with prefill times; `effective`: a row a task,
    its accuracy with the found pathways alone open (see `avflow effective`)."""
    title: RunTime[str] = ""
    """What it is called in the report; empty: its name."""
    model: RunTime[Name]
    """Whose."""
    datasets: RunTime[Names] = "all"
    """On which data."""
    tasks: RunTime[Names] = "all"
    """On which tasks of them."""
    panels: RunTime[Literal["category", "task", "direction", "mean"]] = "task"
    """`category`: tasks of one category are pooled where several of them are shown; `direction`:
    each task and direction apart; `mean`: the mean of the tasks' means, and all samples pooled."""
    ordering: RunTime[Name | None] = None
    """Of interleaved prompts, those alone that are ordered so."""
    pathways: RunTime[tuple[tuple[Name, ...], ...]] = ()
    """Of curves: a row of panels each, a line a pathway."""
    windows: RunTime[Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] = (7,)
    """Of curves: the width of the window; of `windows`: the widths."""
    option_span: RunTime[OptionSpan] = "letter"
    """Of curves, those alone whose options are letters, or letter and text."""
    layers: RunTime[tuple[Layer, ...]] = ()
    """Of maps, norms and sinks: these alone; empty: all that were looked at."""
    interventions: RunTime[tuple[PlainName, ...]] = ()
    """Of tables: masks or discards, in this order; a discard without steps is the baseline."""

    notes: RunTime[tuple[str, ...]] = ()
    """Of tables: lines that stand below."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.shows in ("curves", "windows") and not any(self.pathways):
            raise ValueError(f"figure {self.name}: give `pathways`, a list a row")
        if self.shows == "curves" and len(self.windows) > 1:
            raise ValueError(f"figure {self.name}: curves are of one window; see `shows: windows`")
        if self.shows in TABLES and not self.interventions:
            raise ValueError(f"figure {self.name}: give `interventions`, the rows of the table")
        if self.panels == "mean" and (self.datasets == "all" or len(self.datasets) > 1):
            raise ValueError(
                f"figure {self.name}: a mean is over the tasks of one data set; name it"
            )
        return self

    @property
    def number(self) -> str:
        """The paper's: `fig1` of `fig1_left`."""
        return self.name.partition("_")[0]

    def is_part_of(self, name: str) -> bool:
        """Whether a person who says `name` means it."""
        return name in (self.name, self.number)

    def holds(self, dataset: str, task: str) -> bool:
        """Whether samples of this task are shown, whatever the model."""
        of_dataset = self.datasets == "all" or dataset in self.datasets
        return of_dataset and names_task(self.tasks, dataset, task)


def figure_names(figures: Iterable[FigureConfig]) -> list[str]:
    """What a person may call them, each once: numbers, then parts of them."""
    listed = list(figures)
    numbers = dict.fromkeys(figure.number for figure in listed)
    return list(dict.fromkeys([*numbers, *(figure.name for figure in listed)]))
