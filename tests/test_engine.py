"""The fast engine against the plain reference pass, on random models and prompts."""

import engine_ways
import pytest
import torch
from engine_ways import (
    BUDGET,
    TOLERANCE,
    fast,
    knockout,
    of_kind,
    plain,
    reference_edges,
    reference_inputs,
    replayed,
    shapes_for,
    worst_disagreement,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from avflow.pathways.groups import group_positions
from avflow.pathways.pathway import (
    blocked_segments,
    causal_blocked_edges,
    first_target,
)
from avflow.workers.engine import backends, flex, flex_kernel, reference
from avflow.workers.engine.attention import NAME, replaying
from avflow.workers.engine.baseline import run_baseline
from avflow.workers.engine.plan import compose_batches
from avflow.workers.engine.rows import Knockout
from avflow.workers.models.base import Embedded, UnsupportedModelError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_baseline_is_the_models_own_forward_to_the_bit(
    tiny_thinker, random_layout, random_embedded, dtype, attention
) -> None:
    tiny = tiny_thinker(dtype=dtype, attention=attention)
    embedded = random_embedded(random_layout("single_video", 120, 5), tiny, 5)
    seen: list[Tensor] = []
    handle = (
        tiny.hf_model.get_decoder()
        .layers[3]
        .register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    )
    expected = reference.plain_probabilities(tiny.hf_model, reference_inputs(embedded))
    handle.remove()
    baseline = run_baseline(tiny.decoder, embedded, {(3, 40)})
    assert list(baseline.residual) == [(3, 40)]
    assert torch.equal(baseline.residual[3, 40], seen[0][:, 40:])
    assert (baseline.probabilities - expected).abs().max() <= 1e-7  # the head's shape differs


@pytest.mark.parametrize(
    ("kind", "window", "heads", "kv_heads", "attention", "seed"),
    [
        ("single_video", 1, 4, 2, "sdpa", 0),
        ("single_video", 3, 4, 1, "sdpa", 1),
        ("single_video", 7, 4, 4, "eager", 2),
        ("interleaved", 2, 4, 4, "sdpa", 3),
        ("interleaved", 3, 4, 2, "eager", 4),
        ("interleaved", 8, 8, 1, "sdpa", 5),
    ],
)
def test_every_pathway_agrees_with_the_reference(
    tiny_thinker, random_layout, random_embedded, kind, window, heads, kv_heads, attention, seed
) -> None:
    tiny = tiny_thinker(heads=heads, kv_heads=kv_heads, attention=attention, seed=seed)
    layout = random_layout(kind, 200 + seed, seed)
    embedded = random_embedded(layout, tiny, seed)
    assert worst_disagreement(tiny, embedded, layout, window) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_agreement_over_many_fresh_models(
    tiny_thinker, random_layout, random_embedded, seed
) -> None:
    heads, kv_heads = [(2, 1), (4, 2), (6, 2), (8, 8)][seed % 4]
    n_layers = 8 + seed % 5
    tiny = tiny_thinker(
        n_layers=n_layers, hidden=16 * heads, heads=heads, kv_heads=kv_heads, seed=seed
    )
    for kind in ("single_video", "interleaved"):
        layout = random_layout(kind, 200 + seed, seed)
        embedded = random_embedded(layout, tiny, seed)
        for window in (1, 3, 7):
            assert worst_disagreement(tiny, embedded, layout, window, 2) <= TOLERANCE


@pytest.mark.parametrize("kind", ["single_video", "interleaved"])
def test_agreement_in_float64_through_unmodified_code(
    tiny_thinker, random_layout, random_embedded, kind
) -> None:
    """The official norms cast to float32, so that a last bit may round another way there."""
    tiny = tiny_thinker(dtype="float64", seed=6)
    layout = random_layout(kind, 200, 6)
    assert worst_disagreement(tiny, random_embedded(layout, tiny, 6), layout, 3, 4) <= 1e-6


@pytest.mark.parametrize("kind", ["single_video", "interleaved"])
def test_agreement_in_float64_without_those_casts(
    tiny_thinker, random_layout, random_embedded, kind, monkeypatch
) -> None:
    tiny = tiny_thinker(dtype="float64", seed=6)

    def norm_in_its_own_precision(self, hidden: Tensor) -> Tensor:
        assert hidden.dtype == torch.float64
        spread = hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * hidden * torch.rsqrt(spread)

    monkeypatch.setattr(type(tiny.decoder.norm), "forward", norm_in_its_own_precision)
    layout = random_layout(kind, 200, 6)
    assert worst_disagreement(tiny, random_embedded(layout, tiny, 6), layout, 3, 4) <= 1e-10


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_set_of_layers_from_4_to_40(tiny_thinker, random_layout, random_embedded, data) -> None:
    n_layers = data.draw(st.sampled_from([4, 7, 40]), label="layers")
    seed = data.draw(st.integers(0, 2**20), label="seed")
    tiny = tiny_thinker(n_layers=n_layers, hidden=32, heads=2, kv_heads=1, seed=seed)
    layout = random_layout("single_video", 120, seed)
    embedded = random_embedded(layout, tiny, seed)
    some = st.sets(st.integers(0, n_layers - 1), min_size=1, max_size=n_layers)
    sets = data.draw(st.lists(some, min_size=1, max_size=3), label="masked layers")
    pathway = data.draw(st.sampled_from(of_kind(layout)))
    blocked = blocked_segments(layout, pathway)
    asked = Knockout(
        blocked=blocked,
        start=first_target(layout, blocked),
        layer_sets=tuple(tuple(sorted(layers)) for layers in sets),
    )
    found = replayed(tiny, embedded, layout, [asked], BUDGET)
    edges, inputs = reference_edges(layout, pathway), reference_inputs(embedded)
    for number, layers in enumerate(sets):
        with reference.knocked_out_at(tiny.hf_model, edges, sorted(layers)):
            expected = reference.plain_probabilities(tiny.hf_model, inputs)
        assert (found[0, number] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["single_video", "interleaved"])
def test_the_block_mask_backend_agrees_with_the_reference(
    tiny_thinker, random_layout, random_embedded, kind, monkeypatch
) -> None:
    """The same masks as on CUDA, through FlexAttention as it runs without its compiler: over all
    edges of a batch's rows, so with small blocks and few rows at a time."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    monkeypatch.setattr(engine_ways, "BUDGET", 2**18)
    monkeypatch.setattr(flex_kernel, "possible_on", lambda device: True)
    monkeypatch.setattr(flex_kernel, "kernel_for", lambda device, heads: flex_attention)
    monkeypatch.setattr(backends, "MANY_PARTS", 0)
    tiny = tiny_thinker(n_layers=6, seed=21)
    layout = random_layout(kind, 110, 21)
    assert worst_disagreement(tiny, random_embedded(layout, tiny, 21), layout, 3, 5) <= TOLERANCE


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_models_prompts_and_windows_agree(
    tiny_thinker, random_layout, random_embedded, data
) -> None:
    seed = data.draw(st.integers(0, 2**20), label="seed")
    heads, kv_heads = data.draw(st.sampled_from([(2, 1), (4, 2), (6, 3), (8, 2)]), label="heads")
    n_layers = data.draw(st.integers(8, 10), label="layers")
    tiny = tiny_thinker(
        n_layers=n_layers, hidden=16 * heads, heads=heads, kv_heads=kv_heads, seed=seed
    )
    kind = data.draw(st.sampled_from(["single_video", "interleaved"]), label="kind")
    layout = random_layout(kind, data.draw(st.integers(200, 230), label="tokens"), seed)
    embedded = random_embedded(layout, tiny, seed)
    window = data.draw(st.sampled_from([1, 2, 3, 7]), label="window")
    pathways = data.draw(
        st.lists(st.sampled_from(of_kind(layout)), min_size=3, max_size=3, unique=True)
    )
    centers = [0, n_layers // 2, n_layers - 1]
    curves = fast(tiny, embedded, layout, pathways, window)
    for pathway in pathways:
        edges = reference_edges(layout, pathway)
        expected = plain(tiny, embedded, edges, centers, window)
        assert (curves[pathway.name][centers] - expected).abs().max() <= TOLERANCE


def test_the_comparison_would_catch_a_wrong_window_or_a_missing_token(
    tiny_thinker, random_layout, random_embedded
) -> None:
    """Negative controls: the agreement above is not for want of an effect."""
    tiny = tiny_thinker()
    layout = random_layout("single_video", 200, 7)
    embedded = random_embedded(layout, tiny, 7)
    pathways = [p for p in of_kind(layout) if p.name in ("video_to_question", "audio_to_last")]
    curves = fast(tiny, embedded, layout, pathways, 3)
    unharmed = reference.plain_probabilities(tiny.hf_model, reference_inputs(embedded))
    for pathway in pathways:
        mine = curves[pathway.name][3]
        assert (mine - unharmed).abs().max() > 100 * TOLERANCE
        edges = reference_edges(layout, pathway)
        for center, window in ((2, 3), (4, 3), (3, 1), (3, 5)):
            wrong = plain(tiny, embedded, edges, [center], window)[0]
            assert (mine - wrong).abs().max() > 100 * TOLERANCE
        source = int(group_positions(layout, pathway.sources[0])[-1])
        one_short = edges.clone()
        one_short[:, source] = False
        wrong = plain(tiny, embedded, one_short, [3], 3)[0]
        assert (mine - wrong).abs().max() > 10 * TOLERANCE


def test_the_cut_into_batches_and_pieces_moves_only_last_bits(
    tiny_thinker, random_layout, random_embedded
) -> None:
    tiny = tiny_thinker()
    layout = random_layout("interleaved", 200, 8)
    embedded = random_embedded(layout, tiny, 8)
    whole = fast(tiny, embedded, layout, of_kind(layout), 3)
    again = fast(tiny, embedded, layout, of_kind(layout), 3)
    assert all(torch.equal(curve, again[name]) for name, curve in whole.items())
    asked = [knockout(layout, pathway, 3, 8) for pathway in of_kind(layout)]
    cuts = []
    for budget in (2**20, 2**17, 1):
        small = fast(tiny, embedded, layout, of_kind(layout), 3, budget=budget)
        for name, curve in whole.items():
            assert (curve - small[name]).abs().max() <= 1e-6
        cuts.append(len(compose_batches(layout, asked, shapes_for(tiny, layout), budget)))
    assert cuts == sorted(set(cuts)), "each budget cuts in another way"


def test_bfloat16_stays_near_its_own_reference(
    tiny_thinker, random_layout, random_embedded
) -> None:
    tiny = tiny_thinker(dtype="bfloat16")
    layout = random_layout("single_video", 200, 9)
    embedded = random_embedded(layout, tiny, 9)
    (pathway,) = (p for p in of_kind(layout) if p.name == "video_to_question")
    curve = fast(tiny, embedded, layout, [pathway], 3)[pathway.name]
    expected = plain(tiny, embedded, reference_edges(layout, pathway), range(8), 3)
    assert curve.dtype == torch.float32
    assert (curve - expected).abs().max() <= 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_agreement_on_a_gpu(tiny_thinker, random_layout, random_embedded) -> None:
    tiny = tiny_thinker()
    layout = random_layout("single_video", 200, 10)
    embedded = random_embedded(layout, tiny, 10)
    tiny.hf_model.to("cuda")
    on_gpu = Embedded(
        inputs_embeds=embedded.inputs_embeds.cuda(),
        position_ids=embedded.position_ids.cuda(),
        attention_mask=embedded.attention_mask.cuda(),
        input_ids=embedded.input_ids.cuda(),
    )
    assert worst_disagreement(tiny, on_gpu, layout, 3) <= TOLERANCE


def test_the_model_is_left_as_it_was(tiny_thinker, random_layout, random_embedded) -> None:
    tiny = tiny_thinker()
    layout = random_layout("single_video", 100, 11)
    embedded = random_embedded(layout, tiny, 11)
    inputs = reference_inputs(embedded)
    before = reference.plain_probabilities(tiny.hf_model, inputs)
    fast(tiny, embedded, layout, of_kind(layout)[:6], 3)
    with replaying(tiny.decoder.config):
        assert tiny.decoder.config._attn_implementation == NAME
        with pytest.raises(TypeError, match="replayed"):  # never a silent plain pass
            reference.plain_probabilities(tiny.hf_model, inputs)
    assert tiny.decoder.config._attn_implementation == "sdpa"
    assert torch.equal(before, reference.plain_probabilities(tiny.hf_model, inputs))


def test_a_decoder_with_sliding_layers_is_refused(
    tiny_thinker, random_layout, random_embedded
) -> None:
    tiny = tiny_thinker(seed=12)
    embedded = random_embedded(random_layout("single_video", 100, 12), tiny, 12)
    tiny.decoder.config.layer_types = ["full_attention"] * 7 + ["sliding_attention"]
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        run_baseline(tiny.decoder, embedded, ())


def test_blocked_edges_are_counted(random_layout) -> None:
    layout = random_layout("interleaved", 100, 16)
    for pathway in of_kind(layout):
        blocked = blocked_segments(layout, pathway)
        lost = reference_edges(layout, pathway).tril(-1)
        assert causal_blocked_edges(layout, blocked) == int(lost.sum())
