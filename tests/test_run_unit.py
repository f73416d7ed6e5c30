"""A unit's stream of events, on a model in memory whose prompt is laid out by hand."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_ways import reference_inputs
from unit_runs import BUDGET, EVERY_CURVE, N_LAYERS, curve, curves_of, unit

from avflow.datasets.sample import Sample
from avflow.pathways import catalogue
from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.pathways.pathway import Pathway
from avflow.pathways.windows import window_layers
from avflow.workers import batches
from avflow.workers.engine import reference
from avflow.workers.failing import failure
from avflow.workers.models.base import Features, Prepared
from avflow.workers.protocol import CurveDone, CurveSpec, Event, SampleDone, UnitFailure, UnitSpec
from avflow.workers.run_unit import group_spans, run_unit

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A LoadedModel whose prompt does not come from a processor."""

    decoder: Any
    hf_model: Any
    info: Any
    layout: Layout
    embedded: Any
    option_tokens: tuple[int, ...]
    device: Any = CPU
    spec: Any = None
    media_spec: Any = None

    def prepare(self, sample: Sample, media: Sequence[object]) -> Prepared:
        return Prepared(
            sample=sample,
            tensors={},
            layout=self.layout,
            option_tokens=self.option_tokens,
            prompt="",
            offsets=torch.zeros(self.layout.n_tokens, 2, dtype=torch.int64),
        )

    def encode(self, prepared: Prepared) -> Features:
        return Features(tensors={})

    def embed(self, prepared: Prepared, features: Features) -> Any:
        return self.embedded

    def token_text(self, token: int) -> str:
        return {token: " ABCD"[i + 1] for i, token in enumerate(self.option_tokens)}.get(token, "?")


@pytest.fixture
def model(tiny_thinker, random_layout, random_embedded) -> InMemory:
    """Its answer is what the model predicts, so the baseline is right."""
    torch.set_num_threads(1)
    tiny = tiny_thinker()
    layout = random_layout("single_video", 110, 1)
    embedded = random_embedded(layout, tiny, 1)
    inputs = reference_inputs(embedded)
    top = int(reference.plain_probabilities(tiny.hf_model, inputs).argmax())
    others = [token for token in (3, 5, 7, 9) if token != top][:3]
    tokens = [*others[: layout.answer], top, *others[layout.answer :]]
    return InMemory(
        decoder=tiny.decoder,
        hf_model=tiny.hf_model,
        info=tiny.info,
        layout=layout,
        embedded=embedded,
        option_tokens=tuple(tokens),
    )


def mistaken(model: InMemory) -> InMemory:
    """The same model, with an answer that it does not give."""
    other = (model.layout.answer + 1) % 4
    return replace(model, layout=replace(model.layout, answer=other))


def run(model: InMemory, spec: UnitSpec) -> list[Event]:
    return list(run_unit(model, spec, (), decode_s=0.25))


def test_every_curve_once_and_the_sample_last(model: InMemory) -> None:
    events = run(model, unit(EVERY_CURVE))
    assert isinstance(events[-1], SampleDone)
    assert all(isinstance(event, CurveDone) for event in events[:-1])
    assert sorted(e.curve for e in events[:-1]) == sorted(c.key for c in EVERY_CURVE)
    sample = events[-1]
    letter = "ABCD"[model.layout.answer]
    assert (sample.correct, sample.predicted, sample.answer) == (True, letter, letter)
    for done in curves_of(events).values():
        assert done.center_layer.tolist() == list(range(N_LAYERS))
        assert done.p_options.shape == (N_LAYERS, 4)
        assert done.p_base == pytest.approx(sample.p_base, abs=1e-6)
        assert done.base_token == sample.base_token
        assert done.answer_token == model.option_tokens[model.layout.answer]
        assert done.correct_base
        np.testing.assert_array_equal(done.p_knockout, done.p_options[:, model.layout.answer])


def test_numbers_are_the_references(model: InMemory) -> None:
    inputs = reference_inputs(model.embedded)
    events = run(model, unit(EVERY_CURVE))
    done = curves_of(events)["audio_to_question/k3/letter"]
    ends = [group_positions(model.layout, name).tolist() for name in ("audio", "question")]
    edges = reference.edges_between(model.layout.n_tokens, ends[0], ends[1])
    for center in range(N_LAYERS):
        expected = reference.knockout_probabilities(model.hf_model, inputs, edges, center, 3)
        token = int(done.knockout_token[center])
        assert token == int(expected.argmax())
        assert done.p_knockout[center] == pytest.approx(float(expected[done.base_token]), abs=1e-5)
        options = expected[list(model.option_tokens)].double().numpy()
        np.testing.assert_allclose(done.p_options[center], options, atol=1e-5)
        n_layers = len(window_layers(center, 3, N_LAYERS))
        assert done.n_blocked_edges[center] == int(edges.sum()) * n_layers
    base = reference.plain_probabilities(model.hf_model, inputs)
    assert done.p_base == pytest.approx(float(base.max()), abs=1e-6)


def test_what_is_wanted_changes_no_bit(model: InMemory) -> None:
    whole = curves_of(run(model, unit(EVERY_CURVE)))
    for wanted in (
        {"video_to_question/k3/letter"},
        {"cross_frame/k3/letter", "video_to_last/k3/letter"},
    ):
        again = curves_of(run(model, unit(EVERY_CURVE, wanted)))
        assert set(again) == wanted
        for key in wanted:
            for name in ("p_knockout", "p_options", "knockout_token", "n_blocked_edges"):
                a, b = getattr(whole[key], name), getattr(again[key], name)
                assert a.tobytes() == b.tobytes()
                assert a.dtype == b.dtype


def test_curves_that_span_batches_come_out_whole_and_in_order(model: InMemory) -> None:
    whole = curves_of(run(model, unit(EVERY_CURVE)))
    cut = curves_of(run(model, unit(EVERY_CURVE, byte_budget=2**18)))
    assert set(cut) == set(whole)
    for key, done in cut.items():
        np.testing.assert_allclose(done.p_options, whole[key].p_options, atol=1e-6)


def test_a_wrong_baseline_leaves_out_what_asks_for_a_correct_one(model: InMemory) -> None:
    wrong = mistaken(model)
    only = run(wrong, unit(EVERY_CURVE))
    assert [type(event) for event in only] == [SampleDone]
    assert not only[0].correct
    assert only[0].token_layers == N_LAYERS * wrong.layout.n_tokens
    spec = unit((curve("video_to_last"), curve("audio_to_last", correct_only=False)))
    events = run(wrong, spec)
    assert [type(event) for event in events] == [CurveDone, SampleDone]
    assert events[0].curve == "audio_to_last/k3/letter"
    assert not events[0].correct_base


def test_a_pathway_that_blocks_nothing_is_the_baseline_exactly(model: InMemory) -> None:
    backwards = Pathway(
        name="last_to_video", layout="single_video", sources=("last",), targets=("video",)
    )
    spec = CurveSpec(pathway=backwards, window=3, center_layers=(0, 4))
    events = run(model, unit((spec,)))
    done, sample = events
    assert done.p_knockout.tolist() == [sample.p_base] * 2
    assert done.p_options.tolist() == [sample.p_options.tolist()] * 2
    assert done.knockout_token.tolist() == [sample.base_token] * 2
    assert done.n_blocked_edges.tolist() == [0, 0]
    assert sample.replay_s == 0


def test_a_group_that_is_missing_costs_its_own_curve_alone(model: InMemory) -> None:
    reading = catalogue.find("question_to_reference")[0]  # of interleaved prompts
    lost = CurveSpec(pathway=reading, window=3, center_layers=(0, 1))
    wide = curve("video_to_last", window=99)
    events = run(model, unit((lost, wide, curve("audio_to_last"))))
    assert [type(e) for e in events] == [UnitFailure, UnitFailure, CurveDone, SampleDone]
    missing, too_wide = events[:2]
    assert (missing.curve, missing.stage, missing.error) == (lost.key, "prepare", "LayoutError")
    assert "no group 'reference'" in missing.message
    assert not missing.retryable
    assert "window of 99 layers" in too_wide.message
    quiet = run(model, unit((lost, curve("audio_to_last")), {"audio_to_last/k3/letter"}))
    assert [type(e) for e in quiet] == [CurveDone, SampleDone]


def test_a_sample_that_cannot_be_prepared_is_one_failure_with_its_causes(model: InMemory) -> None:
    class Broken(InMemory):
        def embed(self, prepared: Prepared, features: Features) -> Any:
            try:
                raise OSError("the wire was cut")
            except OSError as error:
                raise LayoutError("no place for 3 frames") from error

    broken = Broken(**{name: getattr(model, name) for name in model.__dataclass_fields__})
    (event,) = run(broken, unit(EVERY_CURVE))
    assert (event.curve, event.stage, event.error) == (None, "encode", "LayoutError")
    assert event.message == "no place for 3 frames"
    assert "the wire was cut" in event.traceback
    assert "direct cause" in event.traceback
    assert not event.retryable
    assert failure("u", None, "encode", OSError("disk")).retryable


def test_an_unknown_wanted_curve_is_refused(model: InMemory) -> None:
    (event,) = run(model, unit(EVERY_CURVE, {"video_to_lost/k3/letter"}))
    assert isinstance(event, UnitFailure)
    assert "video_to_lost/k3/letter" in event.message


def test_memory_that_runs_out_halves_the_batch(
    model: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator is the one thing that can't be made to fail for real on any machine."""
    most, real = 7, batches.replay

    def replay_of_a_small_device(decoder, baseline, trunk, batch, tokens):
        if len(batch.rows) > most:
            raise torch.OutOfMemoryError(f"{len(batch.rows)} rows are too many")
        return real(decoder, baseline, trunk, batch, tokens)

    spec = unit((curve("video_to_question"), curve("audio_to_question")))
    whole = run(model, spec)
    monkeypatch.setattr(batches, "replay", replay_of_a_small_device)
    events = run(model, spec)
    assert events[-1].split_batches == 3  # 16 rows -> 8 + 8 -> four times 4
    assert whole[-1].split_batches == 0
    for key, done in curves_of(whole).items():
        np.testing.assert_allclose(curves_of(events)[key].p_options, done.p_options, atol=1e-6)
    most = 0
    lost = run(model, spec)
    assert [type(e) for e in lost] == [UnitFailure, UnitFailure, SampleDone]
    assert all(e.retryable and e.stage == "replay" for e in lost[:2])


@pytest.mark.parametrize("budget", [BUDGET, 2**18])
def test_a_device_with_less_room_than_planned_splits_and_counts(
    model: InMemory, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Batches of a group hand their trunk on, whether or not they are cut. These random weights
    magnify last bits: one answer in hundreds, of p = 0.22, moves by 1.2e-6."""
    spec = unit(EVERY_CURVE, byte_budget=budget)
    whole = run(model, spec)
    monkeypatch.setattr(batches.BatchRunner, "_fits", lambda _self, batch: len(batch.rows) <= 3)
    events = run(model, spec)
    assert whole[-1].split_batches == 0 < events[-1].split_batches
    for key, done in curves_of(whole).items():
        np.testing.assert_allclose(curves_of(events)[key].p_options, done.p_options, atol=3e-6)
    assert events[-1].token_layers > whole[-1].token_layers


@pytest.mark.parametrize("error", [MemoryError, torch.AcceleratorError])
def test_what_ruins_the_worker_is_raised(
    model: InMemory, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(*_arguments: object) -> None:
        raise error("device-side assert triggered")

    monkeypatch.setattr(batches, "replay", broken)
    with pytest.raises(error):
        run(model, unit(EVERY_CURVE))


def test_a_batch_that_fails_costs_its_curves_alone(
    model: InMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batches.replay

    def fails_late(decoder, baseline, trunk, batch, tokens):
        if batch.start == batch.layout.n_tokens - 1:
            raise ValueError("not this one")
        return real(decoder, baseline, trunk, batch, tokens)

    monkeypatch.setattr(batches, "replay", fails_late)
    events = run(model, unit((curve("video_to_question"), curve("video_to_last"))))
    assert [type(e) for e in events] == [UnitFailure, CurveDone, SampleDone]
    assert events[0].curve == "video_to_last/k3/letter"


def test_costs_and_spans_of_the_sample(model: InMemory) -> None:
    sample = run(model, unit(EVERY_CURVE))[-1]
    assert sample.decode_s == 0.25
    assert min(sample.encode_s, sample.prefill_s, sample.replay_s) > 0
    n_tokens, n_rows = model.layout.n_tokens, len(EVERY_CURVE) * N_LAYERS
    assert sample.token_layers < n_rows * N_LAYERS * n_tokens / 2  # less than half the plain way
    assert 0 < sample.flops_lower_bound < sample.flops
    assert sample.peak_bytes > 2**20
    spans = group_spans(model.layout)
    assert sample.group_spans == spans
    assert spans["last"] == [[n_tokens - 1, n_tokens]]
    for name, held in spans.items():
        positions = [p for start, stop in held for p in range(start, stop)]
        assert positions == group_positions(model.layout, name).tolist()


def test_a_letter_in_a_form_that_is_not_counted_is_noted(model: InMemory) -> None:
    class Spaced(InMemory):
        def token_text(self, token: int) -> str:
            return f" {'ABCD'[self.layout.answer]}" if token == top else "B"

    top = model.option_tokens[model.layout.answer]
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    fields["option_tokens"] = tuple(190 + i for i in range(4))
    sample = run(Spaced(**fields), unit((curve("video_to_last"),)))[-1]
    assert not sample.correct
    assert len(sample.notes) == 1
    assert "what counts is" in sample.notes[0]
    assert run(model, unit((curve("video_to_last"),)))[-1].notes == ()


def test_events_travel_without_torch(model: InMemory) -> None:
    events = run(model, unit((curve("video_to_last"),)))
    for event in events:
        data = pickle.dumps(event)
        assert b"torch" not in data
        assert type(pickle.loads(data)) is type(event)
