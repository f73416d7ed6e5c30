"""The engine on random models, segmentations, masks, layers and budgets, against the plain pass.

Pathways are not asked here: any segment may be closed to any other, its own positions to each
other, or all that comes before it; so a query may be left with itself alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from engine_ways import TOLERANCE, clip_of, reference_inputs, replayed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from avflow.pathways.layout import Layout
from avflow.pathways.pathway import first_target
from avflow.pathways.windows import window_layers
from avflow.workers.engine import reference
from avflow.workers.engine.rows import Knockout
from avflow.workers.models.base import Embedded

Models = Callable[..., Tiny]
Embeds = Callable[..., Embedded]
MANY = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WHOLE = 2**40  # a budget that holds everything at once
HEADS = [(1, 1), (2, 1), (4, 4), (6, 2), (8, 1)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@contextmanager
def norms_in_float64(tiny: Tiny) -> Iterator[None]:
    """The official norms cast to float32, where a last bit may round another way."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        assert hidden.dtype == torch.float64
        spread = hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * hidden * torch.rsqrt(spread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny.decoder.norm), "forward", forward)
        yield


@st.composite
def masks(draw: st.DrawFn, n_segments: int) -> NDArray[np.bool_]:
    """bool [S, S]: closed at random; or a few segments read nothing else, or are read by none."""
    blocked = draw(arrays.arrays(np.bool_, (n_segments, n_segments), elements=st.booleans()))
    kind = draw(st.sampled_from(["at random", "blind", "unread", "few"]))
    some = draw(st.lists(st.integers(0, n_segments - 1), min_size=1, max_size=2))
    if kind != "at random":
        blocked = np.zeros_like(blocked)
    if kind == "blind":
        blocked[some] = True
    elif kind == "unread":
        blocked[:, some] = True
    elif kind == "few":
        blocked[some, draw(st.integers(0, n_segments - 1))] = True
    return blocked


@st.composite
def knockouts(draw: st.DrawFn, layout: Layout, n_layers: int) -> Knockout:
    """Some windows, odd or even, at any centre; or any sets of layers."""
    blocked = draw(masks(len(layout.segments)))
    window = draw(st.integers(1, n_layers))
    centers = st.integers(0, n_layers - 1) | st.sampled_from([0, n_layers - 1])
    windows = centers.map(lambda c: tuple(window_layers(c, window, n_layers)))
    some = st.sets(st.integers(0, n_layers - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    sets = draw(st.lists(windows if draw(st.booleans()) else some, min_size=1, max_size=4))
    return Knockout(blocked=blocked, start=first_target(layout, blocked), layer_sets=tuple(sets))


def edges_of(layout: Layout, blocked: NDArray[np.bool_]) -> Tensor:
    segment = layout.segment_of_position
    return torch.from_numpy(blocked[segment][:, segment]).fill_diagonal_(False)


def plain(tiny: Tiny, embedded: Embedded, edges: Tensor, layers: Sequence[int]) -> Tensor:
    with reference.knocked_out_at(tiny.hf_model, edges, layers):
        return reference.plain_probabilities(tiny.hf_model, reference_inputs(embedded))


def check(
    tiny: Tiny, embedded: Embedded, layout: Layout, asked: Sequence[Knockout], tolerance: float,
    budget: int,
) -> dict[tuple[int, int], Tensor]:  # fmt: skip
    found = replayed(tiny, embedded, layout, asked, budget)
    for number, knockout in enumerate(asked):
        edges = edges_of(layout, knockout.blocked)
        for index, layers in enumerate(knockout.layer_sets):
            expected = plain(tiny, embedded, edges, layers)
            apart = float((found[number, index] - expected).abs().max())
            assert apart <= tolerance, (knockout, layers)
    return found


@MANY
@given(data=st.data())
def test_any_mask_at_any_layers_in_any_budget(
    tiny_thinker: Models, random_embedded: Embeds, data: st.DataObject
) -> None:
    heads, kv_heads = data.draw(st.sampled_from(HEADS), label="heads")
    n_layers = data.draw(st.sampled_from([4, 5, 7, 12]), label="layers")
    exact = data.draw(st.booleans(), label="float64")
    seed = data.draw(st.integers(0, 2**20), label="seed")
    spread = data.draw(st.sampled_from([1, 10]), label="spread")
    tiny = tiny_thinker(
        n_layers=n_layers, hidden=16 * heads, heads=heads, kv_heads=kv_heads, seed=seed,
        dtype="float64" if exact else "float32", spread=spread,
    )  # fmt: skip
    lengths = st.lists(st.integers(1, 7), min_size=1, max_size=8)
    layout = clip_of(*data.draw(lengths, label="segments"))
    embedded = random_embedded(layout, tiny, seed)
    drawn = st.lists(knockouts(layout, n_layers), min_size=1, max_size=3)
    asked = data.draw(drawn, label="knockouts")
    budget = data.draw(st.sampled_from([1, 2**14, 2**17, WHOLE]), label="budget")
    if not exact:
        found = check(tiny, embedded, layout, asked, TOLERANCE, budget)
        whole = replayed(tiny, embedded, layout, asked, WHOLE)
        # Weights of ten times the usual spread carry rounding further than a real model's.
        apart = 1e-6 if spread == 1 else 5e-6
        for key, probabilities in found.items():
            assert (probabilities - whole[key]).abs().max() <= apart
        return
    with norms_in_float64(tiny):
        check(tiny, embedded, layout, asked, 1e-10, budget)
