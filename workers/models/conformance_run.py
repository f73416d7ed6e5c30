"""A conformance case run three ways: through `run_unit`, and as the official model runs it.

Shapes: N prompt tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avflow.datasets.media import DecodedMedia
from avflow.datasets.sample import Sample
from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.pathways.pathway import Pathway
from avflow.workers.models.base import Embedded, LoadedModel, Prepared, embed
from avflow.workers.protocol import CurveDone, CurveSpec, SampleDone, UnitSpec
from avflow.workers.run_unit import run_unit

BYTE_BUDGET = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A sample and its decoded media, in the order of `sample.media`."""

    sample: Sample
    media: Sequence[DecodedMedia]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The official forward on the processor's own outputs: `hidden` [1, N, D] before the last norm,
    `logits` [V] at the last position, `positions` [..., 1, N] that its rotary embedding got."""

    hidden: Tensor
    logits: Tensor
    positions: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A case that the family takes, and what came of it."""

    case: Case
    prepared: Prepared
    embedded: Embedded
    seen: Seen
    curves: dict[str, CurveDone]
    done: SampleDone


def run(model: LoadedModel, case: Case, prepared: Prepared) -> Ran:
    curves, done = through_run_unit(model, case, prepared.layout)
    return Ran(
        case=case,
        prepared=prepared,
        embedded=embed(model, prepared),
        seen=_official(model, prepared),
        curves=curves,
        done=done,
    )


def through_run_unit(
    model: LoadedModel, case: Case, layout: Layout
) -> tuple[dict[str, CurveDone], SampleDone]:
    """The three pathways by name, and the sample's own row. Raises RuntimeError for a failure."""
    n_layers, mid = model.info.n_layers, model.info.n_layers // 2
    centers = tuple(sorted({0, mid, n_layers - 1}))
    curves = tuple(
        CurveSpec(
            pathway=pathway,
            window=window,
            center_layers=at,
            option_span="full",
            correct_only=False,
        )
        for pathway, window, at in (
            (nothing(layout), 1, (0,)),
            (everything(layout), n_layers, (mid,)),
            (something(layout), half(n_layers), centers),
        )
    )
    unit = UnitSpec(
        unit_id=f"conformance/{case.sample.sample_id}",
        model=model.spec.name,
        data_root="",
        sample=case.sample,
        curves=curves,
        wanted=frozenset(curve.key for curve in curves),
        byte_budget=BYTE_BUDGET,
        cost=1,
    )
    found: dict[str, CurveDone] = {}
    names = {curve.key: curve.pathway.name for curve in curves}
    for event in run_unit(model, unit, case.media, 0.0):
        match event:
            case CurveDone(curve=key):
                found[names[key]] = event
            case SampleDone():
                return found, event
            case _:
                raise RuntimeError(f"run_unit: {event}")
    raise RuntimeError("run_unit ended without a SampleDone")


def half(n_layers: int) -> int:
    """A window wide enough that a knockout moves the answer of a model that is sure of it."""
    return n_layers // 2 | 1


def present(layout: Layout) -> list[str]:
    """The groups that this prompt has, `last` apart."""
    return [name for name in group_names(layout.kind) if name != "last" and _holds(layout, name)]


def _holds(layout: Layout, group: str) -> bool:
    try:
        group_positions(layout, group)
    except LayoutError:
        return False
    return True


def nothing(layout: Layout) -> Pathway:
    """Later tokens are never read anyway."""
    return Pathway(
        name="nothing", layout=layout.kind, sources=("last",), targets=(present(layout)[0],)
    )


def everything(layout: Layout) -> Pathway:
    return Pathway(
        name="everything", layout=layout.kind, sources=tuple(present(layout)), targets=("last",)
    )


def something(layout: Layout) -> Pathway:
    """The media to the rest of the question: a suffix of many positions."""
    media = [n for n in ("video", "audio", "candidates", "reference") if n in present(layout)]
    return Pathway(
        name="something", layout=layout.kind, sources=(media[0],), targets=("question", "last")
    )


@torch.no_grad()
def _official(model: LoadedModel, prepared: Prepared) -> Seen:
    hidden: list[Tensor] = []
    positions: list[Tensor] = []
    hooks = [model.decoder.norm.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))]
    if isinstance(model.decoder.rotary, nn.Module):
        hooks.append(
            model.decoder.rotary.register_forward_pre_hook(
                lambda _m, args, kwargs: positions.append(kwargs.get("position_ids", args[-1])),
                with_kwargs=True,
            )
        )
    try:
        output = model.hf_model(**model.official_inputs(prepared), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Seen(
        hidden=hidden[0],
        logits=output.logits[0, -1],
        positions=positions[0] if positions else None,
    )
