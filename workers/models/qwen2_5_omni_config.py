"""Qwen2.5-Omni: what its config and processor files say, and what of it this family can run."""

from collections.abc import Mapping
from typing import Any

import torch

from avflow.datasets.media import MediaSpec
from avflow.workers.models.base import ModelInfo, ModelSpec, UnsupportedModelError
from avflow.workers.models.checkpoint import read_config
from avflow.workers.models.configs import (
    SIZES,
    TEXT_VALUES,
    missing_keys,
    model_info,
    part_of,
    refuse_faults,
    unknown_rope,
    unknown_values,
)
from avflow.workers.models.prompt_files import (
    CHAT_TEMPLATE,
    PROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
)

MODEL_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # a full model's, a thinker's own
UNUSED = ("talker.", "token2wav.")  # tensors of a full checkpoint's speech side
# The processor's own cap of a frame; a checkpoint's file may allow sixteen thousand tokens a frame.
FRAME_TOKENS = 768
_FRAME_MAX_PIXELS = FRAME_TOKENS * 28 * 28


def sizes(spec: ModelSpec) -> ModelInfo:
    """Sizes and digest from config.json. Raises UnsupportedModelError, naming every bad key, and
    every file that is missing."""
    _refuse_foreign_options(spec)
    config, digest = read_config(
        spec, UNUSED, (TOKENIZER, TOKENIZER_CONFIG, PROCESSOR, CHAT_TEMPLATE)
    )
    text = _text_config(spec, config)
    return model_info(text, meta_thinker(config), digest)


def _refuse_foreign_options(spec: ModelSpec) -> None:
    """Options that mean something to another family alone keep their defaults."""
    if spec.positions != "generate" or not spec.block_audio_padding:
        raise UnsupportedModelError(
            f"model {spec.name}: positions and block_audio_padding are options of video_salmonn2; "
            "Qwen2.5-Omni has one rule of positions and no padding among its tokens, so leave "
            "them out"
        )


def thinker_config(config: Mapping[str, Any]) -> Any:
    """The thinker's part of a config.json, its own or a full model's."""
    import transformers

    hf: Any = transformers
    return hf.Qwen2_5OmniThinkerConfig.from_dict(config.get("thinker_config", config))


def meta_thinker(config: Mapping[str, Any]) -> Any:
    """The official thinker that this config.json describes, without memory for its weights."""
    import transformers

    hf: Any = transformers
    with torch.device("meta"):
        return hf.Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(config))


def _text_config(spec: ModelSpec, config: dict[str, Any]) -> dict[str, Any]:
    """The text decoder's part of a thinker's or a full model's config, found to be runnable."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"model {spec.name}: model_type is {kind!r}; the family qwen2_5_omni knows "
            f"{' and '.join(map(repr, MODEL_TYPES))}"
        )
    thinker = part_of(config, "thinker_config" if kind == MODEL_TYPES[0] else "")
    text = part_of(thinker, "text_config")
    # transformers finds the media by vision_start_token_id, but its config class lacks the field.
    needed = {"text_config": SIZES, "": ("vision_start_token_id",)}
    wrong = [
        *unknown_values(thinker, {"text_config": TEXT_VALUES}),
        *unknown_rope(text, "text_config"),
        *missing_keys(thinker, needed),
    ]
    if odd := set(text.get("layer_types") or ()) - {"full_attention"}:
        wrong.append(f"text_config.layer_types has {sorted(odd)} (known: 'full_attention')")
    if "quantization_config" in config:
        wrong.append("quantization_config (known: none)")
    refuse_faults(spec, wrong)
    return text


def check_agreement(spec: ModelSpec, config: Any, processor: Any) -> None:
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


def media_spec(spec: ModelSpec, processor: Any) -> MediaSpec:
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
