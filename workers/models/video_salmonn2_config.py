"""video-SALMONN 2+: what its config.json says, and what of it this family can run."""

import math
from pathlib import Path
from typing import Any

from avflow.datasets.media import MediaSpec
from avflow.workers.models.base import ModelInfo, ModelSpec, UnsupportedModelError
from avflow.workers.models.checkpoint import read_config
from avflow.workers.models.configs import (
    SIZES,
    TEXT_VALUES,
    missing_keys,
    model_info,
    refuse_faults,
    unknown_rope,
    unknown_values,
)
from avflow.workers.models.prompt_files import TOKENIZER, TOKENIZER_CONFIG
from avflow.workers.models.video_salmonn2_weights import refuse_adapter, refuse_adapter_id

MODEL_TYPES = ("qwen2_5_vl",)  # the authors kept the name of what they built upon
ARCHITECTURE = "video_SALMONN2_plus"
SAMPLE_RATE = 16_000
# The authors' evaluation (their README's "IMPORTANT" and inference.py): pixels of a frame at
# least, and at most where a video has as many frames as are allowed; frames at least.
_FRAME_MIN_PIXELS = 4 * 28 * 28
_FRAME_MAX_PIXELS = 61_250
_SHARED_OUT = 0.95  # of the pixels of so many frames, when a video has fewer
_MIN_FRAMES = 16

_KNOWN: dict[str, dict[str, tuple[object, ...]]] = {
    "": {**TEXT_VALUES, "quantization_config": (None,)},
    "audio_config": {
        "activation_function": ("gelu",),
        "max_source_positions": (1500,),
        "scale_embedding": (False,),
        "second_per_window": (0.5,),
        "second_stride": (0.5,),
    },
    "audio_config.qformer_config": {
        "hidden_act": ("gelu",),
        "query_length": (1,),
        "cross_attention_freq": (1,),
        "add_cross_attention": (True,),
    },
    "vision_config": {"temporal_patch_size": (2,), "spatial_merge_size": (2,), "in_channels": (3,)},
}
_NEEDED: dict[str, tuple[str, ...]] = {
    "": (*SIZES, "max_position_embeddings", "video_token_id",
         "audio_token_id", "vision_start_token_id", "vision_end_token_id"),
    "audio_config": ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim",
                     "num_mel_bins", "max_source_positions", "second_per_window", "second_stride"),
    "audio_config.qformer_config": ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                    "intermediate_size", "hidden_act", "layer_norm_eps",
                                    "query_length"),
    "vision_config": ("depth", "hidden_size", "patch_size"),
}  # fmt: skip


def sizes(spec: ModelSpec) -> ModelInfo:
    """Sizes and digest from config.json. Raises UnsupportedModelError, naming every bad key, and
    every file that is missing."""
    refuse_adapter_id(spec)
    refuse_adapter(spec, Path(spec.path).expanduser())
    config, digest = read_config(spec, needed=(TOKENIZER, TOKENIZER_CONFIG))
    check_config(spec, config)
    from avflow.workers.models.video_salmonn2_net import meta_model

    return model_info(config, meta_model(config), digest)


def check_config(spec: ModelSpec, config: dict[str, Any]) -> None:
    """Raises UnsupportedModelError, naming what this family does not know or can't do without."""
    kind, made = config.get("model_type"), config.get("architectures")
    if kind not in MODEL_TYPES or made != [ARCHITECTURE]:
        raise UnsupportedModelError(
            f"model {spec.name}: its config.json says model_type {kind!r} and architectures "
            f"{made!r}; the family video_salmonn2 knows {MODEL_TYPES[0]!r} with [{ARCHITECTURE!r}]"
        )
    wrong = [
        *unknown_values(config, _KNOWN),
        *missing_keys(config, _NEEDED | {"rope_scaling": ("mrope_section",)}),
        *unknown_rope(config),
    ]
    refuse_faults(spec, wrong)


def own_frame_tokens(frames: int, max_frames: int) -> int:
    """Of a frame pair at most, in the authors' pixel budget (see `Family`)."""
    shared_out = _SHARED_OUT * max_frames / frames if frames < max_frames else 1
    return math.ceil(_FRAME_MAX_PIXELS * shared_out / 28**2)


def media_spec(spec: ModelSpec, config: dict[str, Any]) -> MediaSpec:
    """How media are read: the authors' way, with the spec's rate, frames and budget.

    Without `frame_tokens`, their pixel budget; with it, so many tokens a frame pair at most.
    """
    vision = config["vision_config"]
    side = vision["patch_size"] * vision.get("spatial_merge_size", 2)
    own = spec.frame_tokens is None
    most = _FRAME_MAX_PIXELS if spec.frame_tokens is None else spec.frame_tokens * side**2
    least = min(_FRAME_MIN_PIXELS, most)
    return MediaSpec(
        fps=spec.fps,
        max_frames=spec.max_frames,
        min_frames=min(_MIN_FRAMES, spec.max_frames),
        sampling="spread",
        resize="antialias",
        mono="mix",
        temporal_patch=2,
        frame_min_pixels=least,
        frame_max_pixels=most,
        video_max_pixels=_SHARED_OUT * spec.max_frames * most if own else None,
        image_min_pixels=least,
        image_max_pixels=most,
        patch_multiple=side,
        sample_rate=SAMPLE_RATE,
        max_audio_s=None,
    )
