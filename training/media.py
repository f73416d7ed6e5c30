"""Media files to the processor's inputs, without text: what the encoders are trained on."""

from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5OmniProcessor

from avflow.datasets.testbed.looks import SAMPLE_RATE_HZ
from training.model import FPS


def decode_clip(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [T, 3, H, W] at `FPS` and the mono wave, cut to the file's whole seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        step = round(float(stream.average_rate) / FPS)
        seconds = len(frames) // round(float(stream.average_rate))
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    with av.open(str(path)) as container:
        pieces = [
            piece.to_ndarray().reshape(-1)
            for frame in container.decode(audio=0)
            for piece in resampler.resample(frame)
        ]
    wave = np.concatenate(pieces)[: seconds * SAMPLE_RATE_HZ]
    return np.stack(frames[::step]).transpose(0, 3, 1, 2), wave.astype(np.float32)


def clip_inputs(processor: Qwen2_5OmniProcessor, path: Path) -> tuple[Tensor, Tensor]:
    """A clip's patches [T*16, 1176] (16 a second) and mel frames [bins, T*20]."""
    frames, wave = decode_clip(path)
    pixels = processor.video_processor(
        [frames], do_sample_frames=False, return_tensors="pt", cap_pixels_per_frame=False
    )
    return pixels["pixel_values_videos"], _mel(processor, wave)


def image_inputs(processor: Qwen2_5OmniProcessor, path: Path) -> Tensor:
    """An image's patches [16, 1176]."""
    pixels = processor.image_processor([Image.open(path).convert("RGB")], return_tensors="pt")
    return pixels["pixel_values"]


def sound_inputs(processor: Qwen2_5OmniProcessor, path: Path) -> Tensor:
    """A one-second wav's mel frames [bins, 20]."""
    wave, _ = soundfile.read(path, dtype="float32")
    return _mel(processor, wave)


def _mel(processor: Qwen2_5OmniProcessor, wave: np.ndarray) -> Tensor:
    features = processor.feature_extractor(
        wave,
        sampling_rate=SAMPLE_RATE_HZ,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    return features["input_features"][0][:, features["attention_mask"][0].bool()]
