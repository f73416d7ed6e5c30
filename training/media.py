"""Media files to the processor's inputs, without text: what the encoders are trained on."""

from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import Qwen2_5OmniProcessor

from avflow.datasets.media import MediaSpec, decode_media
from avflow.datasets.sample import MediaPart
from avflow.datasets.testbed.looks import SAMPLE_RATE_HZ, SIDE_PX
from training.model import FPS

PIXELS = SIDE_PX**2
MEDIA_SPEC = MediaSpec(
    fps=FPS,
    max_frames=128,
    temporal_patch=2,
    frame_min_pixels=PIXELS,
    frame_max_pixels=PIXELS,
    image_min_pixels=PIXELS,
    image_max_pixels=PIXELS,
    patch_multiple=28,
    sample_rate=SAMPLE_RATE_HZ,
    max_audio_s=None,
)


def clip_inputs(processor: Qwen2_5OmniProcessor, path: Path) -> tuple[Tensor, Tensor]:
    """A clip's patches [T*16, 1176] (16 a second) and mel frames [bins, T*20]."""
    part = MediaPart(kind="video", path=path.name, with_audio=True)
    media = decode_media(path.parent, part, MEDIA_SPEC)
    pixels = processor.video_processor(
        [media.frames], do_sample_frames=False, return_tensors="pt", cap_pixels_per_frame=False
    )
    return pixels["pixel_values_videos"], _mel(processor, media.waveform)


def image_inputs(processor: Qwen2_5OmniProcessor, path: Path) -> Tensor:
    """An image's patches [16, 1176]."""
    media = decode_media(path.parent, MediaPart(kind="image", path=path.name), MEDIA_SPEC)
    return processor.image_processor([media.frames[0]], return_tensors="pt")["pixel_values"]


def sound_inputs(processor: Qwen2_5OmniProcessor, path: Path) -> Tensor:
    """A one-second wav's mel frames [bins, 20]."""
    media = decode_media(path.parent, MediaPart(kind="audio", path=path.name), MEDIA_SPEC)
    return _mel(processor, media.waveform)


def _mel(processor: Qwen2_5OmniProcessor, wave: np.ndarray) -> Tensor:
    features = processor.feature_extractor(
        wave,
        sampling_rate=SAMPLE_RATE_HZ,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    return features["input_features"][0][:, features["attention_mask"][0].bool()]
