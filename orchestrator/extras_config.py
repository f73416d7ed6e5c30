"""The `interventions` and `probes` sections of a sweep file: what is asked beside the curves."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from avflow.orchestrator.fields import Layer, Layers, Name, Names, Strict
from avflow.orchestrator.identity import Identity, RunTime
from avflow.pathways.layout import OptionSpan
from avflow.workers.protocol import DiscardSpec, DiscardStep, ProbeName

PlainName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)]


class ScopeConfig(Strict):
    """What an intervention or a probe is run on."""

    name: RunTime[Name]
    """For people."""
    models: Identity[Names] = "all"
    """Names from `models` above."""
    datasets: Identity[Names] = "all"
    """Names from `datasets` above."""
    tasks: Identity[Names] = "all"
    """Tasks of those data sets."""
    samples: Identity[Literal["correct", "all"]] = "all"
    """`correct`: only samples that the model answers correctly when left alone."""


class MaskConfig(Strict):
    """Attention masked at fixed layers (the paper's Table 1)."""

    name: Identity[PlainName]
    """What tables call it."""
    pathways: Identity[Annotated[tuple[Name, ...], Field(min_length=1)]]
    """Blocked all at once; run on samples of their kind of prompt."""
    layers: Identity[Annotated[tuple[Layer, ...], Field(min_length=1)]]
    """Layers, from 0, that are masked, ascending."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not _ascends(self.layers):
            raise ValueError("layers must ascend, each given once")
        return self


class DiscardStepConfig(Strict):
    """Tokens that leave the sequence for good after a layer."""

    after_layer: Identity[Layer]
    """The last layer, from 0, that still runs with them."""
    groups: Identity[Annotated[tuple[Name, ...], Field(min_length=1)]]
    """Token groups that leave."""


class DiscardConfig(Strict):
    """Tokens discarded on the way up, with the prefill timed (the paper's Table 4)."""

    name: Identity[PlainName]
    """What tables call it."""
    steps: Identity[tuple[DiscardStepConfig, ...]]
    """By ascending layer; an empty list is the full prefill, timed in the same way."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not _ascends([step.after_layer for step in self.steps]):
            raise ValueError("steps must have ascending layers, each given once")
        return self

    def spec(self, *, option_span: OptionSpan, correct_only: bool) -> DiscardSpec:
        """As workers take it."""
        return DiscardSpec(
            name=self.name,
            steps=tuple(
                DiscardStep(after_layer=step.after_layer, groups=step.groups) for step in self.steps
            ),
            option_span=option_span,
            correct_only=correct_only,
        )


class InterventionConfig(ScopeConfig):
    """Masks and discards, and the samples whose answers under them are compared."""

    option_span: Identity[OptionSpan] = "letter"
    """What an option is to a pathway or a group: its letter, or its letter and text."""
    masks: Identity[tuple[MaskConfig, ...]] = ()
    """Answers with attention masked at fixed layers."""
    discards: Identity[tuple[DiscardConfig, ...]] = ()
    """Answers and prefill times with tokens discarded."""

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.masks and not self.discards:
            raise ValueError("give `masks` or `discards`")
        return self


class ProbeConfig(ScopeConfig):
    """Something to look at in the undisturbed pass (the paper's Fig. 1, 2 and 7)."""

    probe: Identity[ProbeName]
    """`last_attention`: the last token's, by group; `attention_map`: pooled to at most 128 bins;
    `norms`: of the residual stream that enters a layer, by position; `sinks`: tokens of massive
    activation there, and their top dimensions."""
    layers: Identity[Layers] = "all"
    """Layers, from 0."""
    samples_per_task: Identity[PositiveInt | None] = None
    """So many of each task, drawn by `seed`; null: all. A map has thousands of rows a layer."""
    seed: Identity[Annotated[int, Field(ge=0)]] = 0
    """Of that draw."""
    top_dimensions: Identity[PositiveInt] = 16
    """Hidden dimensions that are kept of a sink, largest first."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.layers != "all" and not _ascends(self.layers):
            raise ValueError("layers must ascend, each given once")
        return self


def _ascends(layers: Sequence[int]) -> bool:
    return all(low < high for low, high in pairwise(layers))
