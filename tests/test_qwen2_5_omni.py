"""The Qwen2.5-Omni adapter on a random checkpoint: from files to the official model's inputs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from avflow.datasets.media import MediaError, decode_sample
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaPart, MediaRole, Part, Sample, TextPart
from avflow.datasets.testbed.render import render_clip, render_image, render_sound
from avflow.datasets.testbed.world import Scene
from avflow.pathways.groups import group_positions, members, positions
from avflow.pathways.layout import LayoutError
from avflow.pathways.pathway import Pathway, blocked_segments, causal_blocked_edges
from avflow.workers.inspect import dump, edges_rows, layout_rows
from avflow.workers.models import describe, load, resolve_path
from avflow.workers.models.base import (
    LoadedModel,
    ModelSpec,
    Prepared,
    UnsupportedModelError,
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


def spec_of(folder: Path, **changes: Any) -> ModelSpec:
    fields = {"name": "tiny", "family": "qwen2_5_omni", "path": str(folder), "dtype": "float32"}
    return ModelSpec(**(fields | changes))


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


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_a_prompt_longer_than_the_model_takes_is_refused(copy: Path, media: Path) -> None:
    edit_config(copy, lambda c: c["text_config"].update(max_position_embeddings=64))
    with pytest.raises(MediaError, match="tokens, the model takes 64"):
        prepared_of(load(spec_of(copy), "cpu"), media, SAMPLES["video with its sound"])


def test_describe_reads_sizes_and_tells_checkpoints_apart(checkpoint: Path, copy: Path) -> None:
    info = describe(spec_of(checkpoint))
    assert (info.n_layers, info.hidden_size, info.n_heads, info.n_kv_heads) == (4, 64, 4, 2)
    assert info == describe(spec_of(copy))
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert describe(spec_of(copy)).digest != info.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type is 'llama'"),
        (lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window=True"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda c: c.update(quantization_config={}), "quantization_config"),
        (lambda c: c.pop("vision_start_token_id"), "vision_start_token_id is missing"),
        (lambda c: c["text_config"].pop("hidden_size"), "hidden_size is missing"),
        (
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"),
            "rope_type='yarn'",
        ),
    ],
)
def test_configs_it_does_not_know_are_refused_by_key(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(copy, change)
    with pytest.raises(UnsupportedModelError, match=message):
        describe(spec_of(copy))


@pytest.mark.parametrize(
    ("key", "value"), [("position_id_per_seconds", 25), ("vision_start_token_id", 3)]
)
def test_config_and_processor_must_agree(copy: Path, key: str, value: int) -> None:
    edit_config(copy, lambda c: c.update({key: value}))
    with pytest.raises(UnsupportedModelError, match=f"disagree: {key} {value} against"):
        load(spec_of(copy), "cpu")


def test_missing_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights[next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="1 weights missing"):
        load(spec_of(copy), "cpu")


def test_the_thinker_of_a_full_checkpoint_loads_the_same(
    copy: Path, media: Path, loaded: Callable[..., LoadedModel]
) -> None:
    """The layout on the hub: `thinker.` keys, the thinker's config inside, a talker beside it."""
    # transformers itself saves the thinker under the hub's old names, less the prefix.
    saved = load_file(copy / "model.safetensors")
    weights = {f"thinker.{key}": tensor for key, tensor in saved.items()}
    weights["talker.thinker_to_talker_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((copy / "config.json").read_text())
    full = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "enable_audio_output": False}
    (copy / "config.json").write_text(json.dumps(full))
    model, sample = load(spec_of(copy), "cpu"), SAMPLES["video with its sound"]
    assert torch.equal(
        by_layers(model, prepared_of(model, media, sample)),
        by_layers(loaded(), prepared_of(loaded(), media, sample)),
    )


def test_unknown_families_paths_and_dtypes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt'; known: qwen2_5_omni"):
        describe(spec_of(checkpoint, family="gpt"))
    with pytest.raises(UnsupportedModelError, match="no folder"):
        describe(spec_of(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedModelError, match="holds no config"):
        describe(spec_of(tmp_path))
    with pytest.raises(UnsupportedModelError, match="dtype 'int8'"):
        load(spec_of(checkpoint, dtype="int8"), "cpu")
    assert resolve_path(spec_of(Path("Qwen/Qwen2.5-Omni-3B"))) == "Qwen/Qwen2.5-Omni-3B"


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
