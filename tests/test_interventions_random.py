"""Masks and discards on random models, prompts and layers, against the unmodified model."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from engine_ways import TOLERANCE, of_kind, reference_edges, reference_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_extras_run import asking, done
from test_run_unit import InMemory, run
from torch import Tensor

from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.pathways.pathway import Pathway
from avflow.workers.engine import reference
from avflow.workers.protocol import DiscardSpec, DiscardStep, ExtraSpec, InterventionDone, MaskSpec

FEW = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
KINDS = st.sampled_from(["single_video", "interleaved"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build(tiny_thinker: Any, random_layout: Any, random_embedded: Any) -> Any:
    """A random model with a random prompt, of 4 layers or what is drawn."""

    def built(kind: Any, seed: int = 0, heads: tuple[int, int] = (4, 2), **rest: Any) -> InMemory:
        settled = {"n_layers": 4, "hidden": 16 * heads[0]} | rest
        tiny = tiny_thinker(heads=heads[0], kv_heads=heads[1], seed=seed, **settled)
        layout = random_layout(kind, 200 + seed % 30, seed)
        return InMemory(
            decoder=tiny.decoder,
            hf_model=tiny.hf_model,
            info=tiny.info,
            layout=layout,
            embedded=random_embedded(layout, tiny, seed),
            option_tokens=(3, 5, 7, 9),
        )

    return built


def drawn(data: st.DataObject, build: Any) -> InMemory:
    return build(
        data.draw(KINDS, label="kind"),
        seed=data.draw(st.integers(0, 2**20), label="seed"),
        heads=data.draw(st.sampled_from([(2, 1), (4, 4), (6, 2)]), label="heads"),
        n_layers=data.draw(st.sampled_from([4, 5, 9]), label="layers of the model"),
        attention=data.draw(st.sampled_from(["sdpa", "eager"]), label="attention"),
    )


def plain(model: InMemory, edges: dict[int, Tensor]) -> Tensor:
    """[V] of the unmodified model with dense masks, `edges` blocked by layer."""
    with ExitStack() as hooks:
        for layer, blocked in edges.items():
            masked = reference.knocked_out_at(model.hf_model, blocked, [layer])
            hooks.enter_context(masked)
        return reference.plain_probabilities(model.hf_model, reference_inputs(model.embedded))


def intervened(model: InMemory, spec: ExtraSpec) -> InterventionDone:
    (found,) = done(run(model, asking(spec))).values()
    return found


def assert_same(found: InterventionDone, model: InMemory, expected: Tensor) -> None:
    base = plain(model, {})
    top = int(base.argmax())
    assert found.p_base == pytest.approx(float(base[top]), abs=TOLERANCE)
    assert found.p == pytest.approx(float(expected[top]), abs=TOLERANCE)
    options = expected[list(model.option_tokens)].double().numpy()
    np.testing.assert_allclose(found.p_options, options, atol=TOLERANCE)
    assert float(expected[found.token]) == pytest.approx(float(expected.max()), abs=TOLERANCE)
    answer = model.option_tokens[model.layout.answer]
    assert (found.correct, found.correct_base) == (found.token == answer, top == answer)


# -- masks -----------------------------------------------------------------------------------


def masked(model: InMemory, spec: MaskSpec) -> Tensor:
    n = model.layout.n_tokens
    edges = torch.zeros(n, n, dtype=torch.bool)
    for pathway in spec.pathways:
        edges |= reference_edges(model.layout, pathway)
    return plain(model, dict.fromkeys(spec.layers, edges))


@FEW
@given(data=st.data())
def test_a_mask_is_the_plain_pass_with_all_its_pathways_blocked(build: Any, data: Any) -> None:
    model = drawn(data, build)
    chosen = st.lists(st.sampled_from(of_kind(model.layout)), min_size=1, max_size=3, unique=True)
    layers = st.sets(st.integers(0, model.info.n_layers - 1), min_size=1)
    spec = MaskSpec(
        name="m",
        pathways=tuple(data.draw(chosen, label="pathways")),
        layers=tuple(sorted(data.draw(layers, label="masked layers"))),
    )
    assert_same(intervened(model, spec), model, masked(model, spec))


@pytest.mark.parametrize("layers", [(0,), (0, 1), (2, 3), (3,), (0, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["cross_frame", "video_to_question", "question_to_last"])
def test_a_range_of_layers_at_either_end(build: Any, layers: tuple[int, ...], name: str) -> None:
    model = build("single_video")
    pathways = tuple(p for p in of_kind(model.layout) if p.name == name)
    spec = MaskSpec(name="m", pathways=pathways, layers=layers)
    found, expected = intervened(model, spec), masked(model, spec)
    assert_same(found, model, expected)
    if (name, layers) not in {("video_to_question", (3,)), ("cross_frame", (3,))}:
        assert (expected - plain(model, {})).abs().max() > 1e-3, "it changes the answer"


def test_a_mask_without_an_edge_is_the_sample_left_alone(build: Any) -> None:
    model = build("single_video")
    backwards = Pathway(
        name="back", layout="single_video", sources=("last",), targets=("video", "audio")
    )
    found = intervened(model, MaskSpec(name="m", pathways=(backwards,), layers=(0, 3)))
    assert (found.p, found.correct) == (found.p_base, found.correct_base)
    assert_same(found, model, plain(model, {}))


# -- discards --------------------------------------------------------------------------------


def droppable(layout: Layout) -> list[str]:
    names = []
    for name in group_names(layout.kind):
        try:
            held = group_positions(layout, name)
        except LayoutError:
            continue
        if layout.n_tokens - 1 not in held:
            names.append(name)
    return names


def blocked_as_keys(model: InMemory, spec: DiscardSpec) -> Tensor:
    n, edges = model.layout.n_tokens, {}
    for layer in range(model.info.n_layers):
        blocked = torch.zeros(n, n, dtype=torch.bool)
        for step in spec.steps:
            if layer > step.after_layer:
                for group in step.groups:
                    blocked[:, group_positions(model.layout, group, spec.option_span)] = True
        edges[layer] = blocked.fill_diagonal_(False)
    return plain(model, edges)


def left_over(model: InMemory, spec: DiscardSpec) -> int:
    """Token-layers: one less for each token and layer that it is no longer there for."""
    gone: dict[int, int] = {}
    for step in spec.steps:
        for group in step.groups:
            for position in group_positions(model.layout, group, spec.option_span).tolist():
                gone.setdefault(position, step.after_layer)
    n_layers = model.info.n_layers
    return n_layers * model.layout.n_tokens - sum(n_layers - 1 - at for at in gone.values())


@FEW
@given(data=st.data())
def test_a_discard_is_the_plain_pass_without_their_keys(build: Any, data: Any) -> None:
    model = drawn(data, build)
    groups = st.lists(st.sampled_from(droppable(model.layout)), min_size=1, max_size=3, unique=True)
    after = st.sets(st.integers(0, model.info.n_layers - 2), min_size=1, max_size=3)
    spec = DiscardSpec(
        name="d",
        steps=tuple(
            DiscardStep(after_layer=layer, groups=tuple(data.draw(groups, label="groups")))
            for layer in sorted(data.draw(after, label="after"))
        ),
        option_span=data.draw(st.sampled_from(["letter", "full"])),
    )
    found = intervened(model, spec)
    assert_same(found, model, blocked_as_keys(model, spec))
    assert found.token_layers == left_over(model, spec)


@pytest.mark.parametrize("after", [0, 2], ids=["after the first", "before the last"])
@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("single_video", ("video", "audio")),
        ("interleaved", ("candidates", "reference")),
        ("single_video", ("system", "video", "audio", "question")),
    ],
    ids=["all media", "all candidates", "nearly everything"],
)
def test_all_media_discarded_at_either_end(
    build: Any, kind: str, groups: tuple[str, ...], after: int
) -> None:
    model = build(kind)
    spec = DiscardSpec(name="d", steps=(DiscardStep(after_layer=after, groups=groups),))
    found, expected = intervened(model, spec), blocked_as_keys(model, spec)
    assert_same(found, model, expected)
    assert (expected - plain(model, {})).abs().max() > 1e-3, "it changes the answer"
    assert found.token_layers == left_over(model, spec)
