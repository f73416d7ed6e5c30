"""Qwen2.5-Omni (the thinker), as Hugging Face's transformers implements it.

One video with its sound is interleaved in chunks of `seconds_per_chunk`: the chunk's frame pairs,
then its audio tokens. What transformers would let pass silently is checked here: the frame rate it
assumes, the positions it computes from a missing argument, special tokens that differ between
config and tokenizer. Runs with transformers 5.17 and 5.23.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avflow.datasets.media import DecodedMedia, MediaSpec
from avflow.datasets.sample import Sample
from avflow.pathways.layout import LayoutError
from avflow.workers.models.base import (
    DTYPES,
    Decoder,
    Embedded,
    Features,
    ModelInfo,
    ModelSpec,
    Prepared,
    UnsupportedModelError,
)
from avflow.workers.models.checkpoint import read_config, resolve_path
from avflow.workers.models.qwen2_5_omni_prompt import PromptMaker, hears_videos, prepare

# What the official chat template puts where no system message is given.
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
# The processor's own cap of a frame; a checkpoint's file may allow sixteen thousand tokens a frame.
_FRAME_MAX_PIXELS = 768 * 28 * 28
_ATTENTIONS = ("sdpa", "eager")
_NOT_THINKING = ("talker.", "token2wav.")  # a full checkpoint's speech side
_KNOWN_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "attention_dropout": (None, 0, 0.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenOmni:
    """A loaded thinker: a `LoadedModel`."""

    spec: ModelSpec
    info: ModelInfo
    decoder: Decoder
    hf_model: nn.Module
    media_spec: MediaSpec
    device: torch.device
    maker: PromptMaker

    def prepare(self, sample: Sample, media: Sequence[DecodedMedia]) -> Prepared:
        """See `LoadedModel.prepare`."""
        return prepare(self.maker, sample, media)

    def official_inputs(self, prepared: Prepared) -> Mapping[str, object]:
        """See `LoadedModel.official_inputs`."""
        tensors = {name: tensor.to(self.device) for name, tensor in prepared.tensors.items()}
        return {**tensors, "use_audio_in_video": hears_videos(prepared.sample)}

    def encode(self, prepared: Prepared) -> Features:
        """See `LoadedModel.encode`."""
        return encode(self, prepared)

    def embed(self, prepared: Prepared, features: Features) -> Embedded:
        """See `LoadedModel.embed`."""
        return embed(self, prepared, features)


def describe(spec: ModelSpec) -> ModelInfo:
    """Sizes and digest from config.json. Raises UnsupportedModelError, naming every bad key."""
    _refuse_foreign_options(spec)
    config, digest = read_config(spec)
    text = _text_config(spec, config)
    heads = text["num_attention_heads"]
    return ModelInfo(
        n_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        n_heads=heads,
        n_kv_heads=text["num_key_value_heads"],
        head_size=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        parameters=_count_parameters(config),
        digest=digest,
    )


def _refuse_foreign_options(spec: ModelSpec) -> None:
    """Options that mean something to another family alone keep their defaults."""
    if spec.positions != "generate" or not spec.block_audio_padding:
        raise UnsupportedModelError(
            f"model {spec.name}: positions and block_audio_padding are options of video_salmonn2; "
            "Qwen2.5-Omni has one rule of positions and no padding among its tokens, so leave "
            "them out"
        )


def _count_parameters(config: dict[str, Any]) -> int:
    """Of the thinker that this config describes, built without memory."""
    import transformers

    hf: Any = transformers
    thinker = hf.Qwen2_5OmniThinkerConfig(**config.get("thinker_config", config))
    with torch.device("meta"):
        model = hf.Qwen2_5OmniThinkerForConditionalGeneration(thinker)
    return sum(parameter.numel() for parameter in model.parameters())


def _text_config(spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's part of a thinker's or a full model's config, found to be runnable."""
    kind = config.get("model_type")
    if kind == "qwen2_5_omni":
        thinker = config.get("thinker_config", {})
    elif kind == "qwen2_5_omni_thinker":
        thinker = config
    else:
        raise UnsupportedModelError(
            f"model {spec.name}: model_type is {kind!r}; the family qwen2_5_omni knows "
            "'qwen2_5_omni' and 'qwen2_5_omni_thinker'"
        )
    text: dict[str, Any] = thinker.get("text_config", {})
    wrong = [
        f"text_config.{key}={text[key]!r} (known: {', '.join(map(repr, known))})"
        for key, known in _KNOWN_VALUES.items()
        if key in text and text[key] not in known
    ]
    if odd := set(text.get("layer_types") or ()) - {"full_attention"}:
        wrong.append(f"text_config.layer_types has {sorted(odd)} (known: 'full_attention')")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        wrong.append(f"text_config.rope_type={rope.get('rope_type')!r} (known: 'default')")
    if "quantization_config" in config:
        wrong.append("quantization_config (known: none)")
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
              "intermediate_size", "vocab_size")  # fmt: skip
    wrong += [f"text_config.{key} is missing" for key in needed if key not in text]
    # transformers finds the media by this token, but its config class has no field for it.
    if "vision_start_token_id" not in thinker:
        wrong.append("vision_start_token_id is missing")
    if wrong:
        raise UnsupportedModelError(
            f"model {spec.name}: its config.json holds what this family can't run: "
            + "; ".join(wrong)
        )
    return text


def load(spec: ModelSpec, device: torch.device) -> QwenOmni:
    """Weights (safetensors alone, no code from the checkpoint) and processor, on one device.

    Raises UnsupportedModelError for a dtype, attention, config or weights this family can't run.
    """
    import transformers

    hf: Any = transformers
    info = describe(spec)
    if spec.dtype not in DTYPES or spec.attention not in _ATTENTIONS:
        raise UnsupportedModelError(
            f"model {spec.name}: dtype {spec.dtype!r} (known: {', '.join(DTYPES)}), attention "
            f"{spec.attention!r} (known: {', '.join(_ATTENTIONS)})"
        )
    path = resolve_path(spec)
    # Its bar would be drawn over the sweep's own progress.
    hf.utils.logging.disable_progress_bar()
    processor = hf.Qwen2_5OmniProcessor.from_pretrained(path, revision=spec.revision)
    model, report = hf.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        path,
        revision=spec.revision,
        dtype=DTYPES[spec.dtype],
        # The encoders keep sdpa: a plain string would reach them too.
        attn_implementation={"text_config": spec.attention},
        use_safetensors=True,
        output_loading_info=True,
    )
    unknown = {key for key in report["unexpected_keys"] if not key.startswith(_NOT_THINKING)}
    if lost := sorted({*report["missing_keys"], *unknown}):
        raise UnsupportedModelError(
            f"model {spec.name}: {len(lost)} weights missing or unknown in {path}: "
            f"{', '.join(lost[:5])} ..."
        )
    _check_agreement(spec, model.config, processor)
    model.eval().requires_grad_(False).to(device)
    # Before transformers 5.21 the thinker held its encoders itself, beside the text model.
    text = getattr(model.model, "language_model", model.model)
    media_spec = _media_spec(spec, processor)
    return QwenOmni(
        spec=spec,
        info=info,
        decoder=Decoder(
            layers=text.layers,
            rotary=text.rotary_emb,
            norm=text.norm,
            lm_head=model.lm_head,
            config=text.config,
        ),
        hf_model=model,
        media_spec=media_spec,
        device=device,
        maker=PromptMaker(
            processor=processor,
            config=model.config,
            media_spec=media_spec,
            system_prompt=DEFAULT_SYSTEM_PROMPT
            if spec.system_prompt is None
            else spec.system_prompt,
        ),
    )


def _check_agreement(spec: ModelSpec, config: Any, processor: Any) -> None:
    """Config, tokenizer and processor must mean the same tokens, patches and rates."""
    video, sound = processor.video_processor, processor.feature_extractor
    vision = config.vision_config
    token = processor.tokenizer.convert_tokens_to_ids
    pairs = {
        "audio_token_index": (config.audio_token_index, token(processor.audio_token)),
        "image_token_index": (config.image_token_index, token(processor.image_token)),
        "video_token_index": (config.video_token_index, token(processor.video_token)),
        "audio_start_token_id": (config.audio_start_token_id, token(processor.audio_bos_token)),
        "audio_end_token_id": (config.audio_end_token_id, token(processor.audio_eos_token)),
        "vision_start_token_id": (config.vision_start_token_id, token(processor.vision_bos_token)),
        "patch_size": (vision.patch_size, video.patch_size),
        "spatial_merge_size": (vision.spatial_merge_size, video.merge_size),
        "temporal_patch_size": (
            vision.temporal_patch_size,
            video.temporal_patch_size,
        ),
        "num_mel_bins": (config.audio_config.num_mel_bins, sound.feature_size),
        # Both encoders' convolutions halve the mel frames twice.
        "position_id_per_seconds": (
            config.position_id_per_seconds,
            sound.sampling_rate / sound.hop_length / 4,
        ),
    }
    wrong = [
        f"{key} {ours} against {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs
    ]
    if wrong:
        raise UnsupportedModelError(
            f"model {spec.name}: config and processor files disagree: {'; '.join(wrong)}"
        )


def _media_spec(spec: ModelSpec, processor: Any) -> MediaSpec:
    """The decoding budget: the spec's tokens, else the checkpoint's own pixels."""
    video, image, sound = (
        processor.video_processor,
        processor.image_processor,
        processor.feature_extractor,
    )
    side = video.patch_size * video.merge_size

    def budget(tokens: int | None, size: Any, cap: int) -> tuple[int, int]:
        most = min(size["longest_edge"], cap) if tokens is None else tokens * side**2
        return min(size["shortest_edge"], most), most

    frame_min, frame_max = budget(spec.frame_tokens, video.size, _FRAME_MAX_PIXELS)
    image_min, image_max = budget(spec.image_tokens, image.size, image.size["longest_edge"])
    return MediaSpec(
        fps=spec.fps,
        max_frames=spec.max_frames,
        temporal_patch=video.temporal_patch_size,
        frame_min_pixels=frame_min,
        frame_max_pixels=frame_max,
        image_min_pixels=image_min,
        image_max_pixels=image_max,
        patch_multiple=side,
        sample_rate=sound.sampling_rate,
        max_audio_s=sound.chunk_length,
    )


@torch.no_grad()
def encode(model: QwenOmni, prepared: Prepared) -> Features:
    """The encoders' outputs as the official forward takes them: `audio`, `image`, `video`."""
    hf: Any = model.hf_model
    inputs = {name: tensor.to(model.device) for name, tensor in prepared.tensors.items()}
    tensors: dict[str, Tensor] = {}
    if "input_features" in inputs:
        tensors["audio"] = hf.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"], return_dict=True
        ).last_hidden_state
    if "pixel_values" in inputs:
        tensors["image"] = torch.cat(
            hf.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            ).pooler_output
        )
    if "pixel_values_videos" in inputs:
        tensors["video"] = torch.cat(
            hf.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
            ).pooler_output
        )
    return Features(tensors=tensors)


@torch.no_grad()
def embed(model: QwenOmni, prepared: Prepared, features: Features) -> Embedded:
    """The decoder's inputs as the official forward makes them. Raises LayoutError."""
    hf: Any = model.hf_model
    ids = prepared.tensors["input_ids"].to(model.device)
    place = {
        "audio": hf.config.audio_token_id,
        "image": hf.config.image_token_id,
        "video": hf.config.video_token_id,
    }
    hidden = hf.get_input_embeddings()(ids)
    for kind, tensor in features.tensors.items():
        hidden = _scatter(hidden, ids == place[kind], tensor)
    return Embedded(
        inputs_embeds=hidden,
        position_ids=_positions(hf, prepared).to(model.device),
        attention_mask=prepared.tensors["attention_mask"].to(model.device),
        input_ids=ids,
    )


def _scatter(hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
    """Put features [n, D] at the n marked positions of hidden [1, N, D]."""
    if int(where.sum()) != len(features):
        raise LayoutError(
            f"the prompt has {int(where.sum())} places for {len(features)} encoder outputs"
        )
    return hidden.masked_scatter(where.unsqueeze(-1), features.to(hidden))


def _positions(hf: Any, prepared: Prepared) -> Tensor:
    """int64 [3, 1, N]: time, height, width. On the CPU, with every argument given.

    Left out, `attention_mask`, `use_audio_in_video` or the seconds a frame pair would change the
    result without a word; `rope_deltas` would carry over to the next prompt.
    """
    inputs = prepared.tensors
    mel = inputs.get("feature_attention_mask")
    (hf.model if hasattr(hf.model, "rope_deltas") else hf).rope_deltas = None
    positions, _ = hf.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=inputs["attention_mask"],
        use_audio_in_video=hears_videos(prepared.sample),
        audio_seqlens=None if mel is None else mel.sum(dim=1),
        second_per_grids=inputs.get("video_second_per_grid"),
    )
    n = inputs["input_ids"].shape[1]
    if positions.shape != (3, 1, n):
        raise LayoutError(f"positions are {tuple(positions.shape)}, expected (3, 1, {n})")
    _check_sound_clock(hf.config, inputs["input_ids"][0], positions[0, 0])
    result: Tensor = positions
    return result


def _check_sound_clock(config: Any, ids: Tensor, times: Tensor) -> None:
    """A sound's i-th token must come i steps after the start of its block.

    Processor and model cut a video into chunks separately, in different precision; where they
    disagree, positions of frames would land on sound.
    """
    opened = (ids == config.audio_start_token_id).nonzero()[:, 0].tolist()
    closed = (ids == config.audio_end_token_id).nonzero()[:, 0].tolist()
    for start, stop in zip(opened, closed, strict=True):
        block = times[start + 1 : stop]
        sound = block[ids[start + 1 : stop] == config.audio_token_id]
        if not torch.equal(sound, block[0] + torch.arange(len(sound))):
            raise LayoutError(
                "processor and model cut the video and its sound into different chunks; change "
                "fps or max_frames a little"
            )
