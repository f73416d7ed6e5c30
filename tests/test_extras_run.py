"""A unit's interventions and probes as events, against the unmodified model."""

import pickle
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_ways import reference_inputs
from test_run_unit import N_LAYERS, InMemory, curve, mistaken, model, run, unit
from torch import Tensor

from avflow.pathways import catalogue
from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout
from avflow.pathways.pathway import Pathway
from avflow.workers import extras
from avflow.workers.engine import probes
from avflow.workers.engine.reference import (
    edges_between,
    knocked_out,
    plain_probabilities,
)
from avflow.workers.protocol import (
    CurveDone,
    DiscardSpec,
    DiscardStep,
    Event,
    ExtraSpec,
    InterventionDone,
    MaskSpec,
    ProbeDone,
    ProbeSpec,
    SampleDone,
    UnitFailure,
    UnitSpec,
)

__all__ = ["model"]  # a fixture

LATE = (4, 5, 6, 7)


def mask(name: str, *pathways: str, layers: tuple[int, ...] = LATE, **changes: Any) -> MaskSpec:
    found = tuple(catalogue.find(pathway)[0] for pathway in pathways)
    return MaskSpec(name=name, pathways=found, layers=layers, **changes)


def discard(name: str, *steps: tuple[int, str], **changes: Any) -> DiscardSpec:
    return DiscardSpec(
        name=name,
        steps=tuple(DiscardStep(after_layer=i, groups=tuple(g.split("+"))) for i, g in steps),
        **changes,
    )


TABLE_1 = (
    mask("video_for_last", "video_to_last"),
    mask("video_for_text", "video_to_question", "video_to_last"),
    mask("video_audio_for_text", "video_audio_to_question", "video_audio_to_last"),
)
TABLE_4 = (
    discard("full"),
    discard("media", (3, "video+audio")),
    discard("all", (3, "video+audio"), (5, "non_option_question")),
)
PROBES = (
    ProbeSpec(name="last_attention", layers=tuple(range(N_LAYERS))),
    ProbeSpec(name="attention_map", layers=(6, 7)),
    ProbeSpec(name="norms", layers=(0, 7)),
    ProbeSpec(name="sinks", layers=(0, 7)),
)
EVERY_EXTRA = (*TABLE_1, *TABLE_4, *PROBES)


def asking(*specs: ExtraSpec, curves: Sequence[Any] = (), **changes: Any) -> UnitSpec:
    whole = unit(tuple(curves), {spec.key for spec in (*curves, *specs)})
    return replace(whole, extras=specs, **changes)


def done(events: Sequence[Event]) -> dict[str, InterventionDone]:
    return {event.curve: event for event in events if isinstance(event, InterventionDone)}


def blocked(model: InMemory, groups: Sequence[tuple[str, str]], layers: Sequence[int]) -> Tensor:
    """[V] of the unmodified model with a dense mask: `groups` are (sources, targets)."""
    edges = torch.zeros(model.layout.n_tokens, model.layout.n_tokens, dtype=torch.bool)
    for sources, targets in groups:
        edges |= edges_between(
            model.layout.n_tokens, at(model.layout, sources), at(model.layout, targets)
        )
    inputs = reference_inputs(model.embedded)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(knocked_out(model.hf_model, edges, layer, 1))
        return plain_probabilities(model.hf_model, inputs)


def at(layout: Layout, groups: str) -> list[int]:
    return np.concatenate([group_positions(layout, g) for g in groups.split("+")]).tolist()


def test_each_extra_once_after_the_curves_and_the_sample_last(model: InMemory) -> None:
    curves = (curve("video_to_question"), curve("question_to_last"))
    events = run(model, asking(*EVERY_EXTRA, curves=curves))
    kinds = [CurveDone] * 2 + [InterventionDone] * 6 + [ProbeDone] * 4 + [SampleDone]
    assert [type(event) for event in events] == kinds
    assert [e.curve for e in events[2:-1]] == [spec.key for spec in EVERY_EXTRA]
    assert pickle.loads(pickle.dumps(events)) is not None


@pytest.mark.parametrize("layers", [LATE, (0,), (2, 5), (7,)], ids=str)
def test_masks_are_the_plain_pass_with_all_their_edges_blocked(
    model: InMemory, layers: tuple[int, ...]
) -> None:
    specs = tuple(replace(spec, layers=layers) for spec in TABLE_1)
    found = done(run(model, asking(*specs)))
    groups = {
        "mask/video_for_last": [("video", "last")],
        "mask/video_for_text": [("video", "question+last")],
        "mask/video_audio_for_text": [("video+audio", "question+last")],
    }
    unmasked = blocked(model, [], ())
    top = int(unmasked.argmax())
    for key, edges in groups.items():
        expected = blocked(model, edges, layers)
        assert found[key].p == pytest.approx(float(expected[top]), abs=1e-5)
        options = expected[list(model.option_tokens)].numpy()
        np.testing.assert_allclose(found[key].p_options, options, atol=1e-5)
        assert found[key].token == int(expected.argmax())
        assert found[key].layers == layers
        assert found[key].p_base == pytest.approx(float(unmasked[top]), abs=1e-6)
        assert found[key].correct_base
        assert found[key].correct == (found[key].token == top)
        assert (found[key].token_layers, found[key].prefill_s) == (None, None)


def test_a_masks_numbers_do_not_depend_on_what_else_is_wanted(model: InMemory) -> None:
    curves = (curve("video_to_question"), curve("cross_frame"))
    together = done(run(model, asking(*TABLE_1, curves=curves)))
    for spec in TABLE_1:
        alone = replace(asking(*TABLE_1, curves=curves), wanted=frozenset({spec.key}))
        (found,) = done(run(model, alone)).values()
        assert found.p == together[spec.key].p
        assert found.p_options.tolist() == together[spec.key].p_options.tolist()


def test_discards_answer_as_the_pass_with_blocked_keys_and_say_what_they_took(
    model: InMemory,
) -> None:
    found = done(run(model, asking(*TABLE_4)))
    n, later = model.layout.n_tokens, range(4, N_LAYERS)
    everyone = "+".join(["system", "video", "audio", "question", "last"])
    plain = blocked(model, [], ())
    expected = blocked(model, [("video+audio", everyone)], later)
    top = int(plain.argmax())
    assert found["discard/full"].p == pytest.approx(float(plain[top]), abs=1e-6)
    assert found["discard/full"].correct
    assert found["discard/full"].predicted == "ABCD"[model.layout.answer]
    assert found["discard/media"].p == pytest.approx(float(expected[top]), abs=1e-5)
    media, words = (
        len(at(model.layout, "video+audio")),
        len(at(model.layout, "non_option_question")),
    )
    token_layers = [found[spec.key].token_layers for spec in TABLE_4]
    full = n * N_LAYERS
    assert token_layers == [full, full - 4 * media, full - 4 * media - 2 * words]
    assert [found[spec.key].layers for spec in TABLE_4] == [(), (3,), (3, 5)]
    for intervention in found.values():
        assert intervention.prefill_s is not None
        assert 0 < intervention.prefill_s < 60


def test_what_only_a_correct_answer_calls_for_is_left_out_of_a_wrong_one(
    model: InMemory,
) -> None:
    specs = [replace(spec, correct_only=True) for spec in (TABLE_1[0], TABLE_4[1], PROBES[0])]
    assert [type(e) for e in run(mistaken(model), asking(*specs))] == [SampleDone]
    events = run(mistaken(model), asking(TABLE_1[0], TABLE_4[0], PROBES[0]))
    assert [type(e) for e in events] == [InterventionDone] * 2 + [ProbeDone, SampleDone]
    assert not any(e.correct or e.correct_base for e in done(events).values())


def test_a_failing_extra_is_a_failure_of_its_own(
    model: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no norms today")

    monkeypatch.setitem(probes._OF_INPUT, "norms", broken)
    wrong_kind = Pathway(
        name="strange", layout="interleaved", sources=("candidates",), targets=("last",)
    )
    specs = (
        MaskSpec(name="strange", pathways=(wrong_kind,), layers=(1,)),
        mask("too_high", "video_to_last", layers=(7, 8)),
        TABLE_1[0],
        discard("nobody", (1, "reference")),
        discard("everybody", (1, "last")),
        TABLE_4[1],
        replace(PROBES[0], layers=(0, N_LAYERS)),
        *PROBES[1:],
    )
    events = run(model, asking(*specs))
    failed = {e.curve: e for e in events if isinstance(e, UnitFailure)}
    assert {key: (e.stage, e.error, e.retryable) for key, e in failed.items()} == {
        "mask/strange": ("prepare", "LayoutError", False),
        "mask/too_high": ("replay", "ValueError", False),
        "discard/nobody": ("prepare", "LayoutError", False),
        "discard/everybody": ("discard", "ValueError", False),
        "probe/last_attention": ("probe", "ValueError", False),
        "probe/norms": ("probe", "RuntimeError", False),
    }
    fine = [e.curve for e in events if isinstance(e, InterventionDone | ProbeDone)]
    assert fine == ["mask/video_for_last", "discard/media", "probe/attention_map", "probe/sinks"]
    assert isinstance(events[-1], SampleDone)


def raising(error: type[Exception]) -> Any:
    def broken(*_: Any) -> Any:
        raise error("gone")

    return broken


def test_a_ruined_worker_raises(model: InMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes._OF_ATTENTION, "attention_map", raising(OSError))
    events = run(model, asking(*TABLE_4[:1], *PROBES))
    (lost,) = [e for e in events if isinstance(e, UnitFailure)]
    assert (lost.curve, lost.stage, lost.retryable) == ("probe/attention_map", "probe", True)
    monkeypatch.setitem(probes._OF_ATTENTION, "attention_map", raising(MemoryError))
    with pytest.raises(MemoryError):
        run(model, asking(*PROBES))
    monkeypatch.setattr(extras, "timed_prefill", raising(MemoryError))
    with pytest.raises(MemoryError):
        run(model, asking(*TABLE_4[:1]))


def positions_run(model: InMemory, spec: UnitSpec) -> tuple[list[Event], list[tuple[int, int]]]:
    """A unit's events, and (layer, positions) of every call of an official layer."""
    calls: list[tuple[int, int]] = []

    def noting(layer: int) -> Any:
        return lambda _module, args, _out: calls.append((layer, args[0][..., 0].numel()))

    with ExitStack() as hooks:
        for i, layer in enumerate(model.decoder.layers):
            hooks.callback(layer.register_forward_hook(noting(i)).remove)
        return run(model, spec), calls


def test_probes_take_no_pass_of_their_own_and_change_nothing(model: InMemory) -> None:
    work = (*TABLE_1, TABLE_4[1])
    curves = (curve("video_to_question"), curve("question_to_last"))
    without, plain_calls = positions_run(model, asking(*work, curves=curves))
    events, calls = positions_run(model, asking(*work, *PROBES, curves=curves))
    assert calls == plain_calls, "not a token-layer more"
    whole = model.layout.n_tokens
    assert calls[:N_LAYERS] == [(layer, whole) for layer in range(N_LAYERS)]
    assert [type(e) for e in events].count(ProbeDone) == len(PROBES)
    for mine, theirs in zip(
        [e for e in events if not isinstance(e, ProbeDone)], without, strict=True
    ):
        assert type(mine) is type(theirs)
        if isinstance(mine, CurveDone | InterventionDone | SampleDone):
            assert mine.p_options.tobytes() == theirs.p_options.tobytes()
            assert mine.p_base == theirs.p_base


@pytest.mark.parametrize("budget", [2**18, 2**30])
def test_the_token_layers_that_are_counted_are_those_that_are_run(
    model: InMemory, budget: int
) -> None:
    names = ("cross_frame", "video_to_question", "question_to_last", "video_to_last")
    spec = asking(*TABLE_1, *PROBES, curves=[curve(n) for n in names], byte_budget=budget)
    events, calls = positions_run(model, spec)
    assert isinstance(events[-1], SampleDone)
    assert events[-1].token_layers == sum(positions for _, positions in calls)


def test_a_unit_of_probes_alone_runs_one_pass(model: InMemory) -> None:
    events, calls = positions_run(model, asking(*PROBES))
    assert calls == [(layer, model.layout.n_tokens) for layer in range(N_LAYERS)]
    assert [type(e) for e in events] == [ProbeDone] * 4 + [SampleDone]
    assert events[-1].token_layers == N_LAYERS * model.layout.n_tokens


def test_seconds_of_probes_are_not_the_prefills(
    model: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probes._OF_ATTENTION["last_attention"]

    def slow(*seen: Any) -> Any:
        time.sleep(0.1)
        return real(*seen)

    monkeypatch.setitem(probes._OF_ATTENTION, "last_attention", slow)
    began = time.perf_counter()
    sample = run(model, asking(*PROBES))[-1]
    took = time.perf_counter() - began
    assert isinstance(sample, SampleDone)
    assert took > 0.1 * N_LAYERS
    assert sample.prefill_s < took - 0.1 * N_LAYERS


def test_the_work_of_masks_is_in_the_samples_cost(model: InMemory) -> None:
    without, with_masks = (run(model, asking(*specs))[-1] for specs in ((), TABLE_1))
    assert isinstance(without, SampleDone)
    assert isinstance(with_masks, SampleDone)
    assert with_masks.flops > with_masks.flops_lower_bound > without.flops_lower_bound
    assert with_masks.token_layers > without.token_layers
    strict = [replace(spec, correct_only=True) for spec in TABLE_1]
    wrong = run(mistaken(model), asking(*strict))[-1]
    assert isinstance(wrong, SampleDone)
    assert wrong.flops_lower_bound == without.flops_lower_bound
