"""The suite that every adapter passes: on one that is right, and on ones that are made wrong."""

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import spec_of
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from avflow.datasets.media import MediaError, decode_sample
from avflow.datasets.testbed.samples import load as load_samples
from avflow.workers.models import conformance_run, load
from avflow.workers.models.base import Embedded, Features, Prepared
from avflow.workers.models.conformance import Case, Check, conformance
from avflow.workers.models.qwen2_5_omni import QwenOmni
from avflow.workers.models.tiny import build_tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def model() -> Any:
    return load(spec_of("testbed"), "cpu")


def cases_of(model: Any, root: Path, *tasks: str) -> list[Case]:
    samples = load_samples(root, seed=0, samples_per_task=1, tasks=tasks)
    return [Case(sample=s, media=decode_sample(root, s, model.media_spec)) for s in samples]


@pytest.fixture
def clip(model: Any, root: Path) -> list[Case]:
    return cases_of(model, root, "sight")


def made(wrong: type[QwenOmni], model: QwenOmni) -> Any:
    return wrong(**{field.name: getattr(model, field.name) for field in fields(model)})


def failed(model: Any, cases: Sequence[Case]) -> dict[str, str]:
    return {c.name: c.reason for c in conformance(model, cases) if c.result == "failed"}


@pytest.mark.parametrize(
    ("dtype", "attention"), [("float32", "sdpa"), ("bfloat16", "sdpa"), ("float32", "eager")]
)
@pytest.mark.parametrize("path", ["testbed", "random"])
def test_the_shipped_and_a_random_checkpoint_pass(
    root: Path, tmp_path: Path, path: str, dtype: str, attention: str
) -> None:
    folder = build_tiny_checkpoint(tmp_path / "omni", n_layers=3) if path == "random" else path
    loaded = load(spec_of(folder, dtype=dtype, attention=attention), "cpu")
    checks = list(conformance(loaded, cases_of(loaded, root, "sight", "match_image")))
    assert [c for c in checks if c.result not in ("passed", "skipped")] == []
    skipped = {c.name for c in checks if c.result == "skipped"}
    form = "answers in the form that is counted"  # random weights answer with no letter
    assert skipped == ({form} if path == "random" else set())
    of_each = [c.name for c in checks if c.sample and c.sample.startswith("match_image")]
    assert len(of_each) == len(set(of_each)) == 9
    reasons = {c.reason for c in checks if c.name == "prompt"}
    assert any("media: image, image, image, image, audio" in reason for reason in reasons)
    assert all(c.reason for c in checks)


def test_a_model_over_two_devices_passes(root: Path, tmp_path: Path) -> None:
    loaded = load(spec_of(build_tiny_checkpoint(tmp_path / "o", n_layers=4)), "cpu", "disk")
    checks = conformance(loaded, cases_of(loaded, root, "sight"))
    assert [c for c in checks if c.result not in ("passed", "skipped")] == []


class DeafPositions(QwenOmni):
    """Leaves out `use_audio_in_video`, as transformers lets one do without a word."""

    def embed(self, prepared: Prepared, features: Features) -> Embedded:
        hf: Any = self.hf_model
        inputs = prepared.tensors
        positions, _ = hf.get_rope_index(
            inputs["input_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            attention_mask=inputs["attention_mask"],
            audio_seqlens=inputs["feature_attention_mask"].sum(dim=1),
            second_per_grids=inputs["video_second_per_grid"],
        )
        return replace(super().embed(prepared, features), position_ids=positions)


class WideLetters(QwenOmni):
    """Takes the token before an option for a part of its letter."""

    def prepare(self, *arguments: Any) -> Prepared:
        prepared = super().prepare(*arguments)
        segments = list(prepared.layout.segments)
        for i, segment in enumerate(segments):
            if segment.kind == "option_letter" and segment.index == 0:
                segments[i - 1] = replace(segments[i - 1], stop=segment.start - 1)
                segments[i] = replace(segment, start=segment.start - 1)
        return replace(prepared, layout=replace(prepared.layout, segments=tuple(segments)))


class Blind(QwenOmni):
    """Puts nothing in the places of the frames."""

    def encode(self, prepared: Prepared) -> Features:
        features = super().encode(prepared)
        video = torch.zeros_like(features.tensors["video"])
        return Features(tensors={**features.tensors, "video": video})


class Crashing(QwenOmni):
    """Has no encoder for what it takes."""

    def encode(self, prepared: Prepared) -> Features:
        raise KeyError("no such tower")


_CALLS: list[int] = []


class Drifting(QwenOmni):
    """Keeps something between prompts."""

    def embed(self, prepared: Prepared, features: Features) -> Embedded:
        _CALLS.append(1)
        embedded = super().embed(prepared, features)
        drift = 1e-3 * len(_CALLS)
        return replace(embedded, inputs_embeds=embedded.inputs_embeds + drift)


class OtherLetters(QwenOmni):
    """Counts tokens that the model does not answer with."""

    def prepare(self, *arguments: Any) -> Prepared:
        prepared = super().prepare(*arguments)
        return replace(prepared, option_tokens=tuple(t + 10 for t in prepared.option_tokens))


@pytest.mark.parametrize(
    ("wrong", "check", "reason"),
    [
        (DeafPositions, "layer loop equals forward", "tokens other positions"),
        (WideLetters, "token groups cover the prompt", "option_letter:A is the token"),
        (Blind, "layer loop equals forward", "output is up to"),
        (Blind, "blocking nothing equals forward", "probabilities at most"),
        (Blind, "first token equals generate's", "generate says"),
        (Crashing, "run", "no such tower"),
        (Drifting, "same bits again", "other bits"),
        (OtherLetters, "answers in the form that is counted", "the model answers 'A'; counted is"),
    ],
)
def test_an_adapter_that_is_wrong_fails_where_it_is_wrong(
    model: Any, clip: list[Case], wrong: type[QwenOmni], check: str, reason: str
) -> None:
    found = failed(made(wrong, model), clip)
    assert check in found, found
    assert reason in found[check]


def test_a_layer_that_reads_past_its_attention_is_found(model: Any, clip: list[Case]) -> None:
    """As a state-space layer does: what is blocked from attention still comes through."""
    hook = model.decoder.layers[2].register_forward_hook(
        lambda _module, _args, out: out + 0.3 * out.roll(1, dims=1)
    )
    try:
        found = failed(model, clip)
    finally:
        hook.remove()
    assert "apart" in found["engine equals reference"]


def test_knockouts_that_reach_no_layer_are_found(model: Any, clip: list[Case]) -> None:
    """A config that is not the layers' own: what the engine sets there has no effect."""
    config = copy.deepcopy(model.decoder.config)
    other = made(QwenOmni, model)
    object.__setattr__(other, "decoder", replace(model.decoder, config=config))
    assert failed(other, clip)


def test_an_engine_that_blocks_nothing_is_found(
    model: Any, clip: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model is sure of this answer: its probability alone would not tell."""
    real = conformance_run.through_run_unit

    def blocking_nothing(*arguments: Any) -> Any:
        curves, done = real(*arguments)
        same = np.tile(done.p_options, (len(curves["something"].center_layer), 1))
        return curves | {"something": replace(curves["something"], p_options=same)}, done

    monkeypatch.setattr(conformance_run, "through_run_unit", blocking_nothing)
    assert "engine equals reference" in failed(model, clip)


def test_an_answer_that_changes_and_is_wrong_all_the_same_is_found(
    model: Any, clip: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conformance_run.through_run_unit

    def a_little_off(*arguments: Any) -> Any:
        curves, done = real(*arguments)
        close = curves["everything"].p_options * 0.7
        return curves | {"everything": replace(curves["everything"], p_options=close)}, done

    monkeypatch.setattr(conformance_run, "through_run_unit", a_little_off)
    found = failed(model, clip)
    assert "apart" in found["blocking all before last changes it"]
    assert "engine equals reference" not in found


def test_what_a_checkpoints_generation_config_asks_for_is_named_and_switched_off(
    model: Any, clip: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suppressed tokens are all that this model answers with: left on, it would say another."""
    letters = list(model.prepare(clip[0].sample, clip[0].media).option_tokens)
    shipped = model.hf_model.generation_config
    monkeypatch.setattr(shipped, "repetition_penalty", 1.05)
    monkeypatch.setattr(shipped, "suppress_tokens", letters)
    (check,) = [c for c in conformance(model, clip) if c.name.startswith("first token")]
    assert check.result == "passed"
    named = f"asks for repetition_penalty=1.05, suppress_tokens={letters}, which is switched off"
    assert named in check.reason
    assert model.hf_model.generation_config is shipped
    said = model.hf_model.generate(
        **model.official_inputs(model.prepare(clip[0].sample, clip[0].media)), max_new_tokens=1
    )
    assert int(said[0, -1]) not in letters, "on, they do change the token"


def test_an_attention_without_its_mask_function_is_found(
    model: Any, clip: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    AttentionInterface.register("maskless", sdpa_attention_forward)
    monkeypatch.setattr(model.decoder.config, "_attn_implementation", "maskless")
    maskless = made(QwenOmni, model)
    found = failed(maskless, clip)["attention functions"]
    assert "the decoder runs maskless, asked for was sdpa" in found
    object.__setattr__(maskless, "spec", replace(model.spec, attention="maskless"))
    assert "no mask function" in failed(maskless, clip)["attention functions"]


def outcome(checks: Sequence[Check], name: str) -> str:
    return next(c.result for c in checks if c.name == name)


@pytest.mark.parametrize(
    ("error", "result"), [(MediaError("takes no video"), "refused"), (KeyError("video"), "failed")]
)
def test_refusing_by_name_is_no_failure_but_taking_nothing_is(
    model: Any, clip: list[Case], error: Exception, result: str
) -> None:
    class Refusing(QwenOmni):
        def prepare(self, *_arguments: Any) -> Prepared:
            raise error

    checks = list(conformance(made(Refusing, model), clip))
    assert outcome(checks, "prompt") == result
    assert outcome(checks, "takes some prompt") == "failed"


def test_a_model_without_generate_is_not_asked_for_its_first_token(
    model: Any, clip: list[Case]
) -> None:
    class Bare:
        """The official model, all of it but `generate`."""

        def __call__(self, **inputs: Any) -> Any:
            return model.hf_model(**inputs)

        def __getattr__(self, name: str) -> Any:
            if name == "generate":
                raise AttributeError(name)
            return getattr(model.hf_model, name)

    bare = made(QwenOmni, model)
    object.__setattr__(bare, "hf_model", Bare())
    checks = list(conformance(bare, clip))
    assert outcome(checks, "first token equals generate's") == "skipped"
    assert outcome(checks, "engine equals reference") == "passed"
