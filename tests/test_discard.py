"""Discarding tokens for good equals blocking them as keys from the next layer on."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from engine_ways import reference_inputs
from torch import Tensor

from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout
from avflow.workers.engine import discard
from avflow.workers.engine.discard import discard_prefill, timed_prefill
from avflow.workers.engine.reference import knocked_out, plain_probabilities
from avflow.workers.models.base import Decoder, Embedded

N_LAYERS = 6
Drops = Mapping[int, np.ndarray[Any, np.dtype[np.int64]]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def tiny(request: pytest.FixtureRequest, tiny_thinker: Callable[..., Tiny]) -> Tiny:
    return tiny_thinker(n_layers=N_LAYERS, attention=request.param)


@pytest.fixture(scope="module")
def layout(random_layout: Callable[..., Layout]) -> Layout:
    return random_layout("single_video", 150, 1)


@pytest.fixture(scope="module")
def embedded(layout: Layout, tiny: Tiny, random_embedded: Callable[..., Embedded]) -> Embedded:
    return random_embedded(layout, tiny, 2)


def blocked_as_keys(tiny: Tiny, embedded: Embedded, drops: Drops) -> Tensor:
    """The unmodified model's forward, each layer after a drop with a dense mask of its own."""
    n_tokens = embedded.inputs_embeds.shape[1]
    inputs = reference_inputs(embedded)
    with ExitStack() as hooks:
        for layer in range(N_LAYERS):
            edges = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
            for after, positions in drops.items():
                if layer > after:
                    edges[:, torch.tensor(positions)] = True
            edges.fill_diagonal_(False)
            if edges.any():
                hooks.enter_context(knocked_out(tiny.hf_model, edges, layer, 1))
        return plain_probabilities(tiny.hf_model, inputs)


CASES = {
    "one group": [(2, ("video",))],
    "two groups at once": [(1, ("video", "audio"))],
    "in steps": [(1, ("video",)), (3, ("audio", "non_option_question")), (4, ("system",))],
    "again what is gone": [(0, ("audio",)), (3, ("audio", "video"))],
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_answer_is_that_of_a_full_pass_with_the_tokens_blocked_as_keys(
    tiny: Tiny, layout: Layout, embedded: Embedded, case: list[tuple[int, tuple[str, ...]]]
) -> None:
    drops = {
        layer: np.concatenate([group_positions(layout, group) for group in groups])
        for layer, groups in case
    }
    found = discard_prefill(tiny.decoder, embedded, drops)
    torch.testing.assert_close(
        found.probabilities, blocked_as_keys(tiny, embedded, drops), rtol=0, atol=1e-5
    )
    full = discard_prefill(tiny.decoder, embedded, {})
    assert (found.probabilities - full.probabilities).abs().max() > 1e-3, "it changed the answer"
    gone: set[int] = set()
    for layer, length in enumerate(found.lengths):
        assert length == layout.n_tokens - len(gone), "each layer runs what is left, no more"
        gone |= set(drops.get(layer, np.array([], dtype=np.int64)).tolist())
    assert found.token_layers == sum(found.lengths) < full.token_layers


def test_nothing_discarded_is_the_models_own_pass(tiny: Tiny, embedded: Embedded) -> None:
    found = timed_prefill(tiny.decoder, embedded, {})
    torch.testing.assert_close(
        found.probabilities, blocked_as_keys(tiny, embedded, {}), rtol=0, atol=1e-6
    )
    assert found.lengths == (150,) * N_LAYERS
    assert found.seconds is not None
    assert 0 < found.seconds < 60


class _Watched:
    """A layer that notes how long its sequence and its rotary tables are, and whose."""

    def __init__(self, layer: Any, seen: list[tuple[Tensor, Tensor]]) -> None:
        self.layer, self.seen = layer, seen

    def __call__(self, hidden: Tensor, **kwargs: Any) -> Any:
        cos, _ = kwargs["position_embeddings"]
        out = self.layer(hidden, **kwargs)
        cache = kwargs["past_key_values"]
        self.seen.append((cos[0], cache.layers[self.layer.self_attn.layer_idx].keys))
        return out


def test_survivors_keep_their_position_ids_and_nothing_else_is_in_the_cache(
    tiny: Tiny, layout: Layout, embedded: Embedded
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    layers: Any = [_Watched(layer, seen) for layer in tiny.decoder.layers]
    watched = Decoder(
        layers=layers,
        rotary=tiny.decoder.rotary,
        norm=tiny.decoder.norm,
        lm_head=tiny.decoder.lm_head,
        config=tiny.decoder.config,
    )
    video = group_positions(layout, "video")
    discard_prefill(watched, embedded, {2: video})
    cos, _ = tiny.decoder.rotary(embedded.inputs_embeds, embedded.position_ids)
    left = np.setdiff1d(np.arange(layout.n_tokens), video)
    for layer, (used, keys) in enumerate(seen):
        expected = cos[0] if layer <= 2 else cos[0][left]
        assert torch.equal(used, expected)
        assert keys.shape[2] == len(expected)


def test_what_can_not_be_discarded_is_refused(tiny: Tiny, embedded: Embedded) -> None:
    with pytest.raises(ValueError, match="last position can't be discarded"):
        discard_prefill(tiny.decoder, embedded, {1: np.array([3, 149])})
    for layer in (N_LAYERS - 1, N_LAYERS, -1):
        with pytest.raises(ValueError, match=re.escape(f"after layer {layer}")):
            discard_prefill(tiny.decoder, embedded, {layer: np.array([3])})


def test_the_first_of_two_runs_warms_up_and_the_second_is_timed(
    tiny: Tiny, embedded: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[str] = []
    walk = discard._walk

    def noted(*args: Any) -> Any:
        ticks.append("walk")
        return walk(*args)

    def clock() -> float:
        ticks.append("clock")
        return float(len(ticks))

    monkeypatch.setattr(discard, "_walk", noted)
    monkeypatch.setattr(discard, "_wait_for", lambda _result: ticks.append("wait"))
    monkeypatch.setattr(discard.time, "perf_counter", clock)
    assert timed_prefill(tiny.decoder, embedded, {}).seconds == 3
    assert ticks == ["walk", "wait", "clock", "walk", "wait", "clock"]


def test_the_clock_waits_for_a_gpu_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    discard._wait_for(torch.zeros(1))
    assert waited == []
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 1))
    discard._wait_for(on_gpu)
    assert waited == [torch.device("cuda", 1)]
