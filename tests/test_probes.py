"""Probes against the unmodified model: its own attention weights and hidden states."""

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout
from avflow.workers.engine import probes
from avflow.workers.engine.baseline import Baseline, run_baseline
from avflow.workers.engine.interface import attending, causal_mask
from avflow.workers.engine.probes import (
    MAX_BINS,
    Attended,
    ProbeRow,
    Probes,
    find_sinks,
    group_of_position,
    pooled_map,
    probed_groups,
)
from avflow.workers.engine.reference import Inputs, attention_weights
from avflow.workers.models.base import Embedded, UnsupportedModelError
from avflow.workers.protocol import ProbeName, ProbeSpec, UnitFailure

N_LAYERS = 5
N_TOKENS = 300


@pytest.fixture(scope="module")
def eager(tiny_thinker: Callable[..., Tiny]) -> Tiny:
    return tiny_thinker(n_layers=N_LAYERS, attention="eager")


@pytest.fixture(scope="module")
def tiny(tiny_thinker: Callable[..., Tiny]) -> Tiny:
    return tiny_thinker(n_layers=N_LAYERS)


@pytest.fixture(scope="module")
def layout(random_layout: Callable[..., Layout]) -> Layout:
    return random_layout("single_video", N_TOKENS, 5)


@pytest.fixture(scope="module")
def embedded(layout: Layout, tiny: Tiny, random_embedded: Callable[..., Embedded]) -> Embedded:
    return random_embedded(layout, tiny, 6)


@pytest.fixture(scope="module")
def weights(eager: Tiny, embedded: Embedded) -> list[Tensor]:
    """[N, N] a layer, mean over heads, as the unmodified model hands them out."""
    no_edges = torch.zeros(N_TOKENS, N_TOKENS, dtype=torch.bool)
    found = attention_weights(eager.hf_model, inputs_of(embedded), no_edges, 0, 1)
    return [layer.double().mean(dim=0) for layer in found]


def inputs_of(all_of: Embedded) -> Inputs:
    embeds, mask = all_of.inputs_embeds, all_of.attention_mask
    return Inputs(inputs_embeds=embeds, position_ids=all_of.position_ids, attention_mask=mask)


def probe(
    tiny: Tiny,
    embedded: Embedded,
    layout: Layout,
    name: ProbeName,
    layers: Sequence[int] = range(N_LAYERS),
    **more: Any,
) -> list[ProbeRow]:
    spec = ProbeSpec(name=name, layers=tuple(layers), **more)
    rows = watched(tiny, embedded, layout, [spec])[1][spec.key]
    assert isinstance(rows, list), rows
    return rows


def watched(
    tiny: Tiny, embedded: Embedded, layout: Layout, specs: Sequence[ProbeSpec]
) -> tuple[Baseline, dict[str, list[ProbeRow] | UnitFailure]]:
    """The baseline, and what the probes saw of it."""
    looking = Probes("u", tiny.decoder, layout, specs)
    baseline = run_baseline(tiny.decoder, embedded, {(2, 0)}, looking.watch)
    return baseline, looking.found


def test_attention_of_the_last_token_by_group_and_layer(
    tiny: Tiny, embedded: Embedded, layout: Layout, weights: list[Tensor]
) -> None:
    rows = probe(tiny, embedded, layout, "last_attention")
    groups = probed_groups(layout)
    assert {"system", "video", "audio", "question", "last"} <= set(groups)
    assert [(row.layer, row.group) for row in rows] == [
        (layer, group) for layer in range(N_LAYERS) for group in groups
    ]
    for row in rows:
        expected = float(weights[row.layer][-1, groups[row.group]].sum())
        assert row.value == pytest.approx(expected, abs=1e-6), (row.layer, row.group)


@pytest.mark.parametrize("kind", ["single_video", "interleaved"])
def test_every_position_is_in_a_group_and_has_one_name(
    random_layout: Callable[..., Layout], kind: Any
) -> None:
    layout = random_layout(kind, 200, 3)
    groups = probed_groups(layout)
    assert set(np.concatenate(list(groups.values())).tolist()) == set(range(200))
    names = group_of_position(layout)
    assert all(position in groups[name] for position, name in enumerate(names))
    media = "video" if kind == "single_video" else "candidates"
    assert all(names[position] == media for position in group_positions(layout, media))
    assert names[-1] == "last"


@pytest.mark.parametrize("piece_bytes", [1, 4 * 4 * N_TOKENS * 37, 2**28])
def test_an_attention_map_is_the_dense_one_pooled(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Tiny,
    embedded: Embedded,
    layout: Layout,
    weights: list[Tensor],
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(probes, "MAP_SCORE_BYTES", piece_bytes)
    rows = probe(tiny, embedded, layout, "attention_map", [1, 4])
    width = 3  # the least that needs no more than 128 bins
    assert {row.width for row in rows} == {width}
    bins = N_TOKENS // width
    assert len(rows) == 2 * bins * (bins + 1) // 2
    for row in rows:
        assert row.key <= row.position
        q, k = (slice(at, at + width) for at in (row.position, row.key))
        assert row.value == pytest.approx(float(weights[row.layer][q, k].mean()), abs=1e-6)


class _Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor held."""

    numbers = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def test_no_probe_holds_a_number_for_each_query_and_key(
    monkeypatch: pytest.MonkeyPatch, tiny: Tiny, embedded: Embedded, layout: Layout
) -> None:
    """Scores of all heads, 16 queries at a time; a prompt of 300 has 90,000 (query, key) pairs."""
    monkeypatch.setattr(probes, "MAP_SCORE_BYTES", 16 * 4 * 4 * N_TOKENS)
    with _Largest() as largest:
        watched(tiny, embedded, layout, EVERY_PROBE)
    assert largest.numbers < N_TOKENS * N_TOKENS / 2


@pytest.mark.parametrize("n_tokens", [1, 7, MAX_BINS, MAX_BINS + 1, 1000])
def test_a_map_has_at_most_128_bins_and_the_last_is_a_mean_over_what_it_holds(
    n_tokens: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, n_tokens, 4, generator=generator)
    key = torch.randn(1, n_tokens, 4, generator=generator)
    pooled, width = pooled_map(query, key, 0.5)
    dense = torch.softmax(
        (query @ key.transpose(1, 2) * 0.5).masked_fill(
            torch.ones(n_tokens, n_tokens).triu(1).bool(), float("-inf")
        ),
        dim=-1,
    ).mean(dim=0)
    assert len(pooled) == -(-n_tokens // width) <= MAX_BINS
    last = (len(pooled) - 1) * width
    assert float(pooled[-1, -1]) == pytest.approx(float(dense[last:, last:].mean()), rel=1e-5)
    rows = torch.tensor([min(width, n_tokens - at) for at in range(0, n_tokens, width)])
    mass = (pooled * rows[:, None] * rows).sum()
    assert float(mass) == pytest.approx(n_tokens, rel=1e-6), "each query's weights sum to one"


def test_norms_are_those_of_the_models_own_hidden_states(
    eager: Tiny, embedded: Embedded, layout: Layout
) -> None:
    inputs = inputs_of(embedded)
    with torch.no_grad():
        states = eager.hf_model(
            inputs_embeds=inputs.inputs_embeds,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
            output_hidden_states=True,
        ).hidden_states
    rows = probe(eager, embedded, layout, "norms", [0, 2, 4])
    names = group_of_position(layout)
    assert [(row.layer, row.position) for row in rows] == [
        (layer, position) for layer in (0, 2, 4) for position in range(N_TOKENS)
    ]
    for row in rows:
        expected = float(states[row.layer][0, row.position].norm())
        assert row.value == pytest.approx(expected, rel=1e-5)
        assert row.group == names[row.position]


def test_sinks_are_found_where_and_from_when_they_are_massive(
    tiny: Tiny, embedded: Embedded, layout: Layout
) -> None:
    """Layer 1 is made to put out massive activations at two tokens, in the same two dimensions."""
    video = int(group_positions(layout, "video")[0])

    def massive(_module: Any, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, 1, [11, 40]] = torch.tensor([-9e3, 6e3])
        out[0, video, [11, 40]] = torch.tensor([4e3, 5e3])
        return out

    handle = tiny.decoder.layers[1].register_forward_hook(massive)
    try:
        rows = probe(tiny, embedded, layout, "sinks", [0, 1, 2, 3], top_dimensions=2)
    finally:
        handle.remove()
    counts = {row.layer: row.value for row in rows if row.position < 0}
    assert counts == {0: 0, 1: 0, 2: 2, 3: 2}
    of_layer = [row for row in rows if row.layer == 2 and row.position >= 0]
    assert [(row.position, row.group, row.dimension, round(row.value)) for row in of_layer] == [
        (1, "system", 11, 9000),
        (1, "system", 40, 6000),
        (video, "video", 40, 5000),
        (video, "video", 11, 4000),
    ]


def test_a_sink_is_told_by_its_peak_and_by_its_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 3584, generator=generator)
    assert find_sinks(hidden) == []
    hidden[3] *= 100  # a large norm alone
    hidden[7] *= 0.001
    hidden[7, 5] = 1.0  # a peak alone
    assert find_sinks(hidden) == []
    hidden[9, 300] = 400.0
    hidden[2, 300] = 600.0
    assert find_sinks(hidden) == [2, 9]
    hidden[4, 8] = 27.5  # RMS-normed: just above 24, and just below; its norm is not large
    assert find_sinks(hidden) == [2, 9]
    assert find_sinks(torch.zeros(4, 8)) == []


EVERY_PROBE = (
    ProbeSpec(name="last_attention", layers=(0, 2, 4)),
    ProbeSpec(name="attention_map", layers=(1, 2)),
    ProbeSpec(name="norms", layers=(0, 3)),
    ProbeSpec(name="sinks", layers=(3,)),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_being_watched_changes_no_bit_of_the_baseline(
    tiny_thinker: Callable[..., Tiny],
    random_embedded: Callable[..., Embedded],
    layout: Layout,
    attention: str,
    dtype: str,
) -> None:
    tiny = tiny_thinker(n_layers=N_LAYERS, attention=attention, dtype=dtype)
    embedded = random_embedded(layout, tiny, 6)
    alone = run_baseline(tiny.decoder, embedded, {(2, 0)})
    baseline, found = watched(tiny, embedded, layout, EVERY_PROBE)
    assert all(isinstance(rows, list) and rows for rows in found.values())
    assert torch.equal(baseline.probabilities, alone.probabilities)
    assert torch.equal(baseline.residual[2, 0], alone.residual[2, 0])
    for mine, theirs in zip(baseline.keys, alone.keys, strict=True):
        assert torch.equal(mine, theirs)
    assert tiny.hf_model.get_decoder().config._attn_implementation == attention


@torch.inference_mode()
def walked(tiny: Tiny, embedded: Embedded, layout: Layout) -> dict[str, list[ProbeRow]]:
    """Another way to the same rows: a pass of their own, each layer with a function that shows its
    queries and keys and attends in plain products."""
    hidden, rows = embedded.inputs_embeds, dict[str, list[ProbeRow]]()
    groups = probes._Groups(layout)
    layer = 0

    def look(looks: Any, seen: Any) -> None:
        for spec in EVERY_PROBE:
            if layer in spec.layers and spec.name in looks:
                rows.setdefault(spec.key, []).extend(looks[spec.name](spec, groups, layer, seen))

    def attend(
        _module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any
    ) -> Any:
        look(probes._OF_ATTENTION, Attended(query=query[0], key=key[0], scaling=more["scaling"]))
        key, value = (
            t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value)
        )
        future = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(2, 3) * more["scaling"]).masked_fill(future, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    with attending(tiny.decoder.config, "walked", attend):
        rotary = tiny.decoder.rotary(hidden, embedded.position_ids)
        mask = causal_mask(tiny.decoder, hidden, None)
        for layer in range(N_LAYERS):
            look(probes._OF_INPUT, hidden[0])
            hidden = tiny.decoder.layers[layer](
                hidden, attention_mask=mask, position_embeddings=rotary
            )
    return rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_baseline_shows_what_a_pass_of_their_own_would(
    tiny_thinker: Callable[..., Tiny], embedded: Embedded, layout: Layout, attention: str
) -> None:
    tiny = tiny_thinker(n_layers=N_LAYERS, attention=attention)
    _, found = watched(tiny, embedded, layout, EVERY_PROBE)
    expected = walked(tiny, embedded, layout)
    assert found.keys() == expected.keys()
    for key, rows in found.items():
        assert isinstance(rows, list), rows
        assert [replace(row, value=0) for row in rows] == [
            replace(row, value=0) for row in expected[key]
        ]
        tolerance = 1e-6 if "attention" in key else 1e-4  # norms are of the order of 100
        apart = [abs(a.value - b.value) for a, b in zip(rows, expected[key], strict=True)]
        assert max(apart) <= tolerance, key


def test_one_pass_serves_all_probes_and_the_baseline(
    tiny: Tiny, embedded: Embedded, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, at=at: runs.append(at))
        for at, layer in enumerate(tiny.decoder.layers)
    ]

    def broken(*_: Any) -> Any:
        raise ValueError("no map today")

    monkeypatch.setattr(probes, "pooled_map", broken)
    try:
        _, found = watched(tiny, embedded, layout, EVERY_PROBE)
    finally:
        for handle in handles:
            handle.remove()
    assert runs == list(range(N_LAYERS)), "one pass, each layer once"
    assert isinstance(found.pop("probe/attention_map"), UnitFailure)
    assert [len(rows) for rows in found.values() if isinstance(rows, list)] == [
        3 * len(probed_groups(layout)),
        2 * N_TOKENS,
        1,
    ]


def test_nothing_of_a_pass_is_held_once_it_is_over(
    tiny_thinker: Callable[..., Tiny], embedded: Embedded, layout: Layout
) -> None:
    """Neither by transformers' registry, which is global, nor by what a failed probe raised."""
    tiny = tiny_thinker(n_layers=2)
    looking = Probes("u", tiny.decoder, layout, [ProbeSpec(name="attention_map", layers=(1,))])
    held: list[weakref.ref[Any]] = []

    def broken(query: Tensor, *_: Any) -> Any:
        scores = query * 2
        held.append(weakref.ref(scores))
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "pooled_map", broken)
        run_baseline(tiny.decoder, embedded, (), looking.watch)
    (found,) = looking.found.values()
    assert isinstance(found, UnitFailure)
    assert "broken" in found.traceback
    held.append(weakref.ref(tiny.decoder.layers[0]))
    del tiny, looking
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_a_family_without_an_eager_function_is_named(
    eager: Tiny, embedded: Embedded, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = sys.modules[type(eager.decoder.layers[0].self_attn).__module__]
    looking = Probes("u", eager.decoder, layout, EVERY_PROBE)
    with monkeypatch.context() as patch:
        patch.delattr(family, "eager_attention_forward")
        with pytest.raises(UnsupportedModelError, match="has no eager_attention_forward"):
            run_baseline(eager.decoder, embedded, (), looking.watch)
