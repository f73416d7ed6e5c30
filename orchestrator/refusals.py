"""What a plan holds that is hardly meant, told before the samples fail one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avflow.pathways.catalogue import ALL

if TYPE_CHECKING:
    from avflow.orchestrator.plan import Plan


def cautions(plan: Plan) -> list[str]:
    """Warnings, all of them."""
    return [*refused_prompts(plan), *replaced_pathways(plan)]


def replaced_pathways(plan: Plan) -> list[str]:
    """A warning for each pathway of the sweep's own that has the name of one of the paper's."""
    papers = {(pathway.name, pathway.layout) for pathway in ALL}
    return [
        f"pathway {own.name}: the sweep's own definition takes the place of the paper's for "
        f"{own.layout} prompts; give it another name to have both"
        for own in plan.config.own_pathways()
        if (own.name, own.layout) in papers
    ]


def refused_prompts(plan: Plan) -> list[str]:
    """A warning for each model's tasks whose kind of prompt its family does not take."""
    from avflow.workers.models import FAMILIES

    families = {model.name: model.family for model in plan.config.models}
    found: dict[tuple[str, str], list[str]] = {}
    for group in plan.groups:
        family = FAMILIES.get(families[group.model])
        if family is not None and group.layout not in family.layouts:
            tasks = found.setdefault((group.model, group.layout), [])
            tasks.append(f"{group.dataset}/{group.task} ({group.samples} samples)")
    return [
        f"model {model}: {families[model]} takes no {layout} prompts, so all of these will be "
        f"recorded as failed: {', '.join(tasks)}; leave them out with an `exclude`"
        for (model, layout), tasks in found.items()
    ]
