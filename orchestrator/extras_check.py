"""What is wrong with the interventions and probes of a sweep file, by field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.extras_config import DiscardConfig, InterventionConfig, MaskConfig
from avflow.orchestrator.source import FieldPath, unknown
from avflow.pathways.catalogue import ALL, find
from avflow.pathways.groups import group_names
from avflow.pathways.layout import LayoutKind
from avflow.pathways.pathway import Pathway

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo

LAYOUTS: tuple[LayoutKind, ...] = get_args(LayoutKind)
Complaint = tuple[FieldPath, str]


def mask_pathways(
    mask: MaskConfig, layout: LayoutKind, own: tuple[Pathway, ...]
) -> tuple[Pathway, ...] | None:
    """The mask's pathways for prompts of this kind; None if it is not for them."""
    found = [p for name in mask.pathways for p in find(name, own) if p.layout == layout]
    return tuple(found) if len(found) == len(mask.pathways) else None


def discards_from(discard: DiscardConfig, layout: LayoutKind) -> bool:
    """Whether prompts of this kind have all the groups that are to leave."""
    return all(group in group_names(layout) for step in discard.steps for group in step.groups)


def check_names(config: SweepConfig) -> Iterator[Complaint]:
    """Pathways and groups that nobody knows, or that no prompt has together."""
    for at, intervention in enumerate(config.interventions):
        yield from _double_names(("interventions", at), intervention)
        for number, mask in enumerate(intervention.masks):
            yield from _check_mask(config, ("interventions", at, "masks", number), mask)
        for number, discard in enumerate(intervention.discards):
            yield from _check_discard(("interventions", at, "discards", number), discard)


def check_layers(config: SweepConfig, models: Mapping[str, ModelInfo]) -> Iterator[Complaint]:
    """Layers that a chosen model does not have."""
    for at, intervention in enumerate(config.interventions):
        for model in _chosen(intervention.models, config):
            top = models[model].n_layers - 1
            for number, mask in enumerate(intervention.masks):
                field = ("interventions", at, "masks", number, "layers")
                yield from _beyond(field, mask.layers, model, top)
            for number, discard in enumerate(intervention.discards):
                for step, one in enumerate(discard.steps):
                    if one.after_layer >= top:
                        steps = ("interventions", at, "discards", number, "steps")
                        text = (
                            f"nothing can be discarded after layer {one.after_layer} of model "
                            f"{model!r}: its layers are 0 to {top}, and after the last one only "
                            "the answer is read"
                        )
                        yield (*steps, step, "after_layer"), text
    for at, probe in enumerate(config.probes):
        for model in _chosen(probe.models, config):
            layers = () if probe.layers == "all" else probe.layers
            top = models[model].n_layers - 1
            yield from _beyond(("probes", at, "layers"), layers, model, top)


def check_layouts(
    config: SweepConfig, layouts_of: Callable[[InterventionConfig], set[LayoutKind]]
) -> Iterator[Complaint]:
    """Masks and discards that are for no prompt of the chosen tasks (`layouts_of` a section)."""
    own = config.own_pathways()
    for at, intervention in enumerate(config.interventions):
        layouts = layouts_of(intervention)
        for number, mask in enumerate(intervention.masks):
            if all(mask_pathways(mask, layout, own) is None for layout in layouts):
                field = ("interventions", at, "masks", number)
                yield field, f"mask {mask.name!r} is for no kind of prompt of a chosen task"
        for number, discard in enumerate(intervention.discards):
            if not any(discards_from(discard, layout) for layout in layouts):
                field = ("interventions", at, "discards", number)
                text = f"discard {discard.name!r}: no chosen task's prompts have all of its groups"
                yield field, text


def _chosen(names: str | Sequence[str], config: SweepConfig) -> Sequence[str]:
    return [model.name for model in config.models] if isinstance(names, str) else names


def _beyond(field: FieldPath, layers: Sequence[int], model: str, top: int) -> Iterator[Complaint]:
    for number, layer in enumerate(layers):
        if layer > top:
            text = f"model {model!r} has no layer {layer}; its layers are 0 to {top}"
            yield (*field, number), text


def _double_names(field: FieldPath, intervention: InterventionConfig) -> Iterator[Complaint]:
    axes = (("masks", intervention.masks), ("discards", intervention.discards))
    for axis, members in axes:
        names = [member.name for member in members]
        for number, name in enumerate(names):
            if names.index(name) != number:
                text = f"{name!r} is there already; names must differ"
                yield (*field, axis, number, "name"), text


def _check_mask(config: SweepConfig, field: FieldPath, mask: MaskConfig) -> Iterator[Complaint]:
    own = config.own_pathways()
    known = [pathway.name for pathway in (*own, *ALL)]
    strange = [number for number, name in enumerate(mask.pathways) if name not in known]
    for number in strange:
        yield (*field, "pathways", number), unknown("pathway", mask.pathways[number], known)
    if not strange and all(mask_pathways(mask, layout, own) is None for layout in LAYOUTS):
        yield (*field, "pathways"), "no kind of prompt has all of these pathways"


def _check_discard(field: FieldPath, discard: DiscardConfig) -> Iterator[Complaint]:
    known = [group for layout in LAYOUTS for group in group_names(layout) if group != "last"]
    fine = True
    for step, one in enumerate(discard.steps):
        for number, group in enumerate(one.groups):
            if group not in known:
                fine = False
                at = (*field, "steps", step, "groups", number)
                if group == "last":
                    yield at, "the last token can't be discarded: the answer is read there"
                else:
                    yield at, unknown("group", group, known)
    if fine and not any(discards_from(discard, layout) for layout in LAYOUTS):
        yield (*field, "steps"), "no kind of prompt has all of these groups"
