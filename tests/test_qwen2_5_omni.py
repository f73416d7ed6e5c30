"""The Qwen2.5-Omni adapter on a random checkpoint: from files to the official model's inputs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_models import edit_config, spec_of

from avflow.datasets.media import MediaError, decode_sample
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaPart, MediaRole, Part, Sample, TextPart
from avflow.datasets.testbed.render import render_clip, render_image, render_sound
from avflow.datasets.testbed.world import Scene
from avflow.pathways.groups import group_positions, members, positions
from avflow.pathways.layout import LayoutError
from avflow.pathways.pathway import Pathway, blocked_segments, causal_blocked_edges
from avflow.workers.inspect import dump, edges_rows, layout_rows
from avflow.workers.models import load
from avflow.workers.models.base import (
    LoadedModel,
    ModelSpec,
    Prepared,
    embed,
)
from avflow.workers.models.tiny import build_tiny_checkpoint

SECONDS = 5
QUESTION = multiple_choice(
    "Which colour is shown?\n", ["red", "green", "blue"], closing="The best answer is:"
)
CLIP = MediaPart(kind="video", path="clip.mp4", with_audio=True)
SILENT = MediaPart(kind="video", path="clip.mp4")


def image(number: int, role: MediaRole = "candidate") -> MediaPart:
    return MediaPart(kind="image", path=f"{number}.png", role=role, index=number)


def sound(number: int, role: MediaRole = "candidate") -> MediaPart:
    return MediaPart(kind="audio", path=f"{number}.wav", role=role, index=number)


def sample_of(*parts: Part, interleaved: bool = False) -> Sample:
    return Sample(
        sample_id="s1",
        dataset="d",
        task="t",
        category="c",
        layout="interleaved" if interleaved else "single_video",
        parts=parts,
        answer=1,
        media_group="g",
        correct_candidate=1 if interleaved else None,
    )


SAMPLES = {
    "video with its sound": sample_of(CLIP, *QUESTION),
    "silent video": sample_of(SILENT, *QUESTION),
    "sound alone": sample_of(MediaPart(kind="audio", path="clip.mp4"), *QUESTION),
    "video beside another sound": sample_of(SILENT, sound(0, "clip"), *QUESTION),
    "question before the clip": sample_of(QUESTION[0], CLIP, *QUESTION[1:]),
    "images and a reference sound": sample_of(
        TextPart(role="other", text="1."),
        image(0),
        TextPart(role="other", text="2."),
        image(1),
        QUESTION[0],
        sound(2, "reference"),
        *QUESTION[1:],
        interleaved=True,
    ),
    "sounds and a reference image": sample_of(
        QUESTION[0], image(2, "reference"), sound(0), sound(1), *QUESTION[1:], interleaved=True
    ),
    "videos with sound and a reference sound": sample_of(
        replace(CLIP, role="candidate", index=0),
        replace(CLIP, path="short.mp4", role="candidate", index=1),
        *QUESTION[:1],
        sound(0, "reference"),
        *QUESTION[1:],
        interleaved=True,
    ),
}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    for name, seconds in (("clip", SECONDS), ("short", 2), ("long", 8)):
        classes = tuple(range(seconds))
        render_clip(Scene(colours=classes, sounds=classes, seed=0), root / f"{name}.mp4")
    for number in range(3):
        render_image(number, 0, root / f"{number}.png")
        render_sound(number, 0, root / f"{number}.wav")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=4)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Callable[..., LoadedModel]:
    cache: dict[ModelSpec, LoadedModel] = {}

    def build(**changes: Any) -> LoadedModel:
        spec = spec_of(checkpoint, **changes)
        if spec not in cache:
            cache[spec] = load(spec, "cpu")
        return cache[spec]

    return build


def prepared_of(model: LoadedModel, root: Path, sample: Sample) -> Prepared:
    return model.prepare(sample, decode_sample(root, sample, model.media_spec))


def official(model: LoadedModel, prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and positions of the unmodified forward on the processor's outputs."""
    seen: dict[str, torch.Tensor] = {}
    hf: Any = model.hf_model
    text = getattr(hf.model, "language_model", hf.model)
    hook = text.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(positions=kwargs["position_ids"]),
        with_kwargs=True,
    )
    hears = any(part.with_audio for part in prepared.sample.media)
    with torch.no_grad():
        logits = hf(**prepared.tensors, use_audio_in_video=hears).logits
    hook.remove()
    return logits, seen["positions"]


@torch.no_grad()
def by_layers(model: LoadedModel, prepared: Prepared) -> torch.Tensor:
    """Logits from `embed` and the decoder's pieces."""
    embedded, decoder = embed(model, prepared), model.decoder
    hidden = embedded.inputs_embeds
    rotary = decoder.rotary(hidden, embedded.position_ids)
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    logits: torch.Tensor = decoder.lm_head(decoder.norm(hidden))
    return logits


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_and_layers_equal_the_official_forward(
    loaded: Callable[..., LoadedModel], media: Path, name: str, dtype: str
) -> None:
    model = loaded(dtype=dtype)
    prepared = prepared_of(model, media, SAMPLES[name])
    logits, positions = official(model, prepared)
    embedded = embed(model, prepared)
    assert torch.equal(embedded.position_ids, positions)
    assert embedded.position_ids.shape == (3, 1, prepared.layout.n_tokens)
    assert embedded.inputs_embeds.dtype == getattr(torch, dtype)
    assert (by_layers(model, prepared) - logits).abs().max() == 0


def test_what_came_before_leaves_no_trace(loaded: Callable[..., LoadedModel], media: Path) -> None:
    model = loaded()
    one, other = (prepared_of(model, media, SAMPLES[n]) for n in list(SAMPLES)[:2])
    first = embed(model, one)
    official(model, other)  # leaves rope_deltas behind
    again = embed(model, prepared_of(model, media, one.sample))
    assert torch.equal(first.inputs_embeds, again.inputs_embeds)
    assert torch.equal(first.position_ids, again.position_ids)


def test_a_clip_is_laid_out_second_by_second(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    prepared = prepared_of(loaded(), media, SAMPLES["video with its sound"])
    layout = prepared.layout
    clip = [s for s in layout.segments if s.kind in ("frame", "audio_chunk")]
    assert [s.name for s in clip] == [
        f"{kind}:{second}" for second in range(SECONDS) for kind in ("frame", "audio_chunk")
    ]
    assert [s.stop - s.start for s in clip] == [4, 5] * SECONDS
    ids = prepared.tensors["input_ids"][0]
    config: Any = loaded().hf_model.config
    for group, token in (("video", config.video_token_id), ("audio", config.audio_token_id)):
        where = torch.nonzero(ids == token)[:, 0].tolist()
        assert group_positions(layout, group).tolist() == where
    rows = {row.segment: row for row in layout_rows(prepared)}
    assert rows["system"].text.startswith("<|im_start|>system\nYou are a helpful assistant")
    assert rows["option_letter:B"].text == "B"
    assert rows["option_text:B"].text == ". green\n"
    assert rows["option_letter:B"].groups == ("question", "true_option")


@pytest.mark.parametrize(("fps", "rows"), [(4, 10), (8, 20), (1, 2)])
def test_frames_and_chunks_follow_the_true_frame_rate(
    loaded: Callable[..., LoadedModel], media: Path, fps: float, rows: int
) -> None:
    model = loaded(fps=fps)
    prepared = prepared_of(model, media, SAMPLES["video with its sound"])
    frames = [positions(prepared.layout, m) for m in members(prepared.layout, "video")]
    assert [len(frame) for frame in frames] == [4] * rows
    positions_of_all = embed(model, prepared).position_ids
    assert torch.equal(positions_of_all, official(model, prepared)[1])
    times = positions_of_all[0, 0]
    step = 2 / fps * 5  # seconds of a pair times positions a second
    for i, frame in enumerate(frames):
        assert {int(t) - int(times[frames[0][0]]) for t in times[frame]} == {int(i * step)}
    heard = [len(positions(prepared.layout, m)) for m in members(prepared.layout, "audio")]
    assert heard == [5] * SECONDS


def test_a_long_video_keeps_its_clock_when_frames_are_few(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    model = loaded(max_frames=4)
    sample = sample_of(replace(CLIP, path="long.mp4"), *QUESTION)
    prepared = prepared_of(model, media, sample)
    assert prepared.tensors["video_second_per_grid"].tolist() == [4.0]
    one, two = (positions(prepared.layout, m) for m in members(prepared.layout, "video"))
    times = embed(model, prepared).position_ids[0, 0]
    assert (times[two] - times[one]).tolist() == [4 * 5] * 4


def test_option_tokens_are_what_follows_the_prompt(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    model: Any = loaded()
    prepared = prepared_of(model, media, SAMPLES["images and a reference sound"])
    tokenizer = model.maker.processor.tokenizer
    for letter, token in zip("ABC", prepared.option_tokens, strict=True):
        ids = tokenizer(prepared.prompt + letter)["input_ids"]
        assert ids == [*prepared.tensors["input_ids"][0].tolist(), token]


@pytest.mark.parametrize(("ending", "lead"), [("\n", ""), (":", " ")])
def test_the_letter_that_is_read_has_the_form_that_the_template_asks_for(
    media: Path, tmp_path: Path, ending: str, lead: str
) -> None:
    """After a line's end "B", after a word " B", which is another token."""
    words = ["user assistant: A", "assistant: B", "assistant: C", "A. B. C."]
    folder = build_tiny_checkpoint(tmp_path / "omni", n_layers=1, corpus=words)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", f"assistant{ending}"))
    model = load(spec_of(folder), "cpu")
    prepared = prepared_of(model, media, SAMPLES["silent video"])
    assert prepared.prompt.endswith(f"assistant{ending}")
    assert [model.token_text(t) for t in prepared.option_tokens] == [f"{lead}{x}" for x in "ABC"]


def test_the_system_prompt_is_the_specs(loaded: Callable[..., LoadedModel], media: Path) -> None:
    sample = SAMPLES["video with its sound"]
    default, other = (
        prepared_of(loaded(**kw), media, sample) for kw in ({}, {"system_prompt": "Look."})
    )
    assert default.prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert other.prompt.startswith("<|im_start|>system\nLook.<|im_end|>\n")


def test_attention_is_chosen_for_the_decoder_alone(loaded: Callable[..., LoadedModel]) -> None:
    config: Any = loaded(attention="eager").hf_model.config
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"
    assert config.audio_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((SILENT, CLIP), MediaError, "of all videos of a prompt or of none"),
        ((replace(CLIP, path="long.mp4"), CLIP), MediaError, "takes one rate a prompt"),
        ((MediaPart(kind="audio", path="click.wav"),), MediaError, "too short to give a token"),
        ((CLIP, TextPart(role="question", text="<|AUDIO|>")), LayoutError, "control token"),
    ],
)
def test_samples_the_model_would_misread_are_refused(
    loaded: Callable[..., LoadedModel],
    media: Path,
    parts: tuple[Part, ...],
    error: type[Exception],
    message: str,
) -> None:
    soundfile.write(media / "click.wav", np.zeros(1000), 16_000)
    with pytest.raises(error, match=message):
        prepared_of(loaded(max_frames=10), media, sample_of(*parts, *QUESTION))


def test_media_of_another_kind_or_number_are_refused(
    loaded: Callable[..., LoadedModel], media: Path
) -> None:
    sample = SAMPLES["video with its sound"]
    with pytest.raises(MediaError, match="decoded media are"):
        loaded().prepare(sample, ())


def test_a_prompt_longer_than_the_model_takes_is_refused(
    checkpoint: Path, media: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit_config(copy, lambda c: c["text_config"].update(max_position_embeddings=64))
    with pytest.raises(MediaError, match="tokens, the model takes 64"):
        prepared_of(load(spec_of(copy), "cpu"), media, SAMPLES["video with its sound"])


def test_inspection_shows_edges_and_dumps_the_exact_inputs(
    loaded: Callable[..., LoadedModel], media: Path, tmp_path: Path
) -> None:
    model = loaded()
    prepared = prepared_of(model, media, SAMPLES["video with its sound"])
    layout = prepared.layout
    cross = Pathway(
        name="cross_frame",
        layout="single_video",
        sources=("video",),
        targets=("video",),
        direction="across",
    )
    rows = edges_rows(prepared, cross)
    assert rows[1].target == "frame:2"
    assert rows[1].sources == ("frame:0", "frame:1")
    assert sum(row.n_edges for row in rows) == causal_blocked_edges(
        layout, blocked_segments(layout, cross)
    )
    with pytest.raises(LayoutError, match="is for interleaved prompts"):
        edges_rows(prepared, replace(cross, layout="interleaved", sources=("candidates",),
                                     targets=("candidates",)))  # fmt: skip
    embedded = embed(model, prepared)
    dump(tmp_path / "new" / "s1.safetensors", prepared, embedded)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s1.safetensors"]
    tensors = load_file(tmp_path / "new" / "s1.safetensors")
    for name in ("inputs_embeds", "position_ids", "attention_mask", "input_ids"):
        assert torch.equal(tensors[name], getattr(embedded, name))
    video = [tensors[f"member.video.{i}"] for i in range(SECONDS)]
    assert torch.equal(torch.cat(video), tensors["group.video"])
    assert "member.system.0" not in tensors
    assert tensors["group.last"].tolist() == [layout.n_tokens - 1]
    assert tensors["option_tokens"].tolist() == list(prepared.option_tokens)


def test_the_shipped_checkpoint_runs(media: Path) -> None:
    spec = ModelSpec(name="testbed", family="qwen2_5_omni", path="testbed", dtype="float32")
    model = load(spec, "cpu")
    prepared = prepared_of(model, media, SAMPLES["video with its sound"])
    logits, _ = official(model, prepared)
    assert (by_layers(model, prepared) - logits).abs().max() == 0
