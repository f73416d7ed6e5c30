"""What transformers lets pass silently: each trap is shown to bite, and to be closed.

Every test springs its trap first (the numbers do change), so that it would notice if the adapter
fell into it.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from salmonn import spec_of as salmonn_spec
from salmonn import tiny_checkpoint
from tiny_models import numbers, spec_of
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from avflow.datasets.media import MediaError, decode_sample
from avflow.datasets.testbed.samples import load as load_samples
from avflow.pathways.layout import LayoutError
from avflow.workers.models import load
from avflow.workers.models.base import Prepared, UnsupportedModelError, embed
from avflow.workers.models.conformance import Case, conformance
from avflow.workers.models.qwen2_5_omni_prompt import prepare
from avflow.workers.models.tiny import build_tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=3)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load(spec_of(checkpoint), "cpu")


@pytest.fixture(scope="module")
def prepared(model: Any, root: Path) -> Prepared:
    (sample,) = load_samples(root, seed=0, samples_per_task=1, tasks=("sight",))
    return model.prepare(sample, decode_sample(root, sample, model.media_spec))


def official_positions(model: Any, **changes: Any) -> torch.Tensor:
    """What the official forward computes by itself; None takes an argument away."""
    seen: list[torch.Tensor] = []
    hook = model.decoder.rotary.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])),
        with_kwargs=True,
    )
    inputs = {k: v for k, v in changes.items() if v is not None}
    with torch.no_grad():
        model.hf_model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("taken", ["attention_mask", "use_audio_in_video"])
def test_positions_never_miss_an_argument(model: Any, prepared: Prepared, taken: str) -> None:
    inputs = dict(model.official_inputs(prepared))
    right = official_positions(model, **inputs)
    sprung = official_positions(model, **inputs | {taken: None})
    assert sprung.shape != right.shape or not torch.equal(sprung, right), "the trap bites"
    assert torch.equal(embed(model, prepared).position_ids, right)


class Deaf:
    """A processor that does not heed the frame rate, and so assumes 2 a second."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, **arguments: Any) -> Any:
        arguments["videos_kwargs"].pop("fps")
        return self.processor(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def test_seconds_per_frame_pair_are_those_of_the_frames(model: Any, root: Path) -> None:
    (sample,) = load_samples(root, seed=0, samples_per_task=1, tasks=("sight",))
    media = decode_sample(root, sample, replace(model.media_spec, fps=4.0))
    told = prepare(model.maker, sample, media)
    assert told.tensors["video_second_per_grid"].tolist() == [0.5]
    deaf = replace(model.maker, processor=Deaf(model.maker.processor))
    with pytest.raises(MediaError, match=r"10 frame pairs of 1\.0 s, sampled were 10\.0 of 0\.5 s"):
        prepare(deaf, sample, media)


def test_a_sound_whose_positions_fall_on_frames_is_refused(
    model: Any, prepared: Prepared, root: Path
) -> None:
    """Processor and model cut a video into chunks separately; here by different lengths."""
    config = copy.deepcopy(model.maker.config)
    config.seconds_per_chunk = 2
    media = decode_sample(root, prepared.sample, model.media_spec)
    woven = prepare(replace(model.maker, config=config), prepared.sample, media)
    assert woven.tensors["input_ids"].shape == prepared.tensors["input_ids"].shape
    with pytest.raises(LayoutError, match="cut the video and its sound into different chunks"):
        embed(model, woven)


class Opening:
    """A processor that opens each prompt with a token of its own, as some tokenizers do."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, **arguments: Any) -> Any:
        batch = self.processor(**arguments)
        ids = batch["input_ids"]
        batch["input_ids"] = torch.cat([ids[:, :1], ids], dim=1)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def test_tokens_that_are_not_where_the_text_says_are_refused(
    model: Any, prepared: Prepared, root: Path
) -> None:
    opening = replace(model.maker, processor=Opening(model.maker.processor))
    media = decode_sample(root, prepared.sample, model.media_spec)
    with pytest.raises(LayoutError, match="reads the expanded prompt otherwise"):
        prepare(opening, prepared.sample, media)


@pytest.mark.parametrize("attention", ["flash_attention_2", "maskless", "sdpa_paged"])
def test_attentions_whose_masks_nobody_has_checked_are_refused(
    checkpoint: Path, attention: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention .* \(known: sdpa, eager\)"):
        load(spec_of(checkpoint, attention=attention), "cpu")


def test_the_towers_keep_their_own_attention_while_the_decoder_replays(
    model: Any, root: Path, prepared: Prepared
) -> None:
    config = model.hf_model.config
    seen: set[tuple[str, ...]] = set()

    def note(*_: Any) -> None:
        parts = (config.text_config, config.vision_config, config.audio_config)
        seen.add(tuple(part._attn_implementation for part in parts))

    hook = model.decoder.layers[1].register_forward_pre_hook(note)
    numbers(model, root, prepared.sample)
    hook.remove()
    replaying = {decoder for decoder, _, _ in seen} - {"sdpa"}
    assert replaying, "the decoder's is changed for replays"
    for name in replaying:
        assert name in ALL_MASK_ATTENTION_FUNCTIONS, "without a mask function there is no mask"
        dispatched = [word for word in ("flash", "sdpa", "flex_attention", "/") if word in name]
        assert not dispatched, "transformers takes such names for its own, or the hub's"
    assert {(vision, audio) for _, vision, audio in seen} == {("sdpa", "sdpa")}
    note()
    assert config.text_config._attn_implementation == "sdpa", "and put back"


def test_no_state_is_read_or_left_between_prompts(model: Any, prepared: Prepared) -> None:
    hf = model.hf_model
    right = embed(model, prepared).position_ids
    inputs = model.official_inputs(prepared)
    with torch.no_grad():
        hf.generate(**inputs, max_new_tokens=2)
    assert hf.model.rope_deltas is not None, "the trap is set"
    assert torch.equal(embed(model, prepared).position_ids, right)
    hf.model.rope_deltas = torch.tensor([[1000]])
    assert torch.equal(embed(model, prepared).position_ids, right)


@pytest.fixture(params=["generate", "train"])
def salmonn(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    folder = tiny_checkpoint(tmp_path / "salmonn")
    return load(salmonn_spec(folder, positions=request.param), "cpu")


def test_video_salmonn_passes_what_every_adapter_must(salmonn: Any, root: Path) -> None:
    samples = load_samples(root, seed=0, samples_per_task=1, tasks=("sight", "match_image"))
    cases = [Case(sample=s, media=decode_sample(root, s, salmonn.media_spec)) for s in samples]
    results = {(c.name, c.sample): c for c in conformance(salmonn, cases)}
    assert [c for c in results.values() if c.result == "failed"] == []
    refused = results["prompt", samples[1].sample_id]
    assert refused.result == "refused"
    assert "takes one video" in refused.reason
